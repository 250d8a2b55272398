# SPDX-License-Identifier: Apache-2.0
"""Who is at the other end of the socket, as the kernel knows it (unix(7): SO_PEERCRED, SO_PEERGROUPS)."""

from __future__ import annotations

import contextlib
import socket
import struct
from dataclasses import dataclass

_CREDENTIALS = struct.Struct("3i")
_SO_PEERGROUPS = 59  # not in Python's socket module
# Python's getsockopt takes no larger buffer: 256 groups. A peer in more counts by its own group alone.
_GROUPS_BYTES = 1024


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer's credentials when it connected; `gids` are its group and supplementary groups."""

    pid: int
    uid: int
    gids: frozenset[int]


@dataclass(frozen=True, slots=True)
class AllowedPeers:
    uids: frozenset[int]
    gids: frozenset[int]

    def allow(self, peer: Peer) -> bool:
        return peer.uid in self.uids or not self.gids.isdisjoint(peer.gids)


def peer_of(connection: socket.socket) -> Peer:
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(raw)
    groups: tuple[int, ...] = ()
    with contextlib.suppress(OSError):  # more groups than that, or older than Linux 4.13
        packed = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_BYTES)
        groups = struct.unpack(f"{len(packed) // 4}I", packed)
    return Peer(pid, uid, frozenset({gid, *groups}))
