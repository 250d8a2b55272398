# SPDX-License-Identifier: Apache-2.0
"""One client's connection: frames in, replies out in order, deadlines on both.

Calls of one connection run one after the other; while one runs nothing more is read, so a client that floods only
fills its own socket buffer. A client that goes away never cancels what it asked for: see `service.Service`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Protocol

import structlog

from ppec_agentd.peer import Peer
from ppec_contract.agent import FAILED
from ppec_contract.errors import PpecError
from ppec_contract.frames import FrameError, FrameReader, encode

log = structlog.get_logger(__name__)
READ_BYTES = 64 * 1024
_CALL_FIELDS = frozenset({"method", "parameters", "more", "oneway", "upgrade"})


@dataclass(frozen=True, slots=True)
class Call:
    """A well-formed Varlink call."""

    method: str
    parameters: dict[str, Any]
    more: bool = False
    oneway: bool = False


@dataclass(frozen=True, slots=True)
class Reply:
    """One Varlink reply; `error` is its name, None for success."""

    parameters: dict[str, Any]
    continues: bool = False
    error: str | None = None

    def frame(self) -> bytes:
        message: dict[str, Any] = {"parameters": self.parameters}
        if self.error is not None:
            message["error"] = self.error
        if self.continues:
            message["continues"] = True
        return encode(message)

    @classmethod
    def failed(cls, error: PpecError) -> Reply:
        return cls(error.problem().model_dump(mode="json"), error=FAILED)


class Answering(Protocol):
    """What the connection asks for answers: see `service.Service`."""

    def answer(self, call: Call) -> AsyncIterator[Reply]:
        """One or more replies; all but the last continue, and only if the call said `more`."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds: for a frame once begun, for the next one to begin, for a reply to be taken."""

    frame_s: float
    idle_s: float
    write_s: float


def read_call(message: dict[str, Any]) -> Call:
    """Raises PpecError `request.malformed`: a frame that is JSON and still no Varlink call."""
    method, parameters = message.get("method"), message.get("parameters", {})
    flags = [message.get(name, False) for name in ("more", "oneway", "upgrade")]
    well_formed = (
        isinstance(method, str)
        and isinstance(parameters, dict)
        and all(isinstance(flag, bool) for flag in flags)
        and message.keys() <= _CALL_FIELDS
    )
    if not well_formed or flags[2] or (flags[0] and flags[1]):
        raise PpecError(
            "request.malformed",
            "the frame is not a Varlink call this agent takes",
            hint="Send method, parameters, and at most one of more and oneway.",
            subject="frame",
        )
    return Call(str(method), parameters, more=flags[0], oneway=flags[1])


class Connection:
    """Serves one client until it leaves, breaks the framing, or keeps the agent waiting."""

    def __init__(
        self, streams: tuple[asyncio.StreamReader, asyncio.StreamWriter], service: Answering, deadlines: Deadlines
    ) -> None:
        self._reader, self._writer = streams
        self._service = service
        self._deadlines = deadlines
        self._frames = FrameReader()
        self._leaving = False
        self.answering = False

    def leave(self) -> None:
        """Takes no more calls: ends when the answer under way, if any, is given."""
        self._leaving = True

    async def serve(self, peer: Peer) -> None:
        try:
            while (messages := await self._next_messages()) is not None:
                for message in messages:
                    self.answering = True
                    await self._answer(message)
                    self.answering = False
                    if self._leaving:
                        return
        except FrameError as error:
            # Out of step: one last word, then the end.
            log.warning("frame_refused", code=error.code, reason=error.message, uid=peer.uid, pid=peer.pid)
            with contextlib.suppress(ConnectionError, TimeoutError):
                await self._send(Reply.failed(error))
        except TimeoutError:
            log.warning("client_too_slow", uid=peer.uid, pid=peer.pid)
        except ConnectionError:
            log.debug("client_left", uid=peer.uid, pid=peer.pid)

    async def refuse(self, error: PpecError) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError):
            await self._send(Reply.failed(error))

    async def _next_messages(self) -> list[dict[str, Any]] | None:
        """The next frames, at least one; None at the end of the stream."""
        idle = self._frames.pending_bytes == 0
        async with asyncio.timeout(self._deadlines.idle_s if idle else self._deadlines.frame_s) as deadline:
            while True:
                data = await self._reader.read(READ_BYTES)
                if not data:
                    return None
                if messages := self._frames.feed(data):
                    return messages
                if idle:
                    # The frame has begun: from here it has its own time, however slowly the bytes drip.
                    idle = False
                    deadline.reschedule(asyncio.get_running_loop().time() + self._deadlines.frame_s)

    async def _answer(self, message: dict[str, Any]) -> None:
        try:
            call = read_call(message)
        except PpecError as error:
            await self._send(Reply.failed(error))
            return
        async with contextlib.aclosing(self._service.answer(call)) as replies:  # type: ignore[type-var]
            async for reply in replies:
                if not call.oneway:
                    await self._send(reply)

    async def _send(self, reply: Reply) -> None:
        self._writer.write(reply.frame())
        async with asyncio.timeout(self._deadlines.write_s):
            await self._writer.drain()
