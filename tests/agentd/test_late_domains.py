# SPDX-License-Identifier: Apache-2.0
"""A hypervisor that finishes a call after its deadline: no domain is left of a create that was told as failed."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from ppec_agentd.actions.batch import Actions
from ppec_agentd.assembly import make_context, prepare_state
from ppec_agentd.housekeeping import Housekeeping
from ppec_agentd.hypervisor import Domain, DomainMetadata, EventKind, HypervisorEvent
from ppec_agentd.libvirt_hypervisor import LibvirtHypervisor, LibvirtOptions
from ppec_agentd.recovery import recover
from ppec_agentd.report import ReportSource
from ppec_agentd.topology import declare_topology
from ppec_contract.agent import CreateVms, ResizeVms, Stage, StopVms, VmSize, VmsReply
from ppec_contract.errors import PpecError
from ppec_contract.vm import VmState
from ppec_lab.conditions import wait_until
from ppec_lab.hypervisor_hosts import LibvirtHost
from ppec_lab.private_libvirtd import private_libvirtd

SOON_S = 60


def codes(results: Any) -> list[str]:
    return [result.problem.code if result.problem else "" for result in results]


def late_domain(one: Any, operation: str = "op-1", state: VmState = VmState.STOPPED) -> Domain:
    metadata = DomainMetadata(one.vm_id, one.name, operation, (0,), 2, 512, 16, "ab" * 32, ())
    return Domain(one.vm_id, one.name, state, 2, 512, metadata=metadata)


@pytest.mark.parametrize("step", ["define", "start"])
def test_an_undo_stays_open_until_the_late_call_has_ended(settings: Any, words: Any, vm: Any, step: str) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            one = vm()
            released = agent.hypervisor.faults.hang(step)
            (result,) = await agent.create(one)
            assert codes([result]) == ["vm.create_failed"]
            assert result.problem.details["left_behind"] == ["undefine", "remove_folder", "release"]
            for _ in range(2):
                await agent.actions.settle()
                assert (await agent.left_behind())["held"] == [one.name]
            # Whoever asks for the VM meanwhile is told to come again, and closes nothing by that.
            assert codes(await agent.create(one)) == ["hypervisor.unavailable"]
            assert codes(await agent.delete(one.vm_id, fence=2)) == ["hypervisor.unavailable"]
            released.set()
            await agent.hypervisor.wait_until_none_lingers()
            assert (await agent.left_behind())["domains"] == [one.name], "the call took effect late"
            await agent.actions.settle()
            assert await agent.left_behind() == words.nothing
            assert codes(await agent.create(one, fence=3)) == [""]
            await agent.actions.settle()
            assert (await agent.left_behind())["domains"] == [one.name]

    asyncio.run(scenario())


@pytest.mark.parametrize("asked_again", [False, True], ids=["told-once", "asked-again"])
def test_restarted_with_an_undo_open_it_undoes_even_what_runs_by_then(
    settings: Any, words: Any, vm: Any, asked_again: bool
) -> None:
    async def scenario() -> None:
        one = vm()
        async with words.open_agent(settings) as agent:
            released = agent.hypervisor.faults.hang("start")
            assert codes(await agent.create(one)) == ["vm.create_failed"]
            if asked_again:
                assert codes(await agent.create(one, fence=2)) == ["hypervisor.unavailable"]
            released.set()
            await agent.hypervisor.wait_until_none_lingers()
            assert (await agent.hypervisor.domain(one.vm_id)).state is VmState.RUNNING
        async with words.open_agent(settings) as agent:
            recovered = await recover(agent.context)
            assert recovered.undone == (str(one.vm_id),)
            assert await agent.left_behind() == words.nothing

    asyncio.run(scenario())


async def _create_cut_off(agent: Any, one: Any) -> asyncio.Event:
    """A create over whose define the connection was lost, so that nothing lingers that could be seen."""
    released: asyncio.Event = agent.hypervisor.faults.hang("define", unseen=True)
    assert codes(await agent.create(one)) == ["hypervisor.unavailable"]
    assert not any((await agent.left_behind()).values())
    return released


@pytest.mark.parametrize("deleted", [False, True], ids=["", "deleted-meanwhile"])
def test_a_domain_that_comes_after_its_undo_is_taken_back(settings: Any, words: Any, vm: Any, deleted: bool) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            one = vm()
            housekeeping = Housekeeping(agent.actions, ReportSource("h1", agent.context))
            agent.hypervisor.on_event(housekeeping.heard)
            released = await _create_cut_off(agent, one)
            if deleted:
                assert codes(await agent.delete(one.vm_id, fence=2)) == [""]
            released.set()
            await agent.hypervisor.wait_until_none_lingers()
            # The report may see it first.
            await ReportSource("h1", agent.context).build()
            assert (await agent.left_behind())["held"] == [one.name]
            await housekeeping.once()
            assert await agent.left_behind() == words.nothing

    asyncio.run(scenario())


def resize(one: Any, fence: int = 1) -> ResizeVms:
    size = VmSize(vm_id=one.vm_id, vcpus=one.vcpus, memory_mib=one.memory_mib * 2)
    return ResizeVms(operation_id="resize-1", fence=fence, sizes=(size,), timeout_s=0)


def test_a_delete_ends_only_when_no_call_can_bring_the_vm_back(settings: Any, words: Any, vm: Any) -> None:
    """A resize's new definition hangs: finished after the delete, it would define the VM anew."""

    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            one = vm()
            await agent.create(one)
            released = agent.hypervisor.faults.hang("redefine")
            assert codes(await agent.run(resize(one))) == ["hypervisor.unavailable"]
            (early,) = await agent.delete(one.vm_id, operation="op-2")
            assert codes([early]) == ["hypervisor.unavailable"]
            left = await agent.left_behind()
            assert (left["domains"], left["held"], left["folders"]) == ([], [one.name], [str(one.vm_id)])
            released.set()
            await agent.hypervisor.wait_until_none_lingers()
            assert (await agent.left_behind())["domains"] == [one.name], "the call took effect late"
            (deleted,) = await agent.delete(one.vm_id, operation="op-2")
            assert (codes([deleted]), deleted.changed, deleted.replayed) == ([""], True, False)
            assert await agent.left_behind() == words.nothing
            await agent.actions.settle()
            assert await agent.left_behind() == words.nothing

    asyncio.run(scenario())


