# SPDX-License-Identifier: Apache-2.0
"""Housekeeping outlives its chores: what breaks one ends neither the others nor the rounds to come."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from structlog.testing import capture_logs

from ppec_agentd.housekeeping import Housekeeping
from ppec_agentd.hypervisor import Domain, EventKind, HypervisorEvent
from ppec_agentd.report import ReportSource
from ppec_agentd.settings import Settings
from ppec_contract.errors import PpecError

SOON_S = 60


class Chores:
    """One that raises, and one after it; `rounds` counts both."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.rounds = {"breaks": 0, "works": 0}
        self.worked = asyncio.Event()

    async def breaks(self) -> None:
        self.rounds["breaks"] += 1
        raise self.error

    async def works(self) -> None:
        self.rounds["works"] += 1
        self.worked.set()


class BrokenOnceSource(ReportSource):
    """Its first following breaks."""

    follows = 0

    async def follow(self) -> tuple[Domain, ...]:
        self.follows += 1
        if self.follows == 1:
            raise ValueError("a domain nobody thought of")
        return await super().follow()


@pytest.mark.parametrize(
    ("error", "logged"),
    [
        (ValueError("cannot fit 'int' into an offset-sized integer"), ("housekeeping_broke", "error")),
        (OSError("Invalid argument"), ("housekeeping_broke", "error")),
        (PpecError("hypervisor.unavailable", "no answer"), ("housekeeping_failed", "warning")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_chore_that_raises_ends_neither_the_others_nor_the_next_rounds(
    settings: Settings, words: Any, error: Exception, logged: tuple[str, str]
) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            chores = Chores(error)
            source = ReportSource("h1", agent.context)
            housekeeping = Housekeeping(agent.actions, source, (chores.breaks, chores.works))
            running = asyncio.create_task(housekeeping.run())
            for _ in range(2):
                chores.worked.clear()
                housekeeping.heard(HypervisorEvent(EventKind.RECONNECTED))
                await asyncio.wait(
                    [running, worked := asyncio.create_task(chores.worked.wait())],
                    timeout=SOON_S,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                assert not running.done(), running
                assert worked.done()
            assert chores.rounds == {"breaks": 2, "works": 2}
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running

    with capture_logs() as logs:
        asyncio.run(scenario())
    told = [entry for entry in logs if entry["event"].startswith("housekeeping_")]
    assert [(entry["event"], entry["log_level"]) for entry in told] == [logged] * 2
    assert {entry["chore"] for entry in told} == {"Chores.breaks"}
    assert all(entry.get("exc_info", False) is (logged[1] == "error") for entry in told)


def test_a_change_whose_following_broke_is_followed_in_the_next_round(settings: Settings, words: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            chores = Chores(ValueError("unused"))
            source = BrokenOnceSource("h1", agent.context)
            housekeeping = Housekeeping(agent.actions, source, (chores.works,))
            housekeeping.heard(HypervisorEvent(EventKind.DEFINED))
            for _ in range(3):
                await housekeeping.once()
            assert source.follows == 2, "broken, followed, and then nothing was left to follow"
            assert chores.rounds["works"] == 3

    asyncio.run(scenario())
