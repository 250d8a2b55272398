# SPDX-License-Identifier: Apache-2.0
"""Drives from one VM to the next, on the fake hypervisor: nobody gets one that has not settled."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from ppec_agentd.fake_nvme import VFIO, FakeDrive
from ppec_agentd.hypervisor import Domain
from ppec_agentd.ledger import Claim
from ppec_agentd.report import ReportSource
from ppec_contract.agent import ResizeVms, StartVms, StopVms, VmSize
from ppec_contract.errors import PpecError
from ppec_contract.vm import VmState

from .agent_with_drives import (
    CELLS,
    DRIVES,
    FOUR,
    FREE,
    HELD,
    ONE,
    OUT,
    SETTLING,
    THREE,
    TWO,
    count,
    domain_of,
    settle,
    states,
)


def test_drives_come_free_once_they_are_erased(run: Any) -> None:
    async def first(agent: Any) -> None:
        assert states(agent) == dict.fromkeys(DRIVES, FREE)
        assert agent.hypervisor.faults.calls("erase") == 4

    async def second(agent: Any) -> None:
        assert states(agent) == dict.fromkeys(DRIVES, FREE)
        assert agent.hypervisor.faults.calls("erase") == 0, "they were clean"

    run(first)
    run(second, settled=False)


def test_a_vm_gets_drives_near_its_cells_and_leaves_them_to_the_next_erased(run: Any, vm: Any) -> None:
    async def scenario(agent: Any) -> None:
        both = vm(cells=[0, 1], numa={"multi_cell": True}, vcpus=8, nvme_drives=3)
        (made,) = await agent.create(both)
        assert made.vm is not None
        assert Counter(CELLS[drive] for drive in made.vm.nvme_drives) == {0: 2, 1: 2}
        domain = await domain_of(agent, both)
        assert domain.host_devices == domain.metadata.nvme_drives == made.vm.nvme_drives
        assert count(agent) == {HELD: 4}
        assert [drive.driver for drive in agent.hypervisor.drives.values()] == [VFIO] * 4 + ["nvme"]
        # Until it is broken off, an erasing takes longer than the test.
        agent.hypervisor.faults.delays_s["erase"] = 3600
        await agent.delete(both.vm_id)
        assert count(agent) == {SETTLING: 4}, "nobody gets them before they have settled"
        (refused,) = await agent.create(vm(nvme_drives=1), operation="op-2")
        assert refused.problem.details["resource"] == "nvme_drives"
        await agent.context.drives.close()
        assert agent.hypervisor.drives[ONE].writers == (both.vm_id,)
        agent.hypervisor.faults.delays_s.clear()
        erased = agent.hypervisor.faults.calls("erase")
        await settle(agent)
        assert count(agent) == {FREE: 4}
        assert agent.hypervisor.faults.calls("erase") == erased + 4
        assert set(agent.hypervisor.drives.values()) == {FakeDrive()}

    run(scenario)


def test_a_round_between_grant_and_hand_over_spoils_nothing(run: Any) -> None:
    async def scenario(agent: Any) -> None:
        claim = Claim(uuid.uuid4(), "one", 2, 512, 16, (0,), nvme_drives=1)
        agent.context.ledger.reserve(claim)
        await agent.context.drives.once()
        (drive,) = agent.context.ledger.holding(claim.vm_id).drives
        await agent.context.drives.hand_over("vm one", [drive])
        with pytest.raises(PpecError, match="it has not been erased"):
            await agent.context.drives.hand_over("vm one", [drive])

    run(scenario)


def test_a_cell_without_enough_free_drives_is_a_refusal(run: Any, vm: Any) -> None:
    async def scenario(agent: Any) -> None:
        await agent.create(vm(cells=[0], nvme_drives=1))
        (refused,) = await agent.create(vm(cells=[0], nvme_drives=2), operation="op-2")
        assert refused.problem.code == "host.no_capacity"
        details = {key: refused.problem.details[key] for key in ("resource", "wanted", "free", "cells")}
        assert details == {"resource": "nvme_drives", "wanted": 2, "free": 1, "cells": [0]}
        report = await ReportSource("h1", agent.context).build()
        assert [(cell.nvme_drives, cell.nvme_drives_free) for cell in report.cells] == [(2, 1), (2, 2)]
        assert [len(vm.nvme_drives) for vm in report.vms] == [1]
        assert report.drift == ()

    run(scenario)


def test_more_drives_than_the_host_has_is_a_refusal(run: Any, vm: Any, words: Any) -> None:
    async def scenario(agent: Any) -> None:
        (refused,) = await agent.create(vm(nvme_drives=5))
        assert refused.problem.details["resource"] == "nvme_drives"
        assert await agent.left_behind() == words.nothing
        assert count(agent) == {FREE: 4}

    run(scenario)


def test_a_create_that_fails_gives_its_drives_back_and_they_are_erased(run: Any, vm: Any, words: Any) -> None:
    async def scenario(agent: Any) -> None:
        erased = agent.hypervisor.faults.calls("erase")
        for step in ("define", "start"):
            agent.hypervisor.faults.fail(step, PpecError("hypervisor.failed", "no"), after=True)
            (failed,) = await agent.create(vm(nvme_drives=2), operation=step)
            assert failed.problem.code == "hypervisor.failed"
            await settle(agent)
        assert await agent.left_behind() == words.nothing
        assert count(agent) == {FREE: 4}
        assert agent.hypervisor.faults.calls("erase") == erased + 4, "handed over, so erased"

    run(scenario)


def test_a_drive_that_the_host_has_begun_to_use_is_not_handed_over(run: Any, vm: Any) -> None:
    """It holds the host's own data then: nothing is touched, and nothing is erased when the host lets go of it."""

    async def scenario(agent: Any) -> None:
        erased = agent.hypervisor.faults.calls("erase")
        for drive in (ONE, TWO):
            agent.hypervisor.put_drive(drive, FakeDrive(used="it is mounted on /srv"))
        (refused,) = await agent.create(vm(cells=[0], nvme_drives=1))
        assert (refused.problem.code, refused.problem.details["resource"]) == ("host.no_capacity", "nvme_drives")
        assert "mounted on /srv" in refused.problem.detail
        await settle(agent)
        assert states(agent) == {ONE: OUT, TWO: OUT, THREE: FREE, FOUR: FREE}
        assert agent.context.drives.standing() == {
            **dict.fromkeys((ONE, TWO), "it is mounted on /srv"),
            **dict.fromkeys((THREE, FOUR), ""),
        }
        cells = agent.context.ledger.cells()
        assert [(cell.nvme_drives, cell.nvme_drives_free) for cell in cells] == [(0, 0), (2, 2)]
        for drive in (ONE, TWO):
            agent.hypervisor.put_drive(drive, FakeDrive(signature="ext4"))
        await settle(agent)
        assert states(agent)[ONE] is OUT
        assert "ext4" in agent.context.drives.problems[ONE]
        assert agent.hypervisor.faults.calls("erase") == erased
        agent.hypervisor.put_drive(ONE, FakeDrive())
        await settle(agent)
        assert states(agent) == {ONE: FREE, TWO: OUT, THREE: FREE, FOUR: FREE}

    run(scenario)


