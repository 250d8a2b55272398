# SPDX-License-Identifier: Apache-2.0
"""Connections to the agent's UNIX socket: a bounded set, kept open between calls, one call at a time on each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from ppec_contract.errors import PpecError
from ppec_contract.frames import FrameError, FrameReader, encode
from ppec_proxy.varlink_errors import agent_unavailable

_READ_BYTES = 64 * 1024


class _ConnectionLostError(Exception):
    """The agent closed the connection, or was never there."""


class _Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._frames = FrameReader()
        self._ready: list[dict[str, Any]] = []

    @property
    def usable(self) -> bool:
        """False once the agent is known to have hung up, or has said something nobody asked for."""
        return not (self._reader.at_eof() or self._writer.is_closing() or self._ready or self._frames.pending_bytes)

    async def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Sends the call, returns the first reply."""
        try:
            self._writer.write(encode(message))
            await self._writer.drain()
        except OSError as error:
            raise _ConnectionLostError(str(error)) from error
        return await self.next_reply()

    async def next_reply(self) -> dict[str, Any]:
        while not self._ready:
            try:
                data = await self._reader.read(_READ_BYTES)
            except OSError as error:
                raise _ConnectionLostError(str(error)) from error
            if not data:
                raise _ConnectionLostError("it closed the connection before it had answered")
            self._ready = self._frames.feed(data)
        return self._ready.pop(0)

    def close(self) -> None:
        self._writer.close()


class AgentPool:
    """Calls the agent. `replies` is the whole interface."""

    def __init__(self, socket_path: Path, max_connections: int, queue_timeout_s: float) -> None:
        self._socket_path = socket_path
        self._queue_timeout_s = queue_timeout_s
        self._slots = asyncio.Semaphore(max_connections)
        self._idle: list[_Connection] = []

    async def replies(self, message: dict[str, Any], *, once: bool = False) -> AsyncGenerator[dict[str, Any], None]:
        """The agent's replies, up to and including the first without `continues`.

        `once` is for a call that must not be made twice: it gets a fresh connection, which can't turn out dead.
        Closing the generator early closes the connection; the agent works on all the same. Raises PpecError
        `agent.unavailable`, `agent.busy`, or `internal.error` for an answer that isn't Varlink.
        """
        await self._take_slot()
        try:
            async for reply in self._converse(message, once):
                yield reply
        except _ConnectionLostError as error:
            raise agent_unavailable(str(error)) from error
        except FrameError as error:
            raise PpecError(
                "internal.error", f"the agent's answer is unusable: {error.message}", subject="agent"
            ) from error
        finally:
            self._slots.release()

    async def _converse(self, message: dict[str, Any], once: bool) -> AsyncGenerator[dict[str, Any], None]:
        connection, reply = await self._first_reply(message, once)
        finished = False
        try:
            while not finished:
                finished = not reply.get("continues")
                if finished:
                    self._idle.append(connection)
                yield reply
                if not finished:
                    reply = await connection.next_reply()
        finally:
            if not finished:
                connection.close()

    async def _first_reply(self, message: dict[str, Any], once: bool) -> tuple[_Connection, dict[str, Any]]:
        """On a kept connection if there is one.

        A kept connection can turn out dead because the agent was restarted; the call is then made once more on a fresh
        one. That is safe even if the agent had the first: changing calls carry an operation id it answers once.
        """
        while self._idle and not once:
            kept = self._idle.pop()
            if kept.usable:
                try:
                    return kept, await self._asked(kept, message)
                except _ConnectionLostError:
                    break
            kept.close()
        fresh = await self._connect()
        return fresh, await self._asked(fresh, message)

    async def _asked(self, connection: _Connection, message: dict[str, Any]) -> dict[str, Any]:
        try:
            return await connection.ask(message)
        except BaseException:
            connection.close()
            raise

    async def _connect(self) -> _Connection:
        try:
            return _Connection(*await asyncio.open_unix_connection(str(self._socket_path)))
        except OSError as error:
            raise _ConnectionLostError(f"{self._socket_path}: {error.strerror or error}") from error

    async def _take_slot(self) -> None:
        try:
            await asyncio.wait_for(self._slots.acquire(), self._queue_timeout_s)
        except TimeoutError as error:
            raise PpecError(
                "agent.busy",
                f"all connections to the agent were in use for {self._queue_timeout_s:g} s",
                hint="Repeat the request later.",
                subject="agent",
            ) from error

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()
