# SPDX-License-Identifier: Apache-2.0
"""HTTP as both HTTPS listeners speak it, the proxy's and the orchestrator's: uvicorn's protocol, put right.

uvicorn verifies client certificates but doesn't hand them to the application: here the certificate is read once per
connection and put into every request's `scope["state"]["peer_certificate"]` (None without one). uvicorn's httptools
protocol puts no limit on the size of a request's head, which it keeps in memory, and answers what it can't parse with
plain text: here a head is bounded, and the answer is a problem. And asyncio switches Nagle's algorithm off only on
sockets whose protocol number is given, which those of `accept` lack: here it is off, or the second write of every
answer would wait 40 ms for the client's delayed acknowledgement of the first.

And where the client may still be sending, a connection is closed with a *lingering close* (RFC 9112, 9.6): closed at
once, with bytes of the client's unread, the kernel would send a reset, which may destroy the answer before the client
has read it. So what still comes is read and dropped for a moment.

Nothing but the two listeners may import this file.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any, Final, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ppec_contract.errors import PpecError

MAX_HEAD_BYTES: Final = 64 * 1024
PROBLEM_TYPE: Final = "application/problem+json"
# How long and how much of what nobody wants is read before the connection is closed on a client that goes on sending.
LINGER_S: Final = 2.0
MAX_LINGER_BYTES: Final = 8 * 1024 * 1024


class _LingeringTransport:
    """A transport whose `close` lingers while the protocol says that the client may still be sending."""

    def __init__(self, transport: asyncio.Transport, sending: Callable[[], bool]) -> None:
        self._transport = transport
        self._sending = sending
        self._left_bytes = MAX_LINGER_BYTES
        self.lingers = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self.lingers or self._transport.is_closing()

    def close(self) -> None:
        if self.lingers or self._transport.is_closing():
            return
        if not self._sending():
            self._transport.close()
            return
        self.lingers = True
        self._transport.resume_reading()
        asyncio.get_running_loop().call_later(LINGER_S, self._transport.close)

    def pause_reading(self) -> None:
        if not self.lingers:
            self._transport.pause_reading()

    def write(self, data: bytes) -> None:
        """Nothing more once it lingers: what an earlier request is still told would follow the last answer."""
        if not self.lingers:
            self._transport.write(data)

    def drop(self, data: bytes) -> None:
        self._left_bytes -= len(data)
        if self._left_bytes < 0:
            self._transport.close()


class PeerCertificateProtocol(HttpToolsProtocol):
    """Pin it with `uvicorn.Config(http=PeerCertificateProtocol)`."""

    _head_open = False
    _head_bytes = 0
    _message_open = False
    _line: _LingeringTransport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._line = _LingeringTransport(transport, lambda: self._message_open)
        super().connection_made(cast("asyncio.Transport", self._line))
        connection = transport.get_extra_info("socket")
        if connection is not None:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        tls = transport.get_extra_info("ssl_object")
        certificate = cast("dict[str, Any] | None", tls.getpeercert() if tls is not None else None)
        # uvicorn copies app_state into each request's scope; a copy per connection keeps peers apart.
        self.app_state = {**self.app_state, "peer_certificate": certificate or None}

    def on_message_begin(self) -> None:
        self._head_open = self._message_open = True
        self._head_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head_open = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._message_open = False
        super().on_message_complete()

    def data_received(self, data: bytes) -> None:
        if self._line.lingers:
            self._line.drop(data)
            return
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
        answering = self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        if not answering:
            self.transport.write(head.encode("ascii") + body)
        # Of what can't be parsed nobody knows where it ends.
        self._message_open = True
        self.transport.close()
