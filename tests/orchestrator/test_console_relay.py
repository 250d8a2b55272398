# SPDX-License-Identifier: Apache-2.0
"""One open console between a scripted host and a scripted client: what only their timing shows."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncGenerator
from typing import Any
from uuid import UUID

import pytest

from ppec_contract.api_consoles import ConsoleEnd, ConsoleNotice, ConsoleOpen
from ppec_contract.errors import PpecError
from ppec_contract.guest import ReadConsoleReply
from ppec_contract.vm import VmState
from ppec_orchestrator.console_relay import ConsoleRelay, Terms

pytestmark = pytest.mark.anyio
SOON_S = 30
VM = UUID(int=1)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def piece(data: bytes = b"", **more: Any) -> ReadConsoleReply:
    return ReadConsoleReply(data=base64.b64encode(data).decode(), **more)


class Line:
    """A host's; `pieces` are told one by one, and after them nothing until the reader leaves."""

    def __init__(self, *pieces: ReadConsoleReply, ends: bool = False) -> None:
        self._pieces = pieces
        self._ends = ends
        self.told = 0
        self.left = False
        self.typed: list[bytes] = []
        self.was_asked = asyncio.Event()

    async def ask(self, question: Any, answer: Any, *, patience_s: float = 0.0) -> Any:
        self.typed.append(base64.b64decode(question.data))
        self.was_asked.set()
        return answer(written_bytes=len(self.typed[-1]))

    async def follow(self, question: Any, answer: Any) -> AsyncGenerator[Any, None]:
        try:
            for one in self._pieces:
                self.told += 1
                yield one
            if not self._ends:
                await asyncio.Event().wait()
        finally:
            self.left = True


class Client:
    """`ready` cleared: it takes nothing more. It types what is in `keys`, None for leaving."""

    def __init__(self) -> None:
        self.data = b""
        self.notices: list[ConsoleNotice] = []
        self.ready = asyncio.Event()
        self.ready.set()
        self.keys: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def show(self, data: bytes) -> None:
        await self.ready.wait()
        self.data += data

    async def notify(self, notice: ConsoleNotice) -> None:
        self.notices.append(notice)

    async def typed(self) -> bytes | None:
        return await self.keys.get()


async def allowed() -> bool:
    return True


def relay(line: Line, client: Client, **asked: Any) -> ConsoleRelay:
    return ConsoleRelay(VM, client, line, line, Terms(ConsoleOpen(**asked), SOON_S, allowed))


async def ended(made: ConsoleRelay) -> ConsoleNotice | None:
    async with asyncio.timeout(SOON_S):
        return await made.run()


async def test_the_last_words_come_after_the_news_that_it_is_off() -> None:
    line = Line(piece(state=VmState.RUNNING), piece(state=VmState.STOPPED), piece(b"Power "), piece(b"down."))
    client = Client()
    assert await ended(relay(line, client)) == ConsoleNotice(ended=ConsoleEnd.VM_OFF)
    assert client.data == b"Power down."
    assert line.left


async def test_what_was_skipped_is_told_where_it_is_missing() -> None:
    line = Line(piece(b"a", state=VmState.PAUSED), piece(b"z", skipped_bytes=24), ends=True)
    client = Client()
    assert await ended(relay(line, client)) == ConsoleNotice(ended=ConsoleEnd.VM_GONE)
    assert client.notices == [ConsoleNotice(state=VmState.PAUSED), ConsoleNotice(skipped_bytes=24)]
    assert client.data == b"az"


async def test_a_client_that_takes_nothing_is_waited_for_and_may_still_leave() -> None:
    line, client = Line(*(piece(b"x") for _ in range(100))), Client()
    client.ready.clear()
    running = asyncio.create_task(ended(relay(line, client)))
    client.keys.put_nowait(b"still typed")
    async with asyncio.timeout(SOON_S):
        await line.was_asked.wait()
    # One piece on its way, and none fetched beyond it.
    assert (line.told, client.data) == (1, b"")
    client.keys.put_nowait(None)
    assert await running is None
    assert line.left


async def test_keys_keep_their_order_and_stop_at_the_first_that_is_not_passed_on() -> None:
    class Busy(Line):
        async def ask(self, question: Any, answer: Any, *, patience_s: float = 0.0) -> Any:
            if len(self.typed) == 2:
                raise PpecError("console.busy", "in other hands")
            return await super().ask(question, answer)

    line, client = Busy(), Client()
    typed = bytes(range(256)) * 64
    client.keys.put_nowait(typed)
    made = relay(line, client)
    end = await ended(made)
    assert end is not None
    assert (end.ended, end.problem and end.problem.code) == (ConsoleEnd.PROBLEM, "console.busy")
    assert line.typed == [typed[:4096], typed[4096:8192]]
    assert made.typed_bytes == 8192


async def test_what_is_no_base64_is_the_host_s_fault() -> None:
    end = await ended(relay(Line(ReadConsoleReply(data="&&")), Client()))
    assert end is not None
    assert end.problem is not None
    assert end.problem.code == "internal.error"
