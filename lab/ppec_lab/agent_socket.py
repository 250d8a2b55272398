# SPDX-License-Identifier: Apache-2.0
"""One call to a host's agent on its own socket, as root there would make it: for what has no REST endpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ppec_contract.agent import FAILED, INTERFACE, SOCKET_PATH
from ppec_contract.errors import Problem

# Sends argument 2 to the socket of argument 1 and prints the reply.
CALLER = """
import socket, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
    channel.settimeout(300)
    channel.connect(sys.argv[1])
    channel.sendall(sys.argv[2].encode() + b"\\0")
    answer = b""
    while not answer.endswith(b"\\0"):
        part = channel.recv(65536)
        if not part:
            sys.exit("the agent closed the connection without an answer")
        answer += part
sys.stdout.write(answer[:-1].decode())
"""


def call_agent(
    read: Callable[[Sequence[str]], str], method: str, parameters: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The parameters of the reply to `method`; `read` runs a command on the host and returns what it prints.

    Raises PpecError as the agent does, and RuntimeError for any other error of the interface.
    """
    call = json.dumps({"method": f"{INTERFACE}.{method}", "parameters": dict(parameters or {})})
    reply = json.loads(read(("python3", "-I", "-c", CALLER, SOCKET_PATH, call)))
    values: dict[str, Any] = reply.get("parameters", {})
    if reply.get("error") == FAILED:
        raise Problem.model_validate(values).error()
    if "error" in reply:
        raise RuntimeError(f"{method}: the agent answered {reply['error']}: {values}")
    return values
