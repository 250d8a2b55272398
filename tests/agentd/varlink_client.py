# SPDX-License-Identifier: Apache-2.0
"""A Varlink client."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any


class Client:
    """A Varlink client on a blocking socket, written without the code under test."""

    def __init__(self, path: Path, timeout_s: float = 30) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(timeout_s)
        self.socket.connect(str(path))
        self._pending = b""

    def send(self, method: str, parameters: Any = None, **flags: bool) -> None:
        message = {"method": method, "parameters": parameters or {}, **flags}
        self.socket.sendall(json.dumps(message, default=str).encode() + b"\0")

    def receive(self) -> dict[str, Any]:
        while b"\0" not in self._pending:
            data = self.socket.recv(65536)
            if not data:
                raise EOFError("the agent hung up")
            self._pending += data
        frame, self._pending = self._pending.split(b"\0", 1)
        answer: dict[str, Any] = json.loads(frame)
        return answer

    def call(self, method: str, parameters: Any = None, **flags: bool) -> dict[str, Any]:
        """The last reply; a bare name is a method of the agent's interface."""
        self.send(method if "." in method else f"cloud.ppec.agent.{method}", parameters, **flags)
        while (reply := self.receive()).get("continues"):
            pass
        return reply

    def close(self) -> None:
        self.socket.close()
