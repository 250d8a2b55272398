# SPDX-License-Identifier: Apache-2.0
"""What the agent does unasked: follow domains that others change, take back what a create left behind, and chores."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import structlog

from ppec_agentd.actions.batch import Actions
from ppec_agentd.hypervisor import EventKind, HypervisorEvent
from ppec_agentd.report import ReportSource
from ppec_contract.errors import PpecError

log = structlog.get_logger(__name__)
Chore = Callable[[], Awaitable[None]]
EVERY_S = 30.0
# Events come in bursts; the ledger follows when a burst is over.
SETTLE_S = 0.5


class Housekeeping:
    """Runs soon after an event that says domains came or went, and every `EVERY_S`: undos may be left to do.

    Each `chores` is called then, too; whether it is due is for itself to know.
    """

    def __init__(self, actions: Actions, source: ReportSource, chores: tuple[Chore, ...] = ()) -> None:
        self._actions = actions
        self._source = source
        self._chores = chores
        self._changed = asyncio.Event()

    def heard(self, event: HypervisorEvent) -> None:
        if event.kind in (EventKind.DEFINED, EventKind.STARTED, EventKind.UNDEFINED, EventKind.RECONNECTED):
            self._changed.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(EVERY_S):
                    await self._changed.wait()
            await asyncio.sleep(SETTLE_S)
            try:
                await self.once()
            except PpecError as error:
                log.warning("housekeeping_failed", code=error.code, why=error.message)

    async def once(self) -> None:
        """Raises `hypervisor.unavailable`; the change is then still to be followed."""
        # First: what settling removes need not be entered before.
        await self._actions.settle()
        if self._changed.is_set():
            self._changed.clear()
            try:
                await self._source.follow()
            except PpecError:
                self._changed.set()
                raise
        for chore in self._chores:
            await chore()
