# SPDX-License-Identifier: Apache-2.0
"""Drives that were swapped, used, bound or had by others since their record was written."""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import Any

import pytest

from ppec_agentd.fake_nvme import VFIO, FakeDrive
from ppec_agentd.hypervisor import Domain
from ppec_agentd.ledger import Claim
from ppec_agentd.report import ReportSource
from ppec_contract.agent import StartVms, StopVms
from ppec_contract.errors import PpecError
from ppec_contract.vm import VmState

from .agent_with_drives import (
    FREE,
    ONE,
    OUT,
    SETTLING,
    change,
    count,
    erasings,
    settle,
    states,
)


def test_another_drive_in_the_place_of_one_that_did_not_erase_is_looked_into(
    run: Any, vm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ppec_agentd.nvme.settling.ERASE_AGAIN_S", 0.0)

    async def scenario(agent: Any) -> None:
        one = vm(nvme_drives=1)
        await agent.create(one)
        agent.hypervisor.faults.fail("erase", PpecError("disk.not_erased", "it is dead"))
        await agent.delete(one.vm_id)
        await agent.context.drives.idle()
        assert states(agent)[ONE] is OUT
        agent.hypervisor.put_drive(ONE, FakeDrive(serial="S2", signature="ext4"))
        await settle(agent)
        assert agent.hypervisor.drives[ONE].signature == "ext4"
        assert states(agent)[ONE] is OUT

    run(scenario)


def test_a_vm_is_not_started_on_another_drive_which_is_nobodys_to_erase(run: Any, vm: Any) -> None:
    async def scenario(agent: Any) -> None:
        one = vm(nvme_drives=1)
        await agent.create(one)
        ids = (one.vm_id,)
        await agent.run(StopVms(operation_id="off", fence=1, vm_ids=ids, timeout_s=0, force=True))
        agent.hypervisor.put_drive(ONE, FakeDrive(serial="S2", signature="ext4"))
        (refused,) = await agent.run(StartVms(operation_id="on", fence=1, vm_ids=ids))
        assert refused.problem.code == "vm.start_failed"
        assert "another drive has come into its place" in refused.problem.detail
        await agent.delete(one.vm_id)
        await settle(agent)
        assert agent.hypervisor.drives[ONE] == FakeDrive(serial="S2", signature="ext4")
        assert states(agent)[ONE] is OUT

    run(scenario)


def test_a_drive_that_a_domain_had_between_two_rounds_is_erased(run: Any) -> None:
    """Reports follow the domains more often than drives are looked at."""

    async def scenario(agent: Any) -> None:
        source, erased = ReportSource("h1", agent.context), erasings(agent)
        pet = Domain(uuid.uuid4(), "pet", VmState.STOPPED, 1, 32, host_devices=(ONE,))
        agent.hypervisor.make_by_hand(pet)
        await agent.hypervisor.start(pet.vm_id)
        await source.follow()
        await agent.hypervisor.destroy(pet.vm_id)
        await agent.hypervisor.undefine(pet.vm_id)
        await source.follow()
        assert states(agent)[ONE] is SETTLING
        await agent.context.drives.once()
        await agent.context.drives.idle()
        assert agent.hypervisor.drives[ONE] == FakeDrive()
        assert (states(agent)[ONE], erasings(agent)) == (FREE, erased + 1)

    run(scenario)


def test_a_domain_that_had_a_drive_while_it_was_erased_has_it_erased_again(run: Any, vm: Any) -> None:
    async def scenario(agent: Any) -> None:
        one, drives = vm(nvme_drives=1), agent.context.drives
        await agent.create(one)
        erased = erasings(agent)
        claimed = Domain(uuid.uuid4(), "pet", VmState.STOPPED, 1, 32, host_devices=(ONE,))
        write = drives._records.write

        def had_meanwhile(address: str, *rest: Any) -> None:
            agent.context.ledger.adopt(claimed)
            agent.context.ledger.release(claimed.vm_id)
            write(address, *rest)

        drives._records.write = had_meanwhile
        await agent.delete(one.vm_id)
        await drives.idle()
        assert (states(agent)[ONE], erasings(agent)) == (SETTLING, erased + 1)
        drives._records.write = write
        await settle(agent)
        assert (states(agent)[ONE], erasings(agent)) == (FREE, erased + 2)

    run(scenario)


def test_a_grant_that_was_never_handed_over_stays_clean(run: Any) -> None:
    async def scenario(agent: Any) -> None:
        erased = erasings(agent)
        claim = Claim(uuid.uuid4(), "one", 2, 512, 16, (0,), nvme_drives=1)
        agent.context.ledger.reserve(claim)
        agent.context.ledger.release(claim.vm_id)
        await settle(agent)
        assert (count(agent), erasings(agent)) == ({FREE: 4}, erased)

    run(scenario)


def test_data_put_on_a_free_drive_since_the_last_look_is_seen_at_the_hand_over(run: Any, vm: Any) -> None:
    async def scenario(agent: Any) -> None:
        erased = erasings(agent)
        change(agent, ONE, signature="ext4")
        (refused,) = await agent.create(vm(nvme_drives=1))
        assert refused.problem.code == "host.no_capacity"
        assert "it was erased, and now holds data (ext4)" in refused.problem.detail
        await settle(agent)
        assert (states(agent)[ONE], erasings(agent)) == (OUT, erased)
        assert agent.hypervisor.drives[ONE].signature == "ext4"

    run(scenario)


def test_a_given_drive_that_the_host_has_used_is_nobodys_to_erase(
    run: Any, vm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ppec_agentd.nvme.settling.ERASE_AGAIN_S", 0.0)

    async def scenario(agent: Any) -> None:
        one = vm(nvme_drives=1)
        await agent.create(one)
        agent.hypervisor.faults.fail("erase", PpecError("disk.not_erased", "no answer"))
        await agent.delete(one.vm_id)
        await agent.context.drives.idle()
        change(agent, ONE, signature="ext4", used="it is mounted on /srv")
        await settle(agent)
        change(agent, ONE, used="")
        await settle(agent)
        assert states(agent)[ONE] is OUT
        assert agent.hypervisor.drives[ONE].signature == "ext4"

    run(scenario)


def test_a_dead_drive_is_not_handed_over(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the host's driver, which shows neither its namespaces nor its serial number."""

    async def scenario(agent: Any) -> None:
        drives, read = agent.context.drives, agent.hypervisor.read
        for lost in ({"serial": ""}, {"namespaces": ()}):
            monkeypatch.setattr(drives._port, "read", lambda address, lost=lost: replace(read(address), **lost))
            with pytest.raises(PpecError, match="it has not been erased"):
                await drives.hand_over("vm one", [ONE])
        monkeypatch.setattr(drives._port, "read", read)
        await drives.hand_over("vm one", [ONE])

    run(scenario)


def test_a_drive_that_somebody_else_has_bound_is_left_to_him(run: Any) -> None:
    async def scenario(agent: Any) -> None:
        erased = erasings(agent)
        change(agent, ONE, driver=VFIO)
        await settle(agent)
        assert states(agent)[ONE] is OUT
        assert "the driver vfio-pci has it" in agent.context.drives.problems[ONE]
        assert agent.hypervisor.faults.calls("reattach") == 0
        change(agent, ONE, driver="nvme")
        await settle(agent)
        assert (states(agent)[ONE], erasings(agent)) == (FREE, erased + 1)

    run(scenario)


def test_an_erasing_that_broke_is_not_begun_again_at_once(run: Any, vm: Any) -> None:
    async def scenario(agent: Any) -> None:
        one = vm(nvme_drives=1)
        await agent.create(one)
        erased = erasings(agent)
        agent.hypervisor.faults.fail("erase", RuntimeError("a bug"))
        await agent.delete(one.vm_id)
        for _ in range(2):
            await settle(agent)
        assert (states(agent)[ONE], erasings(agent)) == (OUT, erased + 1)

    run(scenario)


def test_what_stays_as_it_is_is_told_once(run: Any) -> None:
    async def scenario(agent: Any) -> None:
        told: list[dict[str, str]] = []
        agent.context.drives.on_change = lambda: told.append(dict(agent.context.drives.problems))
        change(agent, ONE, used="it is mounted on /srv")
        await settle(agent)
        change(agent, ONE, used="", signature="ext4")
        await settle(agent)
        assert "ext4" in told[-1][ONE]
        told.clear()
        for _ in range(3):
            await settle(agent)
        assert told == []
        change(agent, ONE, used="it is part of md0")
        await settle(agent)
        assert "md0" in told[-1][ONE], "the same state, and another reason"

    run(scenario)
