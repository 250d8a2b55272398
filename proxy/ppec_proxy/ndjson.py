# SPDX-License-Identifier: Apache-2.0
"""A response of lines, sent as they come."""

from __future__ import annotations

import asyncio

from starlette.types import Send

from ppec_contract.agent import NDJSON


class NdjsonResponse:
    """Writes lines to a client for as long as it takes them.

    A client that has gone is uvicorn's to ignore. One that has stopped reading would hold the writer up: after
    `stall_timeout_s` its lines are dropped, and what it got ends without the last reply, which it can tell.
    """

    def __init__(self, send: Send, stall_timeout_s: float) -> None:
        self._send = send
        self._stall_timeout_s = stall_timeout_s
        self._stalled = False

    @property
    def stalled(self) -> bool:
        """Whether the client has stopped reading: nothing more reaches it."""
        return self._stalled

    async def start(self) -> None:
        headers = [(b"content-type", NDJSON.encode()), (b"cache-control", b"no-store")]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def line(self, line: bytes) -> None:
        if self._stalled:
            return
        try:
            async with asyncio.timeout(self._stall_timeout_s):
                await self._send({"type": "http.response.body", "body": line, "more_body": True})
        except TimeoutError:
            self._stalled = True

    async def end(self) -> None:
        if not self._stalled:
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})
