# SPDX-License-Identifier: Apache-2.0
"""The agent killed at every journal write and every call of the hypervisor, by action: nothing leaks, nothing is lost.

What is checked after each crash stands in crash_points.py; here are the actions, and what each of them may leave.
Resize's are in test_resize_crashes.py, a retune's in retune/test_retune_host.py.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from ppec_contract.agent import (
    CreateVms,
    DeleteVms,
    PauseVms,
    RebootVms,
    ResetVms,
    ResumeVms,
    StartVms,
    StopVms,
    WriteCall,
)
from ppec_contract.vm import VmState

OFF, ON, PAUSED = VmState.STOPPED, VmState.RUNNING, VmState.PAUSED


@pytest.fixture
def settings(memory_dir: Path, words: Any) -> Any:
    return words.settings_with_pool(memory_dir)


def journal_kinds(action: str) -> set[str]:
    return {f"journal: {action} intent", f"journal: {action} answer"}


async def states(agent: Any) -> dict[str, VmState]:
    return {domain.name: domain.state for domain in await agent.hypervisor.domains()}


def one_of(*allowed: dict[str, VmState]) -> Callable[[Any], Awaitable[None]]:
    """All VMs of the host are as in one of these."""

    async def check(agent: Any) -> None:
        assert await states(agent) in allowed

    return check


def assert_enumerated(found: Any, methods: set[str], action: str) -> None:
    """Each kind of point was there, with all its phases, and each state led to recoveries of its own."""
    assert found.kinds == methods | journal_kinds(action)
    for kind in found.kinds:
        counted = {phase: found.counted[kind, phase] for phase in ("before", "after", "torn")}
        assert counted["before"] == counted["after"] > 0
        assert (counted["torn"] >= 3 * counted["before"]) == kind.startswith("journal")
    assert found.recoveries > len(found.distinct()) > 5


def test_create(settings: Any, words: Any, tiny_vm: Any) -> None:
    """Two at a time, one with its disk in a pool: one may stand while of the other nothing is left."""
    neighbour, one, two = tiny_vm("neighbour", pool="fast"), tiny_vm("one"), tiny_vm("two", cells=[1], pool="fast")

    async def prepare(agent: Any) -> Callable[[int], WriteCall]:
        await agent.create(neighbour, operation="before")
        return lambda fence: CreateVms(operation_id="op-1", fence=fence, vms=(one, two))

    async def some(agent: Any) -> None:
        found = await states(agent)
        assert set(found.values()) == {ON}
        assert {"neighbour"} <= set(found) <= {"neighbour", "one", "two"}

    done = one_of({"neighbour": ON, "one": ON, "two": ON})
    found = words.crash_everywhere(words.crash_scenario(settings, prepare, some, done))
    assert_enumerated(found, {"domain", "disk", "define", "start"}, "CreateVms")
    assert found.counted["define", "after"] == found.counted["start", "after"] == 2


def test_delete(settings: Any, words: Any, tiny_vm: Any) -> None:
    neighbour, one, two = tiny_vm("neighbour"), tiny_vm("one", pool="fast"), tiny_vm("two", cells=[1])

    async def prepare(agent: Any) -> Callable[[int], WriteCall]:
        await agent.create(neighbour, one, two, operation="before")
        ids = (one.vm_id, two.vm_id)
        return lambda fence: DeleteVms(operation_id="op-1", fence=fence, vm_ids=ids)

    async def some(agent: Any) -> None:
        found = await states(agent)
        assert set(found.values()) == {ON}
        assert {"neighbour"} <= set(found) <= {"neighbour", "one", "two"}

    found = words.crash_everywhere(words.crash_scenario(settings, prepare, some, one_of({"neighbour": ON})))
    assert_enumerated(found, {"domain", "destroy", "undefine"}, "DeleteVms")
    assert found.counted["undefine", "after"] == 2


DRIVES = {f"0000:0{number}:00.0": number // 4 for number in range(1, 6)}


@pytest.fixture
def settings_with_drives(memory_dir: Path, words: Any) -> Any:
    return words.settings_of(memory_dir, nvme={"drives": list(DRIVES)}, lab={"nvme_drives": DRIVES})


def test_create_with_drives(settings_with_drives: Any, words: Any, tiny_vm: Any) -> None:
    """One that was handed over and not used is erased all the same, whenever the agent dies."""
    neighbour, one = tiny_vm("neighbour", nvme_drives=1), tiny_vm("one", nvme_drives=2)

    async def prepare(agent: Any) -> Callable[[int], WriteCall]:
        await agent.context.drives.once()
        await agent.context.drives.idle()
        await agent.create(neighbour, operation="before")
        return lambda fence: CreateVms(operation_id="op-1", fence=fence, vms=(one,))

    async def some(agent: Any) -> None:
        assert {"neighbour"} <= set(await states(agent)) <= {"neighbour", "one"}

    done = one_of({"neighbour": ON, "one": ON})
    found = words.crash_everywhere(words.crash_scenario(settings_with_drives, prepare, some, done))
    assert_enumerated(found, {"domain", "disk", "define", "start"}, "CreateVms")


def test_delete_with_drives(settings_with_drives: Any, words: Any, tiny_vm: Any) -> None:
    """Killed while a drive is being erased, too: before its record says so, and after."""
    neighbour, one = tiny_vm("neighbour", nvme_drives=1), tiny_vm("one", nvme_drives=2)

    async def prepare(agent: Any) -> Callable[[int], WriteCall]:
        await agent.context.drives.once()
        await agent.context.drives.idle()
        await agent.create(neighbour, one, operation="before")
        return lambda fence: DeleteVms(operation_id="op-1", fence=fence, vm_ids=(one.vm_id,))

    async def some(agent: Any) -> None:
        assert {"neighbour"} <= set(await states(agent)) <= {"neighbour", "one"}

    found = words.crash_everywhere(words.crash_scenario(settings_with_drives, prepare, some, one_of({"neighbour": ON})))
    assert {"erase", "domains"} <= found.kinds
    assert found.counted["erase", "before"] == found.counted["erase", "after"] == 2


def stop_by(timeout_s: float, *, force: bool) -> Callable[[int, tuple[UUID, ...]], WriteCall]:
    return lambda fence, ids: StopVms(operation_id="op-1", fence=fence, vm_ids=ids, timeout_s=timeout_s, force=force)


def by_ids(call: type[WriteCall], **more: Any) -> Callable[[int, tuple[UUID, ...]], WriteCall]:
    return lambda fence, ids: call(operation_id="op-1", fence=fence, vm_ids=ids, **more)  # type: ignore[call-arg]


# The call, the state it begins in and the one it ends in, and the method of the hypervisor that it is about.
POWER = {
    "start": (by_ids(StartVms), OFF, ON, "start"),
    "stop": (stop_by(5, force=False), ON, OFF, "shutdown"),
    "stop-by-force": (stop_by(0, force=True), ON, OFF, "destroy"),
    "reboot": (by_ids(RebootVms, timeout_s=5), ON, ON, "reboot"),
    "reset": (by_ids(ResetVms), ON, ON, "reset"),
    "pause": (by_ids(PauseVms), ON, PAUSED, "pause"),
    "resume": (by_ids(ResumeVms), PAUSED, ON, "resume"),
}


@pytest.mark.parametrize("action", POWER)
def test_power(settings: Any, words: Any, tiny_vm: Any, action: str) -> None:
    call, begins, ends, method = POWER[action]
    neighbour, one = tiny_vm("neighbour"), tiny_vm("one")

    async def prepare(agent: Any) -> Callable[[int], WriteCall]:
        await agent.create(neighbour, one, operation="before")
        if begins is OFF:
            await agent.run(StopVms(operation_id="off", fence=1, vm_ids=(one.vm_id,), timeout_s=0, force=True))
        if begins is PAUSED:
            await agent.run(PauseVms(operation_id="off", fence=1, vm_ids=(one.vm_id,)))
        return lambda fence: call(fence, (one.vm_id,))

    before, after = {"neighbour": ON, "one": begins}, {"neighbour": ON, "one": ends}
    scenario = words.crash_scenario(settings, prepare, one_of(before, after), one_of(after))
    found = words.crash_everywhere(scenario)
    assert_enumerated(found, {"domain", method}, type(call(0, (one.vm_id,))).__name__)
    assert found.counted[method, "after"] == 1
