# SPDX-License-Identifier: Apache-2.0
"""The ring-fence: addresses outside the allow-list are turned away at `accept`, before a byte of TLS is exchanged.

A check inside the application would come after the handshake: strangers could then reach OpenSSL's parser and learn
who the host is. asyncio gives no hook between `accept` and TLS, but it takes a socket of ours.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Any

Network = IPv4Network | IPv6Network


def normalised(address: str) -> IPv4Address | IPv6Address:
    """The address without zone, and as IPv4 where a dual-stack socket shows it mapped into IPv6."""
    parsed = ip_address(address.partition("%")[0])
    mapped = parsed.ipv4_mapped if isinstance(parsed, IPv6Address) else None
    return mapped or parsed


class RingFence:
    """The allow-list; replaced whole on reload."""

    def __init__(self, networks: Iterable[Network]) -> None:
        self.networks = tuple(networks)

    def admits(self, address: str) -> bool:
        client = normalised(address)
        return any(client.version == net.version and client in net for net in self.networks)


class RingFencedSocket(socket.socket):
    """A listening socket whose `accept` closes the connections of strangers."""

    fence: RingFence
    on_refused: Callable[[str], None]

    @classmethod
    def listen_on(
        cls, address: IPv4Address | IPv6Address, port: int, fence: RingFence, on_refused: Callable[[str], None]
    ) -> RingFencedSocket:
        """Bound, not yet listening (asyncio does that). IPv6 sockets take IPv4 clients too. Raises OSError."""
        listener = cls(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if address.version == 6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.fence = fence
        listener.on_refused = on_refused
        listener.bind((str(address), port))
        listener.setblocking(False)
        return listener

    def accept(self) -> tuple[socket.socket, Any]:
        connection, peer = super().accept()
        if self.fence.admits(peer[0]):
            return connection, peer
        connection.close()
        self.on_refused(peer[0])
        # For the event loop this is a client that went away before it was accepted: it goes on to its other work and
        # comes back for the next one, so a flood of strangers can't hold it.
        raise ConnectionAbortedError(f"{peer[0]} is outside the ring-fence")
