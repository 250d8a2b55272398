# SPDX-License-Identifier: Apache-2.0
"""HTTP as both HTTPS listeners speak it, the proxy's and the orchestrator's: uvicorn's protocol, put right.

uvicorn verifies client certificates but doesn't hand them to the application: here the certificate is read once per
connection and put into every request's `scope["state"]["peer_certificate"]` (None without one). uvicorn's httptools
protocol puts no limit on the size of a request's head, which it keeps in memory, and answers what it can't parse with
plain text: here a head is bounded, and the answer is a problem. And asyncio switches Nagle's algorithm off only on
sockets whose protocol number is given, which those of `accept` lack: here it is off, or the second write of every
answer would wait 40 ms for the client's delayed acknowledgement of the first.

Nothing but the two listeners may import this file.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any, Final, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ppec_contract.errors import PpecError

MAX_HEAD_BYTES: Final = 64 * 1024
PROBLEM_TYPE: Final = "application/problem+json"


class PeerCertificateProtocol(HttpToolsProtocol):
    """Pin it with `uvicorn.Config(http=PeerCertificateProtocol)`."""

    _head_open = False
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        if connection is not None:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        tls = transport.get_extra_info("ssl_object")
        certificate = cast("dict[str, Any] | None", tls.getpeercert() if tls is not None else None)
        # uvicorn copies app_state into each request's scope; a copy per connection keeps peers apart.
        self.app_state = {**self.app_state, "peer_certificate": certificate or None}

    def on_message_begin(self) -> None:
        self._head_open = True
        self._head_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head_open = False
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head_open:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response(f"The request's head is larger than {MAX_HEAD_BYTES} bytes.")

    def send_400_response(self, msg: str) -> None:
        body = PpecError("request.malformed", msg, subject="request").problem().model_dump_json().encode()
        head = (
            "HTTP/1.1 400 Bad Request\r\n"
            f"content-type: {PROBLEM_TYPE}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode("ascii") + body)
        self.transport.close()
