# SPDX-License-Identifier: Apache-2.0
"""HTTP as the proxy speaks it: uvicorn's protocol with the peer's certificate, a bounded head, and JSON problems.

uvicorn answers what it can't parse with plain text, and its httptools protocol puts no limit on the size of a
request's head; both are put right here.
"""

from __future__ import annotations

from typing import Final

from ppec_contract.errors import PpecError
from ppec_contract.peer_protocol import PeerCertificateProtocol

MAX_HEAD_BYTES: Final = 64 * 1024
PROBLEM_TYPE: Final = "application/problem+json"


class ProxyProtocol(PeerCertificateProtocol):
    """Pin it with `uvicorn.Config(http=ProxyProtocol)`."""

    _head_open = False
    _head_bytes = 0

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
