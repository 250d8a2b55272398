# SPDX-License-Identifier: Apache-2.0
"""The connection set-up that both HTTPS listeners share."""

from __future__ import annotations

import asyncio
import socket

import uvicorn
from uvicorn.server import ServerState

from ppec_contract.peer_protocol import PeerCertificateProtocol


async def _no_delay(listener: socket.socket) -> int:
    """TCP_NODELAY of the first connection that a server on `listener` accepts."""
    config = uvicorn.Config(lambda scope: None, http=PeerCertificateProtocol)
    config.load()
    accepted: asyncio.Future[asyncio.Transport] = asyncio.get_running_loop().create_future()

    class Seen(PeerCertificateProtocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            accepted.set_result(transport)

    state = ServerState()
    server = await asyncio.get_running_loop().create_server(lambda: Seen(config, state, {}), sock=listener)
    async with server:
        _, writer = await asyncio.open_connection(*listener.getsockname())
        connection = await accepted
        found: int = connection.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        writer.close()
        connection.close()
    return found


def test_an_answer_in_two_writes_does_not_wait_for_the_clients_acknowledgement() -> None:
    # As `accept` makes its sockets: without a protocol number, by which asyncio would know them for TCP.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("127.0.0.1", 0))
        assert asyncio.run(_no_delay(listener)) == 1
