# SPDX-License-Identifier: Apache-2.0
"""Freeze and thaw on the fake hypervisor: no guest stays frozen, whoever crashes, and whatever fails."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from ppec_agentd.actions.context import Steps
from ppec_agentd.actions.delete import delete
from ppec_agentd.recovery import recover
from ppec_agentd.thaws import RECORD, Thaws
from ppec_contract.agent import FreezeVms, QueryGuests, StopVms, ThawVms
from ppec_contract.errors import PpecError
from ppec_lab.conditions import wait_until

SOON_S = 60


def freeze(*vms: Any, operation: str = "op-2", thaw_after_s: float = 600, fence: int = 1) -> FreezeVms:
    ids = tuple(vm.vm_id for vm in vms)
    return FreezeVms(operation_id=operation, fence=fence, vm_ids=ids, thaw_after_s=thaw_after_s)


def thaw(*vms: Any, operation: str = "op-3") -> ThawVms:
    return ThawVms(operation_id=operation, fence=1, vm_ids=tuple(vm.vm_id for vm in vms))


def codes(results: Any) -> list[str]:
    return [result.problem.code if result.problem else "" for result in results]


def records(agent: Any) -> list[str]:
    return sorted(path.parent.name for path in agent.context.vms_dir.glob(f"*/{RECORD}"))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON_S):
        while not condition():  # noqa: ASYNC110 - several parties, no common event
            await asyncio.sleep(0.01)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(scenario())  # type: ignore[arg-type]


def test_a_guest_is_frozen_until_it_is_thawed(settings: Any, words: Any, vm: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            one, two = vm(), vm()
            await agent.create(one, two)
            (first,) = await agent.run(freeze(one))
            assert (codes([first]), first.changed) == ([""], True)
            assert agent.hypervisor.frozen == {one.vm_id}
            assert records(agent) == [str(one.vm_id)]
            # Frozen already: the end moves, nothing else.
            (again,) = await agent.run(freeze(one, operation="op-4", thaw_after_s=300))
            assert (codes([again]), again.changed) == ([""], False)
            results = await agent.run(thaw(one, two))
            assert [(r.problem, r.changed) for r in results] == [(None, True), (None, False)]
            assert agent.hypervisor.frozen == set()
            assert records(agent) == []

    run(scenario)


@pytest.mark.parametrize("refused", [False, True])
def test_a_guest_that_began_anew_since_it_was_frozen_is_frozen_again(
    settings: Any, words: Any, vm: Any, refused: bool
) -> None:
    """The host's record alone would have it frozen, and somebody would copy disks that are written to."""

    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            one = vm()
            await agent.create(one)
            await agent.run(freeze(one))
            await agent.hypervisor.destroy(one.vm_id)
            await agent.hypervisor.start(one.vm_id)
            assert agent.hypervisor.frozen == set()
            if refused:
                agent.hypervisor.faults.fail("freeze", PpecError("guest.agent_failed", "a hook said no"))
                (failed,) = await agent.run(freeze(one, operation="op-4"))
                assert codes([failed]) == ["guest.agent_failed"]
                assert records(agent) == [str(one.vm_id)], "its end comes all the same"
                return
            (again,) = await agent.run(freeze(one, operation="op-4"))
            assert (codes([again]), again.changed) == ([""], True)
            assert agent.hypervisor.frozen == {one.vm_id}

    run(scenario)


@pytest.mark.parametrize("turns", range(1, 12))
def test_a_freeze_that_begins_as_another_ends_has_an_end_of_its_own(
    settings: Any, words: Any, vm: Any, turns: int
) -> None:
    """Begun so many turns of the event loop after a thaw: in one of them the task that waited for the end of the freeze
    before has looked for the last time and has not yet been told of as done."""

    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            one = vm()
            await agent.create(one)
            thaws = agent.context.thaws
            await thaws.thaw_after(one.vm_id, 600)
            await asyncio.sleep(0)
            # Another spelling of the VM's id, so that the record is there whenever the one before is removed.
            begun = agent.context.vms_dir / one.vm_id.hex / RECORD
            begun.parent.mkdir()
            begun.write_text(json.dumps({"thaw_at_unix_s": 1.0}))
            agent.hypervisor.frozen.add(one.vm_id)
            forgetting = asyncio.create_task(thaws.forget(one.vm_id))
            for _ in range(turns):
                await asyncio.sleep(0)
            thaws.resume()
            await forgetting
            await until(lambda: not agent.hypervisor.frozen)

    run(scenario)


