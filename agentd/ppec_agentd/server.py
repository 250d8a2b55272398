# SPDX-License-Identifier: Apache-2.0
"""The UNIX socket: bound atomically, open to few, never to too many at once."""

from __future__ import annotations

import asyncio
import contextlib
import grp
import os
import socket
from pathlib import Path

import structlog

from ppec_agentd.connection import Answering, Connection, Deadlines
from ppec_agentd.peer import AllowedPeers, Peer, peer_of
from ppec_agentd.settings import SocketSettings
from ppec_contract.errors import PpecError

log = structlog.get_logger(__name__)
BACKLOG = 128
# How long answers ready at shutdown may take to be sent.
LAST_WORDS_S = 2.0


def allowed_peers(settings: SocketSettings) -> AllowedPeers:
    """Root, the agent's own user, the configured ones, and the socket's group."""
    gids = frozenset({_gid_of(settings.group)}) if settings.group else frozenset()
    return AllowedPeers(frozenset({0, os.getuid(), *settings.allowed_uids}), gids)


def _gid_of(group: str) -> int:
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError as error:
        raise PpecError(
            "request.invalid",
            f"setting socket.group: there is no group {group!r} on this host",
            hint="Make the group, or set another one; an empty one leaves the socket to root and the agent's user.",
            subject="socket.group",
        ) from error


def bind_socket(settings: SocketSettings) -> socket.socket:
    """A listening socket at its path, with its owner and mode from the first moment it can be seen there.

    What stands at the path, be it a stale socket or a living one, is replaced by rename.
    """
    path = settings.path
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    with contextlib.suppress(FileNotFoundError):
        fresh.unlink()
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        before = os.umask(0o177)
        try:
            listening.bind(str(fresh))
        finally:
            os.umask(before)
        if settings.group:
            os.chown(fresh, -1, _gid_of(settings.group))
        fresh.chmod(settings.mode)
        listening.listen(BACKLOG)
        fresh.rename(path)
    except BaseException:
        listening.close()
        raise
    return listening


class Server:
    """Accepts connections until `close`."""

    def __init__(self, settings: SocketSettings, service: Answering) -> None:
        self._settings = settings
        self._service = service
        self._allowed = allowed_peers(settings)
        self._deadlines = Deadlines(settings.frame_timeout_s, settings.idle_timeout_s, settings.write_timeout_s)
        self._tasks: dict[asyncio.Task[None], Connection] = {}
        self._server: asyncio.Server | None = None
        self._bound: Path | None = None

    async def open(self, handed_over: socket.socket | None = None) -> None:
        """Listens on the socket handed over, or on one of its own."""
        if handed_over is None:
            listening = bind_socket(self._settings)
            self._bound = self._settings.path
        else:
            listening = handed_over
        self._server = await asyncio.start_unix_server(self._accept, sock=listening)
        log.info("listening", path=str(self._settings.path), handed_over=handed_over is not None)

    def stop_listening(self) -> None:
        """Takes no more connections; those there are go on."""
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._bound is not None:
            with contextlib.suppress(OSError):
                self._bound.unlink()
            self._bound = None

    async def close(self) -> None:
        """Takes no more connections and ends those there are; work already begun is not the server's to end."""
        self.stop_listening()
        for task, connection in self._tasks.items():
            connection.leave()
            if not connection.answering:
                task.cancel()
        if self._tasks:
            _, pending = await asyncio.wait(self._tasks, timeout=LAST_WORDS_S)
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        crowded = len(self._tasks) >= self._settings.max_connections
        connection = Connection((reader, writer), self._service, self._deadlines)
        self._tasks[task] = connection
        try:
            peer = peer_of(writer.get_extra_info("socket"))
            refusal = self._refusal(peer, crowded)
            if refusal is not None:
                log.warning("connection_refused", code=refusal.code, uid=peer.uid, pid=peer.pid)
                await connection.refuse(refusal)
            else:
                await connection.serve(peer)
        except asyncio.CancelledError:
            log.debug("connection_ended_by_shutdown")
        except Exception:
            log.exception("connection_failed")
        finally:
            self._tasks.pop(task, None)
            # abort, not close: a client that takes nothing must not keep its buffers here.
            await _hang_up(writer)

    def _refusal(self, peer: Peer, crowded: bool) -> PpecError | None:
        if not self._allowed.allow(peer):
            return PpecError(
                "auth.peer_refused",
                f"user {peer.uid} may not talk to the agent",
                hint="Connect as root or as a member of the socket's group.",
                subject="socket",
            )
        if crowded:
            return PpecError(
                "agent.busy",
                f"{self._settings.max_connections} clients are connected already",
                hint="Try again in a moment.",
                subject="socket",
            )
        return None


async def _hang_up(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(Exception):
        if not writer.is_closing():
            writer.close()
        async with asyncio.timeout(1.0):
            await writer.wait_closed()
    with contextlib.suppress(Exception):
        writer.transport.abort()
