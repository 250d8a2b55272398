# SPDX-License-Identifier: Apache-2.0
"""One open console: what a host tells of it goes to the client, what the client types goes to the host.

Nothing is kept, and nothing but numbers of bytes is ever logged. A client that reads slowly is waited for, and so in
turn the proxy and the agent wait, who tells what it had to skip; nothing piles up here.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import UUID

from ppec_contract.api_consoles import ConsoleEnd, ConsoleNotice, ConsoleOpen
from ppec_contract.errors import PpecError
from ppec_contract.guest import ReadConsole, ReadConsoleReply, WriteConsole, WriteConsoleReply
from ppec_contract.vm import VmState
from ppec_orchestrator.host_views.port import HostLine

# The agent's limit on one call.
MAX_WRITE_BYTES = 4096
# A guest's last words are in its log a little later than the news that it is off.
LAST_WORDS_S = 1.0
_UP = (VmState.RUNNING, VmState.PAUSED)
_OFF = (VmState.STOPPED, VmState.CRASHED)


class Client(Protocol):
    """Whoever has the console open."""

    async def show(self, data: bytes) -> None: ...

    async def notify(self, notice: ConsoleNotice) -> None: ...

    async def typed(self) -> bytes | None:
        """The next bytes; None once the client has left. Raises `request.invalid` for what are none."""


@dataclass(frozen=True, slots=True)
class Terms:
    """`allowed` says whether the caller's token still counts; it is asked every `recheck_s`."""

    asked: ConsoleOpen
    idle_s: float
    allowed: Callable[[], Awaitable[bool]]
    recheck_s: float = 5.0


class ConsoleRelay:
    """`reading` and `typing` are lines to the VM's host."""

    def __init__(self, vm_id: UUID, client: Client, reading: HostLine, typing: HostLine, terms: Terms) -> None:
        self._vm_id = vm_id
        self._client = client
        self._reading = reading
        self._typing = typing
        self._terms = terms
        self._idle = asyncio.timeout(None)
        self.shown_bytes = 0
        self.typed_bytes = 0

    async def run(self) -> ConsoleNotice | None:
        """Until it has ended: why, or None if the client left."""
        try:
            async with asyncio.timeout(self._terms.idle_s) as self._idle:
                return await _first(self._show(), self._listen(), self._watch_token())
        except TimeoutError:
            if not self._idle.expired():
                raise
            return ConsoleNotice(ended=ConsoleEnd.IDLE)
        except PpecError as error:
            return ConsoleNotice(ended=ConsoleEnd.PROBLEM, problem=error.problem())

    async def _show(self) -> ConsoleNotice:
        asked = self._terms.asked
        question = ReadConsole(vm_id=self._vm_id, tail_bytes=asked.tail_bytes, follow=asked.follow)
        was_up = False
        async with aclosing(self._reading.follow(question, ReadConsoleReply)) as pieces:
            async for piece in pieces:
                await self._pass_on(piece)
                if piece.state in _UP:
                    was_up = True
                elif piece.state in _OFF and was_up:
                    await self._last_words(pieces)
                    return ConsoleNotice(ended=ConsoleEnd.VM_OFF)
        return ConsoleNotice(ended=ConsoleEnd.VM_GONE if asked.follow else ConsoleEnd.COMPLETE)

    async def _last_words(self, pieces: AsyncGenerator[ReadConsoleReply, None]) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_S):
                async for piece in pieces:
                    await self._pass_on(piece)

    async def _pass_on(self, piece: ReadConsoleReply) -> None:
        if piece.state is not None or piece.skipped_bytes:
            await self._client.notify(ConsoleNotice(state=piece.state, skipped_bytes=piece.skipped_bytes))
        try:
            data = base64.b64decode(piece.data, validate=True)
        except binascii.Error as error:
            raise PpecError(
                "internal.error", f"the host of vm {self._vm_id} sent what is not base64", subject=f"vm {self._vm_id}"
            ) from error
        if data:
            self._active()
            await self._client.show(data)
            self.shown_bytes += len(data)

    async def _listen(self) -> None:
        while (data := await self._client.typed()) is not None:
            if self._terms.asked.read_only:
                raise PpecError(
                    "request.invalid",
                    "the console was opened read-only, and something was typed",
                    hint="Open it without read_only.",
                    subject="console",
                )
            self._active()
            for start in range(0, len(data), MAX_WRITE_BYTES):
                part = data[start : start + MAX_WRITE_BYTES]
                call = WriteConsole(vm_id=self._vm_id, data=base64.b64encode(part).decode())
                # Once: whether a call without an answer was typed nobody knows.
                await self._typing.ask(call, WriteConsoleReply)
                self.typed_bytes += len(part)

    async def _watch_token(self) -> ConsoleNotice:
        while await self._terms.allowed():  # noqa: ASYNC110 - a token that is revoked tells nobody
            await asyncio.sleep(self._terms.recheck_s)
        return ConsoleNotice(ended=ConsoleEnd.UNAUTHORISED)

    def _active(self) -> None:
        self._idle.reschedule(asyncio.get_running_loop().time() + self._terms.idle_s)


async def _first(*works: Coroutine[Any, Any, ConsoleNotice | None]) -> ConsoleNotice | None:
    """The result of what ends first; the others end with it."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return next(task for task in tasks if task.done()).result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