def test_a_drive_with_somebodys_data_is_not_erased_at_first_sight(run: Any, settings: Any, words: Any) -> None:
    async def prepare() -> None:
        async with words.open_agent(settings) as agent:
            agent.hypervisor.put_drive(ONE, FakeDrive(signature="LVM2_member"))

    async def scenario(agent: Any) -> None:
        assert states(agent)[ONE] is OUT
        assert count(agent) == {OUT: 1, FREE: 3}
        assert agent.hypervisor.drives[ONE].signature == "LVM2_member"

    asyncio.run(prepare())
    run(scenario)


def test_what_a_vm_left_on_its_drive_is_erased_whatever_it_looks_like(run: Any, vm: Any) -> None:
    async def scenario(agent: Any) -> None:
        one = vm(nvme_drives=2)
        await agent.create(one)
        for drive in (ONE, TWO):
            agent.hypervisor.put_drive(drive, replace(agent.hypervisor.drives[drive], signature="ext4"))
        await agent.delete(one.vm_id)
        await settle(agent)
        assert count(agent) == {FREE: 4}
        assert {drive.signature for drive in agent.hypervisor.drives.values()} == {""}

    run(scenario)


def test_a_drive_left_behind_by_a_crash_is_taken_back(run: Any, vm: Any) -> None:
    """libvirtd died when the domain had ended and its drive was not yet back."""

    async def before(agent: Any) -> None:
        one = vm(nvme_drives=1)
        await agent.create(one)
        agent.hypervisor.faults.fail("erase", PpecError("disk.not_erased", "killed"))
        await agent.delete(one.vm_id)
        await agent.context.drives.close()
        agent.hypervisor.put_drive(ONE, replace(agent.hypervisor.drives[ONE], driver=VFIO))

    async def after(agent: Any) -> None:
        assert agent.hypervisor.faults.calls("reattach") == 1
        assert states(agent) == dict.fromkeys(DRIVES, FREE)
        assert agent.hypervisor.drives[ONE] == FakeDrive()

    run(before)
    run(after)