def test_the_end_of_a_freeze_waits_for_no_pause_of_the_one_before(settings: Any, words: Any, vm: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            one = vm()
            await agent.create(one)
            agent.context.thaws = Thaws(agent.hypervisor, agent.context.vms_dir, again_s=600)
            agent.hypervisor.faults.fail("thaw", PpecError("guest.agent_unavailable", "no answer"))
            await agent.run(freeze(one, thaw_after_s=1))
            await until(lambda: agent.hypervisor.faults.calls("thaw") == 1)
            assert codes(await agent.run(thaw(one))) == [""]
            await agent.run(freeze(one, operation="op-4", thaw_after_s=1))
            await until(lambda: not agent.hypervisor.frozen)
            assert agent.hypervisor.faults.calls("thaw") == 3

    run(scenario)


def test_a_freeze_ends_by_itself(settings: Any, words: Any, vm: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            one = vm()
            await agent.create(one)
            await agent.run(freeze(one, thaw_after_s=1))
            assert agent.hypervisor.frozen == {one.vm_id}
            await until(lambda: not records(agent))
            assert agent.hypervisor.frozen == set()
            assert not agent.context.thaws.frozen(one.vm_id)

    run(scenario)


def test_an_end_that_was_moved_back_is_not_kept(settings: Any, words: Any, vm: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            one = vm()
            await agent.create(one)
            await agent.run(freeze(one, thaw_after_s=1))
            await agent.run(freeze(one, operation="op-4", thaw_after_s=600))
            await asyncio.sleep(1.5)
            assert agent.hypervisor.frozen == {one.vm_id}
            await agent.run(freeze(one, operation="op-5", thaw_after_s=1))
            await until(lambda: not agent.hypervisor.frozen)

    run(scenario)


@pytest.mark.parametrize("after", [False, True], ids=["refused", "answer-lost"])
@pytest.mark.parametrize("code", ["guest.agent_failed", "guest.agent_unavailable", "hypervisor.unavailable"])
def test_a_freeze_that_failed_is_thawed_all_the_same(
    settings: Any, words: Any, vm: Any, code: str, after: bool
) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            one = vm()
            await agent.create(one)
            agent.hypervisor.faults.fail("freeze", PpecError(code, "no answer"), after=after)
            (failed,) = await agent.run(freeze(one))
            assert codes([failed]) == [code]
            await until(lambda: not records(agent))
            assert agent.hypervisor.frozen == set()
            assert agent.hypervisor.faults.calls("thaw") == 1

    run(scenario)


def test_a_thaw_that_fails_is_tried_until_it_works(settings: Any, words: Any, vm: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            one = vm()
            await agent.create(one)
            agent.context.thaws = Thaws(agent.hypervisor, agent.context.vms_dir, again_s=0.01)
            for nth in (1, 2, 3):
                error = PpecError("guest.agent_unavailable", "no answer")
                agent.hypervisor.faults.fail("thaw", error, nth=nth)
            await agent.run(freeze(one, thaw_after_s=1))
            await until(lambda: not records(agent))
            assert agent.hypervisor.faults.calls("thaw") == 4
            assert agent.hypervisor.frozen == set()

    run(scenario)


def test_a_guest_paused_while_it_is_frozen_is_thawed_when_it_runs_on(settings: Any, words: Any, vm: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            one = vm()
            await agent.create(one)
            agent.context.thaws = Thaws(agent.hypervisor, agent.context.vms_dir, again_s=0.01)
            await agent.run(freeze(one, thaw_after_s=1))
            await agent.hypervisor.pause(one.vm_id)
            assert codes(await agent.run(thaw(one))) == ["vm.wrong_state"]
            await until(lambda: agent.hypervisor.faults.calls("thaw") > 2)
            assert records(agent) == [str(one.vm_id)]
            await agent.hypervisor.resume(one.vm_id)
            await until(lambda: not records(agent))
            assert agent.hypervisor.frozen == set()

    run(scenario)


def test_without_an_agent_nothing_is_left_to_thaw(words: Any, vm: Any, short_dir: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(words.settings_of(short_dir, lab={"deaf_guests": True})) as agent:
            one = vm()
            await agent.create(one)
            (refused,) = await agent.run(freeze(one))
            assert codes([refused]) == ["guest.agent_unavailable"]
            assert records(agent) == []
            await agent.run(StopVms(operation_id="op-4", fence=1, vm_ids=(one.vm_id,), timeout_s=0, force=True))
            assert codes(await agent.run(freeze(one, operation="op-5"))) == ["vm.wrong_state"]
            assert codes(await agent.run(thaw(one))) == [""]

    run(scenario)


def test_a_deleted_vm_is_thawed_by_nobody(settings: Any, words: Any, vm: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            one = vm()
            await agent.create(one)
            await agent.run(freeze(one))
            await delete(agent.context, one.vm_id, Steps(one.vm_id, one.name))
            assert not agent.context.thaws.frozen(one.vm_id)
            assert agent.hypervisor.faults.calls("thaw") == 0

    run(scenario)


def test_a_restarted_agent_goes_on_counting(settings: Any, words: Any, vm: Any) -> None:
    async def scenario() -> None:
        one, two = vm(), vm()
        async with words.open_agent(settings) as agent:
            await agent.create(one, two)
            await agent.run(freeze(one, two, thaw_after_s=600))
            await agent.context.thaws.close()
        # Time has passed for the first; the second's clock was set back by a year, and its end is near all the same.
        folders = settings.storage.vms
        (folders / str(one.vm_id) / RECORD).write_text(json.dumps({"thaw_at_unix_s": 1.0}))
        (folders / str(two.vm_id) / RECORD).write_text(json.dumps({"thaw_at_unix_s": 4e9}))
        async with words.open_agent(settings) as agent:
            agent.hypervisor.frozen |= {one.vm_id, two.vm_id}
            await recover(agent.context)
            await until(lambda: records(agent) == [str(two.vm_id)])
            assert agent.hypervisor.frozen == {two.vm_id}
            assert agent.context.thaws.frozen(two.vm_id)
            (guest,) = (await agent.service._guests.query(QueryGuests(vm_ids=(two.vm_id,)))).guests
            assert guest.frozen
            await agent.context.thaws.close()

    run(scenario)


@pytest.mark.parametrize("record", [b"", b"{", b"null", b'{"thaw_at_unix_s": "x"}', b"\xff"])
def test_a_record_that_cannot_be_read_is_an_end_that_has_come(
    settings: Any, words: Any, vm: Any, record: bytes
) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            one = vm()
            await agent.create(one)
            (agent.context.folder(one.vm_id).path / RECORD).write_bytes(record)
            agent.hypervisor.frozen.add(one.vm_id)
            await recover(agent.context)
            await until(lambda: not records(agent))
            assert agent.hypervisor.frozen == set()

    run(scenario)


def thawed_in_time(agent: Any) -> list[str]:
    return [line["vm_id"] for line in agent.log_lines() if line["event"] == "thawed_in_time"]


def test_killed_in_the_middle_of_a_freeze_the_guest_is_thawed(agent_process: Callable[..., Any], vm: Any) -> None:
    agent = agent_process(lab={"delays_s": {"freeze": 600}}).start()
    one = vm()
    create = {"operation_id": "op-1", "fence": 1, "vms": [one.model_dump(mode="json")]}
    assert agent.client().call("CreateVms", create)["parameters"]["results"][0]["changed"]
    agent.client().send("cloud.ppec.agent.FreezeVms", freeze(one).model_dump(mode="json"), more=True)
    record = agent.settings.storage.vms / str(one.vm_id) / RECORD
    wait_until(record.exists, "the end is written down before the guest is asked", timeout_s=SOON_S)
    agent.kill()
    agent.start()
    wait_until(lambda: not record.exists(), "the guest is thawed", timeout_s=SOON_S)
    # The record goes first.
    wait_until(lambda: bool(thawed_in_time(agent)), "it says so", timeout_s=SOON_S)
    assert thawed_in_time(agent) == [str(one.vm_id)]


def test_killed_after_a_freeze_its_end_comes_in_time(agent_process: Callable[..., Any], vm: Any) -> None:
    agent = agent_process().start()
    one = vm()
    create = {"operation_id": "op-1", "fence": 1, "vms": [one.model_dump(mode="json")]}
    assert agent.client().call("CreateVms", create)["parameters"]["results"][0]["changed"]
    request = freeze(one, thaw_after_s=4).model_dump(mode="json")
    assert agent.client().call("FreezeVms", request)["parameters"]["results"][0]["changed"]
    record = agent.settings.storage.vms / str(one.vm_id) / RECORD
    agent.kill()
    assert record.exists()
    agent.start()
    wait_until(lambda: not record.exists(), "the end has come", timeout_s=SOON_S)
    (again,) = agent.client().call("FreezeVms", request)["parameters"]["results"]
    assert again["replayed"]