def test_what_hangs_on_the_guest_ends_with_it_and_keeps_no_delete(settings: Any, words: Any, vm: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            one = vm()
            await agent.create(one)
            released = agent.hypervisor.faults.hang("redefine")
            assert codes(await agent.run(resize(one))) == ["hypervisor.unavailable"]
            agent.hypervisor.on_event(lambda event: released.set() if event.kind is EventKind.STOPPED else None)
            assert codes(await agent.delete(one.vm_id, operation="op-2")) == [""]
            assert await agent.left_behind() == words.nothing

    asyncio.run(scenario())


async def _deleted_and_back(agent: Any, words: Any, one: Any) -> None:
    """A VM whose deletion ended while libvirt still had a call about it over which the connection was lost."""
    await agent.create(one)
    released = agent.hypervisor.faults.hang("redefine", unseen=True)
    assert codes(await agent.run(resize(one))) == ["hypervisor.unavailable"]
    assert codes(await agent.delete(one.vm_id, operation="op-2")) == [""]
    assert await agent.left_behind() == words.nothing
    released.set()
    await agent.hypervisor.wait_until_none_lingers()
    assert (await agent.left_behind())["domains"] == [one.name]


@pytest.mark.parametrize("then", ["housekeeping", "restart", "create"])
def test_a_domain_that_comes_back_after_its_delete_is_taken_back(settings: Any, words: Any, vm: Any, then: str) -> None:
    async def scenario() -> None:
        one = vm()
        async with words.open_agent(settings) as agent:
            await _deleted_and_back(agent, words, one)
            if then == "housekeeping":
                housekeeping = Housekeeping(agent.actions, ReportSource("h1", agent.context))
                housekeeping.heard(HypervisorEvent(EventKind.DEFINED, one.vm_id, one.name))
                for _ in range(2):
                    await housekeeping.once()
                assert await agent.left_behind() == words.nothing
            if then == "create":
                assert codes(await agent.create(one, operation="op-3")) == [""]
                await agent.actions.settle()
                assert (await agent.left_behind())["domains"] == [one.name]
        if then == "restart":
            async with words.open_agent(settings) as agent:
                assert (await recover(agent.context)).late == (str(one.vm_id),)
                assert await agent.left_behind() == words.nothing

    asyncio.run(scenario())


@pytest.mark.parametrize("brought", ["running", "with-its-folder"])
def test_a_deleted_vm_that_somebody_brought_back_is_left_alone(
    settings: Any, words: Any, vm: Any, brought: str
) -> None:
    async def scenario() -> None:
        one = vm()
        async with words.open_agent(settings) as agent:
            await _deleted_and_back(agent, words, one)
            if brought == "running":
                await agent.hypervisor.start(one.vm_id)
            else:
                agent.context.folder(one.vm_id).make()
            await ReportSource("h1", agent.context).build()
            await agent.actions.settle()
            assert (await agent.left_behind())["domains"] == [one.name]
        async with words.open_agent(settings) as agent:
            assert (await recover(agent.context)).late == ()
            assert (await agent.left_behind())["domains"] == [one.name]

    asyncio.run(scenario())


def test_a_late_domain_of_another_operation_does_not_mislead_a_create(settings: Any, words: Any, vm: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            one = vm()
            released = await _create_cut_off(agent, one)
            released.set()
            await agent.hypervisor.wait_until_none_lingers()
            (made,) = await agent.create(one, operation="op-2")
            assert (codes([made]), made.changed) == ([""], True)
            assert (await agent.hypervisor.domain(one.vm_id)).metadata.operation_id == "op-2"

    asyncio.run(scenario())


def test_a_create_asked_for_again_is_not_misled_by_it(settings: Any, words: Any, vm: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            one = vm()
            released = await _create_cut_off(agent, one)
            released.set()
            await agent.hypervisor.wait_until_none_lingers()
            (again,) = await agent.create(one, fence=2)
            assert codes([again]) == [""]
            assert again.changed
            await agent.actions.settle()
            left = await agent.left_behind()
            assert left["domains"] == left["held"] == [one.name]
            assert left["folders"] == [str(one.vm_id)]

    asyncio.run(scenario())


@pytest.mark.parametrize("state", [VmState.STOPPED, VmState.RUNNING])
def test_one_that_came_while_the_agent_was_away_is_taken_back(
    settings: Any, words: Any, vm: Any, state: VmState
) -> None:
    async def scenario() -> None:
        one = vm()
        async with words.open_agent(settings) as agent:
            await _create_cut_off(agent, one)
            agent.hypervisor.make_by_hand(late_domain(one, state=state))
        async with words.open_agent(settings) as agent:
            recovered = await recover(agent.context)
            assert recovered.late == (str(one.vm_id),)
            assert await agent.left_behind() == words.nothing

    asyncio.run(scenario())


def test_one_that_comes_after_recovery_undid_its_create_is_taken_back(settings: Any, words: Any, vm: Any) -> None:
    """The agent was killed while the hypervisor had its call; the call is finished after the agent is back."""

    async def scenario() -> None:
        one = vm()
        async with words.open_agent(settings) as agent:
            released = agent.hypervisor.faults.hang("define")
            assert codes(await agent.create(one)) == ["vm.create_failed"]
            assert not released.is_set()
        async with words.open_agent(settings) as agent:
            assert (await recover(agent.context)).undone == (str(one.vm_id),)
            assert await agent.left_behind() == words.nothing
            agent.hypervisor.make_by_hand(late_domain(one))
            await agent.actions.settle()
            assert await agent.left_behind() == words.nothing

    asyncio.run(scenario())


def test_no_other_domain_is_touched(settings: Any, words: Any, vm: Any) -> None:
    """Not one whose create succeeded, whatever failed afterwards; not another operation's; not an unmanaged one."""

    async def scenario() -> None:
        standing, stopped, lost, theirs, hand, refused = (vm() for _ in range(6))
        async with words.open_agent(settings) as agent:
            assert codes(await agent.create(standing, stopped)) == ["", ""]
            # Creates of the very operation that fail later on, before they could have made anything; the journal of
            # one of the VMs is lost.
            for one in (standing, stopped):
                stop = StopVms(operation_id="op-1", fence=1, vm_ids=(one.vm_id,), timeout_s=0, force=True)
                assert codes(await agent.run(stop)) == [""]
            agent.hypervisor.faults.fail("domain", PpecError("hypervisor.unavailable", "gone"))
            assert codes(await agent.create(standing, fence=2)) == ["hypervisor.unavailable"]
            assert codes(await agent.create(stopped, fence=2)) == ["vm.exists"]
            agent.hypervisor.make_by_hand(late_domain(lost))
            assert codes(await agent.create(lost, fence=2)) == ["vm.exists"]
            # Creates that were undone, and domains that are not theirs.
            for one in (theirs, hand, refused):
                agent.hypervisor.faults.fail("define", PpecError("hypervisor.failed", "said no"))
                assert codes(await agent.create(one, fence=2)) == ["hypervisor.failed"]
            agent.hypervisor.make_by_hand(late_domain(theirs, operation="op-9"))
            agent.hypervisor.make_by_hand(replace(late_domain(hand), metadata=None))
            agent.hypervisor.make_by_hand(late_domain(refused))
            expected = sorted(one.name for one in (standing, stopped, lost, theirs, hand))
            await agent.actions.settle()
            assert sorted((await agent.left_behind())["domains"]) == expected
        async with words.open_agent(settings) as agent:
            assert (await recover(agent.context)).late == ()
            await agent.actions.settle()
            assert sorted((await agent.left_behind())["domains"]) == expected

    asyncio.run(scenario())


# --- on real libvirt --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LibvirtHost]:
    with private_libvirtd() as daemon:
        yield LibvirtHost(daemon, tmp_path_factory.mktemp("guests"), os.cpu_count() or 1)


@pytest.fixture
def host(shared_host: LibvirtHost) -> Iterator[LibvirtHost]:
    yield shared_host
    shared_host.sweep()


def _signal_libvirtd(host: LibvirtHost, number: signal.Signals) -> None:
    pid = (host.daemon.base_dir / "libvirtd.pid").read_text().strip()
    host.daemon.run("kill", f"-{int(number)}", pid)


def _names(host: LibvirtHost) -> list[str]:
    return host.virsh("list", "--all", "--name").split()


@pytest.mark.libvirt
@pytest.mark.parametrize("stage", [Stage.DEFINE, Stage.START])
def test_a_stopped_libvirtd_finishes_the_call_and_nothing_is_left(
    settings: Any, words: Any, vm: Any, host: LibvirtHost, stage: Stage
) -> None:
    async def scenario() -> None:
        journal = prepare_state(settings.storage)
        options = LibvirtOptions(
            uri=host.daemon.uri,
            domain_type="qemu",
            disk_cache="writeback",
            declared_topology=declare_topology("cores=4"),
            # For the call that is stopped, and enough for the others on a loaded machine.
            call_timeout_s=3,
            start_timeout_s=3,
        )
        hypervisor = LibvirtHypervisor(options)
        await hypervisor.open()
        context = await make_context(settings, hypervisor, journal)
        actions = Actions(context)
        one = vm(memory_mib=64, nics=[])

        def stop_at_stage(reply: VmsReply) -> None:
            if reply.progress is not None and reply.progress.stage is stage:
                _signal_libvirtd(host, signal.SIGSTOP)

        try:
            (result,) = (await actions.run(CreateVms(operation_id="op-1", fence=1, vms=(one,)), stop_at_stage)).results
            assert codes([result]) == ["vm.create_failed"]
            await actions.settle()
            assert len(context.ledger.holdings()) == 1
        finally:
            _signal_libvirtd(host, signal.SIGCONT)
        await asyncio.to_thread(
            wait_until, lambda: not hypervisor.lingers(one.vm_id), "the late call ends", timeout_s=SOON_S
        )
        assert _names(host) == [one.name], "the call took effect late"
        async with asyncio.timeout(SOON_S):
            # As often as housekeeping would: an undo that takes longer than a call may is left to the next round.
            while context.ledger.holdings():
                await actions.settle()
                await asyncio.sleep(0.05)
        assert _names(host) == []
        assert not context.folder(one.vm_id).path.exists()
        await hypervisor.close()
        journal.close()

    asyncio.run(scenario())