def test_a_drive_that_can_not_be_erased_is_nobodys(run: Any, vm: Any) -> None:
    async def scenario(agent: Any) -> None:
        one = vm(nvme_drives=1)
        await agent.create(one)
        agent.hypervisor.faults.fail("erase", PpecError("disk.not_erased", "no answer"))
        await agent.delete(one.vm_id)
        for _ in range(2):
            await settle(agent)
        assert states(agent)[ONE] is OUT
        assert agent.context.drives.problems[ONE] == "no answer"
        assert agent.hypervisor.drives[ONE].writers == (one.vm_id,)
        (refused,) = await agent.create(vm(nvme_drives=2), operation="op-2")
        assert refused.problem.details["free"] == 1

    async def next_agent(agent: Any) -> None:
        assert count(agent) == {FREE: 4}

    run(scenario)
    run(next_agent)


def test_domains_made_by_hand_hold_the_drives_they_have(run: Any, vm: Any) -> None:
    """Known from a look, and erased when they have gone: somebody may have written there."""

    async def scenario(agent: Any) -> None:
        pet = Domain(uuid.uuid4(), "pet", VmState.STOPPED, 1, 32, host_devices=(ONE, "0000:99:00.0"))
        twin = replace(pet, vm_id=uuid.uuid4(), name="twin")
        for domain in (pet, twin):
            agent.hypervisor.make_by_hand(domain)
        await settle(agent)
        assert states(agent) == {ONE: HELD, TWO: FREE, THREE: FREE, FOUR: FREE}
        erased = agent.hypervisor.faults.calls("erase")
        await agent.hypervisor.undefine(pet.vm_id)
        await settle(agent)
        assert states(agent)[ONE] is HELD, "its twin has it still"
        await agent.hypervisor.undefine(twin.vm_id)
        await settle(agent)
        assert count(agent) == {FREE: 4}
        assert agent.hypervisor.faults.calls("erase") == erased + 1

    run(scenario)


def test_a_record_that_can_not_be_written_is_not_trusted(run: Any, settings: Any) -> None:
    """It says "clean" still, of a drive that a domain made by hand has had since."""
    in_the_way = settings.storage.drives / f".{ONE}.json.partial"

    async def scenario(agent: Any) -> None:
        in_the_way.mkdir()
        pet = Domain(uuid.uuid4(), "pet", VmState.STOPPED, 1, 32, host_devices=(ONE,))
        agent.hypervisor.make_by_hand(pet)
        await agent.hypervisor.start(pet.vm_id)
        await settle(agent)
        assert count(agent) == {HELD: 1, FREE: 3}
        assert agent.hypervisor.drives[ONE].writers == (pet.vm_id,)
        await agent.hypervisor.destroy(pet.vm_id)
        await agent.hypervisor.undefine(pet.vm_id)
        await settle(agent)
        assert agent.hypervisor.drives[ONE].writers == ()
        assert states(agent)[ONE] is OUT, "that it was erased can't be written down either"
        in_the_way.rmdir()

    async def next_agent(agent: Any) -> None:
        assert count(agent) == {FREE: 4}

    run(scenario)
    run(next_agent)


