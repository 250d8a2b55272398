# SPDX-License-Identifier: Apache-2.0
"""Create, delete, start and stop on the fake hypervisor: results, streams, and nothing left behind by a failure."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ppec_contract.agent import Stage, StartVms, StopVms
from ppec_contract.errors import PpecError
from ppec_contract.vm import VmState


def codes(results: Any) -> list[str]:
    return [result.problem.code if result.problem else "" for result in results]


def test_a_batch_runs_and_streams_each_vm(settings: Any, words: Any, vm: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            vms = [vm() for _ in range(4)]
            results = await agent.create(*vms)
            assert [r.name for r in results] == [v.name for v in vms]
            assert all(r.changed and r.vm.state is VmState.RUNNING for r in results)
            pins = [pin.pcpu for r in results for pin in r.vm.pins]
            assert len(pins) == len(set(pins)) == 8
            assert set(results[0].stage_ms) == {
                Stage.ADMITTED, Stage.IMAGE, Stage.DISK, Stage.SEED, Stage.DEFINE, Stage.START,
            }  # fmt: skip
            streamed = [reply.results[0].vm_id for reply in agent.emitted if reply.results]
            assert sorted(streamed) == sorted(v.vm_id for v in vms)
            left = await agent.left_behind()
            assert (left["cores"], left["memory_mib"], left["disk_mib"]) == (4, 2048, 64)

            deleted = await agent.delete(*(v.vm_id for v in vms), operation="op-2")
            assert all(r.changed and r.vm is None and r.problem is None for r in deleted)
            assert await agent.left_behind() == words.nothing

    asyncio.run(scenario())


STEPS = ["domain", "define", "start"]


@pytest.mark.parametrize("after", [False, True], ids=["refused", "answer-lost"])
@pytest.mark.parametrize("step", STEPS)
def test_a_create_that_fails_at_any_step_leaves_nothing(
    settings: Any, words: Any, vm: Any, step: str, after: bool
) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            error = PpecError("hypervisor.failed", "said no")
            agent.hypervisor.faults.fail(step, error, after=after)
            one = vm()
            (result,) = await agent.create(one)
            assert codes([result]) == ["hypervisor.failed"]
            assert not result.changed
            assert await agent.left_behind() == words.nothing
            # The failure is repeated at the same fence, and tried again at a higher one.
            (again,) = await agent.create(one)
            assert again.replayed
            assert codes([again]) == ["hypervisor.failed"]
            (higher,) = await agent.create(one, fence=2)
            assert codes([higher]) == [""]
            assert not higher.replayed

    asyncio.run(scenario())


def test_what_cannot_be_undone_yet_is_undone_later(settings: Any, words: Any, vm: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            agent.hypervisor.faults.fail("start", PpecError("hypervisor.unavailable", "gone"), after=True)
            agent.hypervisor.faults.fail("destroy", PpecError("hypervisor.unavailable", "gone"))
            one = vm()
            (result,) = await agent.create(one)
            assert codes([result]) == ["vm.create_failed"]
            assert result.problem.details["left_behind"] == ["undefine", "remove_folder", "release"]
            left = await agent.left_behind()
            assert left["domains"] == left["held"] == [one.name]  # in use still, so counted still
            await agent.actions.settle()
            assert await agent.left_behind() == words.nothing
            (again,) = await agent.create(one)
            assert codes([again]) == [""]

    asyncio.run(scenario())


def test_one_vms_failure_is_its_own(settings: Any, words: Any, vm: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            good, no_bridge, too_large, small_disk = (
                vm(),
                vm(nics=[{"mac": "52:54:00:ff:ff:ff", "bridge": "br9"}]),
                vm(vcpus=16),
                vm(image={"sha256": "0" * 64}),
            )
            results = await agent.create(good, no_bridge, too_large, small_disk)
            assert codes(results) == ["", "host.bridge_missing", "vm.exceeds_socket", "image.checksum_mismatch"]
            left = await agent.left_behind()
            assert left["domains"] == left["held"] == [good.name]
            assert left["folders"] == [str(good.vm_id)]

    asyncio.run(scenario())


def test_admission_refuses_with_wanted_and_free(settings: Any, words: Any, vm: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            (refused,) = await agent.create(vm(memory_mib=8193))
            assert refused.problem.code == "host.no_capacity"
            assert refused.problem.details["wanted"] == 8193
            assert refused.problem.details["free"] == 8192
            results = await agent.create(*(vm() for _ in range(6)), operation="op-2")
            assert sorted(codes(results)) == ["", "", "", "", "host.no_capacity", "host.no_capacity"]

    asyncio.run(scenario())


def test_names_and_ids_are_given_once(settings: Any, words: Any, vm: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            first = vm(name="web")
            await agent.create(first)
            same_name, same_id = vm(name="web"), vm(name="other", vm_id=first.vm_id)
            assert codes(await agent.create(same_name, operation="op-2")) == ["vm.exists"]
            assert codes(await agent.create(same_id, operation="op-3")) == ["vm.exists"]
            with pytest.raises(PpecError, match="names a VM twice"):
                await agent.create(vm(name="a"), vm(name="a"), operation="op-4")
            left = await agent.left_behind()
            assert left["domains"] == ["web"]

    asyncio.run(scenario())


def test_a_domain_made_by_hand_is_never_touched(settings: Any, words: Any, vm: Any) -> None:
    from ppec_agentd.hypervisor import Domain

    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            one = vm(name="web")
            agent.hypervisor.make_by_hand(Domain(one.vm_id, "web", VmState.RUNNING, 2, 512))
            assert codes(await agent.create(one)) == ["vm.exists"]
            assert codes(await agent.delete(one.vm_id, operation="op-2")) == ["vm.wrong_state"]
            stop = StopVms(operation_id="op-3", fence=1, vm_ids=(one.vm_id,), timeout_s=0)
            assert codes(await agent.run(stop)) == ["vm.wrong_state"]
            assert (await agent.hypervisor.domain(one.vm_id)).state is VmState.RUNNING

    asyncio.run(scenario())


def test_a_crashed_vm_is_off_and_no_guest_is_waited_for(settings: Any, words: Any, vm: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            one = vm()
            await agent.create(one)
            agent.hypervisor.crash(one.vm_id)
            async with asyncio.timeout(60):
                (stopped,) = await agent.run(StopVms(operation_id="op-2", fence=1, vm_ids=(one.vm_id,), timeout_s=600))
            assert (codes([stopped]), stopped.changed) == ([""], False)

    asyncio.run(scenario())


def test_stop_asks_then_waits_then_does_as_told(words: Any, vm: Any, short_dir: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(words.settings_of(short_dir, lab={"deaf_guests": True})) as agent:
            one = vm()
            await agent.create(one)

            def stop(operation: str, force: bool = False) -> StopVms:
                return StopVms(operation_id=operation, fence=1, vm_ids=(one.vm_id,), timeout_s=0.05, force=force)

            assert codes(await agent.run(stop("op-2"))) == ["vm.stop_timeout"]
            # "Try again" failures of a stop are tried again, not replayed.
            (again,) = await agent.run(stop("op-2"))
            assert codes([again]) == ["vm.stop_timeout"]
            assert not again.replayed
            (forced,) = await agent.run(stop("op-3", force=True))
            assert forced.changed
            assert forced.vm.state is VmState.STOPPED
            (still,) = await agent.run(stop("op-4"))
            assert not still.changed
            # Stopped, it keeps what it holds.
            assert (await agent.left_behind())["cores"] == 1
            (started,) = await agent.run(StartVms(operation_id="op-5", fence=1, vm_ids=(one.vm_id,)))
            assert started.changed
            assert started.vm.state is VmState.RUNNING

    asyncio.run(scenario())


def test_a_repeat_joins_the_work_under_way(words: Any, vm: Any, short_dir: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(words.settings_of(short_dir, lab={"delays_s": {"start": 0.2}})) as agent:
            one = vm()
            first, second = await asyncio.gather(agent.create(one), agent.create(one, fence=2))
            assert first == second
            assert agent.hypervisor.faults.calls("start") == 1
            (third,) = await agent.create(one, fence=2)
            assert third.replayed
            assert third.vm == first[0].vm
            with pytest.raises(PpecError) as fenced:
                await agent.create(one, fence=1)
            assert fenced.value.code == "operation.fenced"

    asyncio.run(scenario())


def test_a_create_that_arrives_after_its_delete_is_refused(settings: Any, words: Any, vm: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            one = vm()
            (gone,) = await agent.delete(one.vm_id)
            assert not gone.changed
            assert codes(await agent.create(one)) == ["operation.fenced"]
            assert await agent.left_behind() == words.nothing
            assert codes(await agent.create(one, fence=2)) == [""]
            assert codes(await agent.delete(one.vm_id, fence=2)) == [""]
            (after,) = await agent.create(one, fence=3)
            assert not after.replayed
            assert after.changed

    asyncio.run(scenario())


def test_a_delete_waits_for_the_create_it_undoes(words: Any, vm: Any, short_dir: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(words.settings_of(short_dir, lab={"delays_s": {"start": 0.2}})) as agent:
            one = vm()
            creating = asyncio.create_task(agent.create(one))
            while not agent.hypervisor.faults.calls("start"):  # noqa: ASYNC110 - the fake has no event for it
                await asyncio.sleep(0.01)
            (deleted,) = await agent.delete(one.vm_id, fence=2)
            assert deleted.changed
            assert codes(await creating) == [""]
            assert await agent.left_behind() == words.nothing

    asyncio.run(scenario())
