# SPDX-License-Identifier: Apache-2.0
"""What tests of drives on the fake hypervisor have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from ppec_agentd.hypervisor import Domain
from ppec_agentd.ledger import DriveState
from ppec_agentd.report import ReportSource

# Two near each cell; of the last the settings say nothing.
CELLS = {"0000:01:00.0": 0, "0000:02:00.0": 0, "0000:81:00.0": 1, "0000:82:00.0": 1, "0000:91:00.0": 1}
DRIVES = tuple(CELLS)[:4]
ONE, TWO, THREE, FOUR = DRIVES
FREE, HELD, SETTLING, OUT = DriveState.FREE, DriveState.HELD, DriveState.SETTLING, DriveState.OUT
Scenario = Callable[[Any], Awaitable[None]]


def states(agent: Any) -> dict[str, DriveState]:
    return dict(agent.context.ledger.drives())


def count(agent: Any) -> Counter[DriveState]:
    return Counter(states(agent).values())


async def settle(agent: Any) -> None:
    """A round of housekeeping, and all that it begins."""
    await ReportSource("h1", agent.context).follow()
    await agent.context.drives.once()
    await agent.context.drives.idle()


async def domain_of(agent: Any, vm: Any) -> Domain:
    domain = await agent.hypervisor.domain(vm.vm_id)
    assert domain is not None
    return domain


def change(agent: Any, drive: str, **changes: Any) -> None:
    agent.hypervisor.put_drive(drive, replace(agent.hypervisor.drives[drive], **changes))


def erasings(agent: Any) -> int:
    return int(agent.hypervisor.faults.calls("erase"))
