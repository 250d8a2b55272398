# SPDX-License-Identifier: Apache-2.0
"""A Varlink client of the host agent, and the smallest VM to ask it for."""

from __future__ import annotations

import hashlib
import json
import socket
import uuid
from pathlib import Path
from typing import Any


class AgentClient:
    """One connection; calls one after another."""

    def __init__(self, path: Path, timeout_s: float = 60) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout_s)
        self._socket.connect(str(path))
        self._pending = b""

    def create(self, vm: dict[str, Any], operation_id: str) -> str:
        """Creates one VM; the code of its problem, empty if there was none."""
        call = {"operation_id": operation_id, "fence": 1, "vms": [vm]}
        (result,) = self.call("CreateVms", call)["results"]
        problem = result.get("problem") or {}
        return str(problem.get("code", ""))

    def close(self) -> None:
        self._socket.close()

    def call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """The reply's parameters."""
        message = {"method": f"cloud.ppec.agent.{method}", "parameters": parameters}
        self._socket.sendall(json.dumps(message).encode() + b"\0")
        while b"\0" not in self._pending:
            data = self._socket.recv(65536)
            if not data:
                raise EOFError("the agent hung up")
            self._pending += data
        frame, self._pending = self._pending.split(b"\0", 1)
        answer: dict[str, Any] = json.loads(frame)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer}")
        reply: dict[str, Any] = answer["parameters"]
        return reply


def one_vm(name: str, image: Path, cell: int, memory_mib: int) -> dict[str, Any]:
    """Two vCPUs, no NIC, a disk of 16 MiB on `image`."""
    content = image.read_bytes()
    return {
        "vm_id": str(uuid.uuid4()),
        "name": name,
        "vcpus": 2,
        "memory_mib": memory_mib,
        "cells": [cell],
        "root_disk": {
            "size_mib": 16,
            "image": {
                "name": "bench",
                "sha256": hashlib.sha256(content).hexdigest(),
                "size_bytes": len(content),
                "format": "raw",
                "url": image.as_uri(),
            },
        },
    }
