# Copyright (c) 2026, PPEC contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A session with the agent on this very host: Varlink (JSON and a NUL byte) over its UNIX socket."""

from __future__ import annotations

import socket

from ansible_collections.ppec.cloud.plugins.module_utils.contract_table import INTERFACE, MAX_FRAME_BYTES, METHODS
from ansible_collections.ppec.cloud.plugins.module_utils.messages import decode_object, encode_object, read_reply
from ansible_collections.ppec.cloud.plugins.module_utils.problem import ProblemError

_READ_BYTES = 65536


class SocketSession:
    """One connection to the agent's socket; calls go over it one after the other."""

    def __init__(self, path, deadline):
        self._path = path
        self._deadline = deadline
        self._subject = f"agent at {path}"
        self._buffer = bytearray()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(deadline.left_s())
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            raise self._unavailable(error) from error

    def call(self, method, parameters, on_reply=None):
        """The last reply's parameters; `on_reply(parameters)` sees every reply as it arrives. Raises ProblemError."""
        message = {"method": f"{INTERFACE}.{method}", "parameters": parameters}
        if METHODS[method][1]:
            message["more"] = True
        frame = encode_object(message) + b"\0"
        try:
            self._socket.settimeout(self._deadline.left_s())
            self._socket.sendall(frame)
            while True:
                reply, continues = read_reply(decode_object(self._frame(), self._subject), self._subject)
                if on_reply:
                    on_reply(reply)
                if not continues:
                    return reply
        except OSError as error:
            self._deadline.left_s()
            raise self._unavailable(error) from error

    def _frame(self):
        searched = 0
        while True:
            end = self._buffer.find(0, searched)
            if end >= 0:
                frame = bytes(self._buffer[:end])
                del self._buffer[: end + 1]
                return frame
            searched = len(self._buffer)
            if searched > MAX_FRAME_BYTES:
                raise ProblemError(
                    "internal.error",
                    f"{self._subject} sent a frame longer than {MAX_FRAME_BYTES} bytes",
                    subject=self._subject,
                )
            self._socket.settimeout(self._deadline.left_s())
            data = self._socket.recv(_READ_BYTES)
            if not data:
                raise self._unavailable("it closed the connection before its last reply")
            self._buffer += data

    def _unavailable(self, why):
        if isinstance(why, PermissionError):
            return ProblemError(
                "auth.peer_refused",
                f"{self._subject}: this user may not connect",
                hint="Use become, or put the user into the group ppec.",
                subject=self._subject,
            )
        return ProblemError(
            "agent.unavailable",
            f"{self._subject}: {why}",
            hint="Check that ppec-agentd runs on this host.",
            subject=self._subject,
        )

    def close(self):
        self._socket.close()