def test_a_domain_that_takes_a_drive_just_before_it_is_erased_keeps_it(run: Any, vm: Any) -> None:
    async def scenario(agent: Any) -> None:
        one = vm(nvme_drives=1)
        await agent.create(one)
        pet = Domain(uuid.uuid4(), "pet", VmState.STOPPED, 1, 32, host_devices=(ONE,))
        agent.hypervisor.make_by_hand(pet)
        await agent.delete(one.vm_id)
        await agent.context.drives.idle()
        assert agent.hypervisor.drives[ONE].writers == (one.vm_id,), "the ledger has not heard of the pet yet"
        assert states(agent)[ONE] is SETTLING
        await settle(agent)
        assert states(agent)[ONE] is HELD

    run(scenario)


def test_drives_changed_by_hand_are_told_as_drift(run: Any, vm: Any) -> None:
    async def scenario(agent: Any) -> None:
        one, two = vm(name="one", nvme_drives=1), vm(name="two", cells=[1])
        await agent.create(one, two)
        source = ReportSource("h1", agent.context)
        assert (await source.build()).drift == ()
        for spec, devices in ((one, ()), (two, (THREE,))):
            agent.hypervisor.make_by_hand(replace(await domain_of(agent, spec), host_devices=devices))
        drift = {found.name: (found.kind.value, found.before, found.after) for found in (await source.build()).drift}
        assert drift == {
            "one": ("disks", f"NVMe drives {ONE}", "no NVMe drives"),
            "two": ("disks", "no NVMe drives", f"NVMe drives {THREE}"),
        }
        assert states(agent) == {ONE: HELD, TWO: FREE, THREE: HELD, FOUR: FREE}

    run(scenario)


def test_a_vm_that_is_off_keeps_its_drives_and_is_not_started_on_one_in_use(run: Any, vm: Any) -> None:
    async def scenario(agent: Any) -> None:
        one = vm(nvme_drives=1)
        await agent.create(one)
        ids = (one.vm_id,)
        await agent.run(StopVms(operation_id="off", fence=1, vm_ids=ids, timeout_s=0, force=True))
        await settle(agent)
        kept = agent.hypervisor.drives[ONE]
        assert (kept.driver, kept.writers, states(agent)[ONE]) == ("nvme", (one.vm_id,), HELD)
        agent.hypervisor.put_drive(ONE, replace(kept, used="it is mounted on /srv"))
        (refused,) = await agent.run(StartVms(operation_id="on-1", fence=1, vm_ids=ids))
        assert refused.problem.code == "vm.start_failed"
        assert "mounted on /srv" in refused.problem.detail
        agent.hypervisor.put_drive(ONE, kept)
        (started,) = await agent.run(StartVms(operation_id="on-2", fence=1, vm_ids=ids))
        assert started.vm.nvme_drives == (ONE,)

    run(scenario)


def test_a_resize_keeps_the_drives_and_a_retune_leaves_the_vm_where_it_is(run: Any, vm: Any) -> None:
    async def scenario(agent: Any) -> None:
        one = vm(nvme_drives=2, max_vcpus=4)
        await agent.create(one)
        size = VmSize(vm_id=one.vm_id, vcpus=4, memory_mib=1024)
        (resized,) = await agent.run(ResizeVms(operation_id="op-2", fence=1, sizes=(size,), timeout_s=1))
        assert resized.problem is None
        domain = await domain_of(agent, one)
        assert domain.host_devices == domain.metadata.nvme_drives == domain.next.nvme_drives == (ONE, TWO)
        await settle(agent)
        assert count(agent) == {HELD: 2, FREE: 2}
        other = vm(cells=[1])
        await agent.create(other, operation="op-3")
        state = await ReportSource("h1", agent.context).movable()
        assert [tenant.vm_id for tenant in state.tenants] == [other.vm_id]

    run(scenario)
