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
_TO_FOLLOW = frozenset(
    {
        EventKind.DEFINED,
        EventKind.STARTED,
        EventKind.UNDEFINED,
        EventKind.STOPPED,
        EventKind.CHANGED,
        EventKind.RECONNECTED,
    }
)


class Housekeeping:
    """Runs soon after an event that says domains came or went, and every `EVERY_S`: undos may be left to do.

    Each of `chores` is called then, too; whether it is due is for itself to know. Settling and following are chores
    like the others: what one of them raises is logged, and ends neither the round nor the rounds to come.
    """

    def __init__(self, actions: Actions, source: ReportSource, chores: tuple[Chore, ...] = ()) -> None:
        self._actions = actions
        self._source = source
        self._chores = chores
        self._changed = asyncio.Event()
        self._unfollowed = False

    def heard(self, event: HypervisorEvent) -> None:
        if event.kind in _TO_FOLLOW:
            self._changed.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(EVERY_S):
                    await self._changed.wait()
            await asyncio.sleep(SETTLE_S)
            await self.once()

    async def once(self) -> None:
        """One round. A chore that fails is logged, and left to the next round."""
        # Settling first: what it removes need not be entered before.
        for chore in (self._actions.settle, self._follow, *self._chores):
            await _tried(chore)

    async def _follow(self) -> None:
        """Raises `hypervisor.unavailable`; the change is then still to be followed, soon."""
        if not (self._changed.is_set() or self._unfollowed):
            return
        self._changed.clear()
        self._unfollowed = True
        try:
            await self._source.follow()
        except PpecError:
            self._changed.set()
            raise
        self._unfollowed = False


async def _tried(chore: Chore) -> None:
    name = getattr(chore, "__qualname__", repr(chore))
    try:
        await chore()
    except PpecError as error:
        log.warning("housekeeping_failed", chore=name, code=error.code, why=error.message)
    except Exception:
        # A bug, yet one chore's: nobody would start this task again, and undos would stay undone.
        log.exception("housekeeping_broke", chore=name)
