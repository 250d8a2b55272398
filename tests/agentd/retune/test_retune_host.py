# SPDX-License-Identifier: Apache-2.0
"""Carrying a plan out on the fake hypervisor: whole, or taken back; and after a crash at any of its calls."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from ppec_agentd.connection import Call
from ppec_agentd.journal import Key
from ppec_agentd.recovery import recover
from ppec_contract.agent import ResizeVms, RetuneHost, Stage
from ppec_contract.errors import PpecError
from ppec_contract.retune import RetunePlan
from ppec_contract.vm import VmState

# Three cells of four cores: to open cell 0 its VM needs the place of the one in cell 1, which has to leave first.
CHAIN = {"lab": {"topology": "sockets=3,cores=4,memory_mib=8192", "bridges": ["br0"]}}
CALLS = ("domain", "reseat", "annotate", "redefine")
# Each VM is looked at once before anything is moved; a look that fails then is answered as it is.
LOOKS = 2
AWAY = PpecError("hypervisor.unavailable", "gone")

Scenario = Callable[[Any], Awaitable[None]]


def run(words: Any, short_dir: Path, scenario: Scenario, **changes: Any) -> None:
    async def main() -> None:
        async with words.open_agent(words.settings_of(short_dir, **(changes or CHAIN))) as agent:
            await scenario(agent)

    asyncio.run(main())


async def chain(agent: Any, vm: Any) -> RetunePlan:
    """`big` fills cell 0, `small` and `mid` sit in cells 1 and 2; the plan to open cell 0."""
    vms = [
        vm("big", vcpus=4, cells=[0]),
        vm("small", vcpus=2, cells=[1], memory_mib=256),
        vm("mid", vcpus=2, cells=[2]),
    ]
    assert all(result.problem is None for result in await agent.create(*vms))
    plan = await planned(agent, want={"cells": [0]})
    assert [(move.name, move.before.cell, move.after.cell) for move in plan.moves] == [("small", 1, 2), ("big", 0, 1)]
    return plan


async def planned(agent: Any, **parameters: Any) -> RetunePlan:
    replies = [r async for r in agent.service.answer(Call("cloud.ppec.agent.PlanRetune", parameters))]
    assert replies[-1].error is None, replies[-1]
    return RetunePlan.model_validate(replies[-1].parameters["plan"], strict=False)


def call(plan: RetunePlan, operation: str = "retune-1", fence: int = 1) -> RetuneHost:
    return RetuneHost(operation_id=operation, fence=fence, plan=plan)


async def seats(agent: Any) -> dict[str, tuple[int, ...]]:
    """The cells of each VM, once everything that says where it is says the same, and nobody shares a core."""
    domains = await agent.hypervisor.domains()
    assert agent.context.ledger.audit(domains) == ()
    pcpus = [pin.pcpu for domain in domains for pin in domain.pins]
    assert len(pcpus) == len(set(pcpus))
    seen = {}
    for domain in domains:
        held = agent.context.ledger.holding(domain.vm_id)
        assert not held.pending
        assert domain.state is VmState.RUNNING
        assert domain.metadata.pins == domain.pins == held.plan.pins
        assert domain.metadata.cells == domain.memory_cells == held.plan.cells
        assert set(held.memory_by_cell_mib) == set(held.plan.cells)
        seen[domain.name] = domain.memory_cells
    totals = agent.context.ledger.totals()
    assert totals.cores - totals.cores_free == 8
    assert totals.memory_mib - totals.memory_free_mib == 512 + 256 + 512
    return seen


BEFORE = {"big": (0,), "small": (1,), "mid": (2,)}
AFTER = {"big": (1,), "small": (2,), "mid": (2,)}


def test_a_plan_is_carried_out_in_its_order_and_a_large_vm_fits(short_dir: Path, words: Any, vm: Any) -> None:
    async def scenario(agent: Any) -> None:
        plan = await chain(agent, vm)
        small, big = await agent.run(call(plan))
        assert (small.name, big.name) == ("small", "big")
        assert small.changed
        assert big.changed
        assert big.vm.cells == (1,)
        assert await seats(agent) == AFTER
        reseated = [r.progress.name for r in agent.emitted if r.progress and r.progress.stage is Stage.RESEAT]
        assert reseated == ["small", "big"]
        assert all(result.vm_id != UUID(int=0) for reply in agent.emitted for result in reply.results)
        (large,) = await agent.create(vm("large", vcpus=4, cells=[0]), operation="op-2")
        assert large.problem is None

    run(words, short_dir, scenario)


def test_a_repeated_call_moves_nothing_again(short_dir: Path, words: Any, vm: Any) -> None:
    async def scenario(agent: Any) -> None:
        plan = await chain(agent, vm)
        await agent.run(call(plan))
        calls = agent.hypervisor.faults.calls("reseat")
        assert all(result.replayed and result.changed for result in await agent.run(call(plan)))
        assert not any(result.changed for result in await agent.run(call(plan, "retune-2")))
        assert agent.hypervisor.faults.calls("reseat") == calls

    run(words, short_dir, scenario)


@pytest.mark.parametrize("after", [False, True], ids=["refused", "answer-lost"])
@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("method", CALLS)
def test_a_move_that_fails_takes_back_those_before_it(
    short_dir: Path, words: Any, vm: Any, method: str, nth: int, after: bool
) -> None:
    async def scenario(agent: Any) -> None:
        plan = await chain(agent, vm)
        begun = LOOKS if method == "domain" else 0
        agent.hypervisor.faults.fail(method, PpecError("hypervisor.failed", "said no"), nth=begun + nth, after=after)
        results = await agent.run(call(plan))
        assert {result.problem.code for result in results} == {"retune.failed"}
        assert results[0].problem.details == {"code": "hypervisor.failed", "stayed": []}
        assert await seats(agent) == BEFORE
        assert all(result.vm.cells == BEFORE[result.name] and result.observed_at for result in results), "it says where"
        again = await agent.run(call(plan, fence=2))
        assert [result.problem for result in again] == [None, None]
        assert await seats(agent) == AFTER

    run(words, short_dir, scenario)


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("method", CALLS)
def test_what_cannot_be_taken_back_keeps_both_places_until_it_is_settled(
    short_dir: Path, words: Any, vm: Any, method: str, nth: int
) -> None:
    async def scenario(agent: Any) -> None:
        plan = await chain(agent, vm)
        agent.hypervisor.faults.fail(method, AWAY, nth=nth + (LOOKS if method == "domain" else 0), after=True)
        agent.hypervisor.faults.fail("domain", AWAY, nth=LOOKS + nth + 1)
        await agent.run(call(plan))
        held = {h.name: h for h in agent.context.ledger.holdings()}
        open_names = {h.name for h in held.values() if h.pending}
        assert open_names
        with pytest.raises(PpecError) as refused:
            agent.context.ledger.resize(held[min(open_names)].vm_id, 2, 512)
        assert refused.value.code == "vm.wrong_state"
        await agent.actions.settle()
        assert agent.context.open_seats == {}
        assert set((await seats(agent)).items()) <= set(BEFORE.items()) | set(AFTER.items())
        again = await agent.run(call(plan, fence=2))
        assert [result.problem for result in again] == [None, None]
        assert await seats(agent) == AFTER

    run(words, short_dir, scenario)


def test_a_crash_at_any_point_leaves_each_vm_in_one_place_and_the_rest_can_be_done(
    memory_dir: Path, words: Any, tiny_vm: Any
) -> None:
    async def prepare(agent: Any) -> Callable[[int], RetuneHost]:
        plan = await chain(agent, tiny_vm)
        return lambda fence: call(plan, fence=fence)

    async def recovered(agent: Any) -> None:
        where = await seats(agent)
        assert where["mid"] == (2,)
        assert (where["small"], where["big"]) in (((1,), (0,)), ((2,), (0,)), ((2,), (1,)))

    async def done(agent: Any) -> None:
        assert await seats(agent) == AFTER

    settings = words.settings_of(memory_dir, **CHAIN)
    found = words.crash_everywhere(words.crash_scenario(settings, prepare, recovered, done))
    assert found.kinds == {*CALLS, *(f"journal: RetuneHost {step}" for step in ("intent", "answer", "abandoned"))}
    for kind in found.kinds:
        assert found.counted[kind, "before"] == found.counted[kind, "after"] > 0
        assert (found.counted[kind, "torn"] > 0) == kind.startswith("journal")
    assert found.counted["reseat", "after"] == 2
    assert found.recoveries > 10


def test_a_vm_that_is_off_is_moved_in_its_definition(short_dir: Path, words: Any, vm: Any) -> None:
    async def scenario(agent: Any) -> None:
        plan = await chain(agent, vm)
        small = plan.moves[0].vm_id
        await agent.hypervisor.destroy(small)
        assert all(result.problem is None for result in await agent.run(call(plan)))
        assert agent.hypervisor.faults.calls("reseat") == 1
        await agent.hypervisor.start(small)
        assert await seats(agent) == AFTER

    run(words, short_dir, scenario)


def test_a_host_that_has_moved_on_refuses_the_plan_and_changes_nothing(short_dir: Path, words: Any, vm: Any) -> None:
    async def scenario(agent: Any) -> None:
        plan = await chain(agent, vm)
        await agent.delete(plan.moves[0].vm_id, operation="op-9")
        results = await agent.run(call(plan))
        assert {result.problem.code for result in results} == {"retune.outdated"}
        # Somebody took the cores that `big` was to have.
        (taken,) = await agent.create(vm("late", vcpus=4, cells=[1]), operation="op-10")
        assert taken.problem is None
        rest = RetunePlan(opened=(0,), moves=plan.moves[1:], before=plan.before, after=plan.after)
        (refused,) = await agent.run(call(rest, "retune-2"))
        assert refused.problem.code == "retune.failed"
        assert refused.problem.details["code"] == "vm.wrong_state"
        assert agent.hypervisor.faults.calls("reseat") == 0

    run(words, short_dir, scenario)


def test_a_plan_made_up_by_its_caller_is_checked_like_any(short_dir: Path, words: Any, vm: Any) -> None:
    """Pins on another VM's cores, outside the cell, on CPUs there are not, or two vCPUs on one CPU."""

    async def scenario(agent: Any) -> None:
        plan = await chain(agent, vm)
        small = plan.moves[0]
        for number, pcpus in enumerate([(0, 1), (9, 3), (99, 98), (9, 9)]):
            pins = [{"vcpu": vcpu, "pcpu": pcpu} for vcpu, pcpu in enumerate(pcpus)]
            wrong = small.model_copy(update={"after": type(small.after)(cell=2, pins=pins)})
            (result,) = await agent.run(call(plan.model_copy(update={"moves": (wrong,)}), f"wrong-{number}"))
            assert result.problem.code == "retune.failed", pcpus
            assert result.problem.details["code"] in ("request.invalid", "vm.wrong_state")
            assert await seats(agent) == BEFORE

    run(words, short_dir, scenario)


def test_a_plan_that_names_the_journals_id_of_the_host_is_refused(short_dir: Path, words: Any, vm: Any) -> None:
    """It would have waited for itself for ever, and every retune after it as well."""

    async def scenario(agent: Any) -> None:
        plan = await chain(agent, vm)
        wrong = plan.model_copy(update={"moves": (plan.moves[0].model_copy(update={"vm_id": UUID(int=0)}),)})
        with pytest.raises(PpecError, match="no VM has this id") as refused:
            await asyncio.wait_for(agent.run(call(wrong)), 60)
        assert refused.value.code == "request.invalid"
        assert all(result.problem is None for result in await agent.run(call(plan)))
        assert await seats(agent) == AFTER

    run(words, short_dir, scenario)


def test_two_retunes_at_once_take_turns(short_dir: Path, words: Any, vm: Any) -> None:
    async def scenario(agent: Any) -> None:
        plan = await chain(agent, vm)
        agent.hypervisor.faults.delays_s["reseat"] = 0.05
        both = await asyncio.gather(agent.run(call(plan)), agent.run(call(plan, "retune-2")))
        assert sorted(results[0].changed for results in both) == [False, True]
        assert await seats(agent) == AFTER

    run(words, short_dir, scenario)


def test_a_vm_that_waits_for_another_size_stays(short_dir: Path, words: Any, vm: Any) -> None:
    async def scenario(agent: Any) -> None:
        plan = await chain(agent, vm)
        small = plan.moves[0].vm_id
        sizes = [{"vm_id": str(small), "vcpus": 2, "memory_mib": 128}]
        (resized,) = await agent.run(
            ResizeVms.model_validate_json(json.dumps({"operation_id": "resize-1", "fence": 1, "sizes": sizes}))
        )
        assert resized.resized.memory_mib == "next_start", resized
        results = await agent.run(call(plan))
        assert {result.problem.code for result in results} == {"retune.outdated"}
        assert agent.hypervisor.faults.calls("reseat") == 0
        # There is another way, around it.
        around = await planned(agent, want={"cells": [0]})
        assert [(move.name, move.after.cell) for move in around.moves] == [("mid", 1), ("big", 2)]
        assert all(result.problem is None for result in await agent.run(call(around, "retune-2")))

    run(words, short_dir, scenario)


def test_a_move_back_that_cannot_be_taken_back_either_is_settled_later(short_dir: Path, words: Any, vm: Any) -> None:
    """The first leg stands when the second is refused; its move back fails half-way, and so does the undo of that."""

    async def scenario(agent: Any) -> None:
        plan = await chain(agent, vm)
        there = plan.moves[0]
        nowhere = [{"vcpu": vcpu, "pcpu": pcpu} for vcpu, pcpu in enumerate((98, 99))]
        on = there.model_copy(update={"before": there.after, "after": type(there.after)(cell=1, pins=nowhere)})
        agent.hypervisor.faults.fail("reseat", AWAY, nth=2, after=True)
        agent.hypervisor.faults.fail("reseat", AWAY, nth=3)
        (result, *_) = await agent.run(call(plan.model_copy(update={"moves": (there, on)})))
        assert (result.problem.code, result.problem.details["stayed"]) == ("retune.failed", ["small"])
        assert set(agent.context.open_seats) == {there.vm_id}
        await agent.actions.settle()
        assert await seats(agent) == {"big": (0,), "small": (2,), "mid": (2,)}

    run(words, short_dir, scenario)


@pytest.mark.parametrize("broken", [1, 2], ids=["once", "and-its-undo"])
@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("method", CALLS)
def test_a_fault_of_ours_leaves_no_leg_pending(
    short_dir: Path, words: Any, vm: Any, method: str, nth: int, broken: int
) -> None:
    """As it would any other failure, the agent takes it back; or knows that it has not, and does so later."""

    async def scenario(agent: Any) -> None:
        plan = await chain(agent, vm)
        begun = LOOKS if method == "domain" else 0
        for n in range(broken):
            bug = ZeroDivisionError("a fault of ours")
            agent.hypervisor.faults.fail(method, bug, nth=begun + nth + n, after=True)
        results = await agent.run(call(plan))
        assert {result.problem.code for result in results} == {"retune.failed"}
        pending = {held.vm_id for held in agent.context.ledger.holdings() if held.pending}
        assert set(agent.context.open_seats) == pending
        assert {entry.key for entry in agent.context.journal.in_flight()} == set(agent.context.open_seats.values())
        assert bool(pending) == (broken == 2)
        await agent.actions.settle()
        assert (agent.context.open_seats, agent.context.journal.in_flight()) == ({}, ())
        assert set((await seats(agent)).items()) <= set(BEFORE.items()) | set(AFTER.items())
        again = await agent.run(call(plan, fence=2))
        assert [result.problem for result in again] == [None, None]
        assert await seats(agent) == AFTER

    run(words, short_dir, scenario)


def test_one_that_breaks_while_it_is_settled_keeps_no_other_waiting(short_dir: Path, words: Any, vm: Any) -> None:
    async def scenario(agent: Any) -> None:
        plan = await chain(agent, vm)
        keys = {move.vm_id: Key("retune-1", "RetuneHost", str(move.vm_id)) for move in plan.moves}
        agent.context.journal.append_intents("retune-1", 1, [(key, "") for key in keys.values()])
        agent.context.open_seats |= keys
        agent.hypervisor.faults.fail("reseat", ZeroDivisionError("a fault of ours"))
        await agent.actions.settle()
        assert set(agent.context.open_seats) == {next(iter(keys))}
        await agent.actions.settle()
        assert (agent.context.open_seats, agent.context.journal.in_flight()) == ({}, ())
        assert await seats(agent) == BEFORE

    run(words, short_dir, scenario)


def test_a_deleted_vm_has_no_seat_to_settle(short_dir: Path, words: Any, vm: Any) -> None:
    async def scenario(agent: Any) -> None:
        plan = await chain(agent, vm)
        for nth in (1, 2):
            agent.hypervisor.faults.fail("reseat", AWAY, nth=nth, after=True)
        await agent.run(call(plan))
        (open_id,) = agent.context.open_seats
        assert [result.problem for result in await agent.delete(open_id, operation="op-9")] == [None]
        assert (agent.context.open_seats, agent.context.journal.in_flight()) == ({}, ())

    run(words, short_dir, scenario)


def test_an_agent_that_ends_in_mid_move_finds_it_again(short_dir: Path, words: Any, vm: Any) -> None:
    """It does not wait for ever for work under way: what it breaks off is left to the next agent's recovery."""
    settings = words.settings_of(short_dir, **CHAIN)

    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            plan = await chain(agent, vm)
            agent.hypervisor.faults.delays_s["annotate"] = 600
            asked = asyncio.create_task(agent.run(call(plan)))
            async with asyncio.timeout(60):
                while not agent.hypervisor.faults.calls("annotate"):  # noqa: ASYNC110 - no event tells
                    await asyncio.sleep(0.01)
            for task in asyncio.all_tasks():
                if task.get_name().startswith("RetuneHost"):
                    task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked
            broken_off = {entry.key.vm_id for entry in agent.context.journal.in_flight()}
            assert {str(move.vm_id) for move in plan.moves} <= broken_off
        async with words.open_agent(settings) as agent:
            await recover(agent.context)
            assert await seats(agent) == BEFORE
            assert agent.context.journal.in_flight() == ()

    asyncio.run(scenario())


def test_a_move_that_ends_late_keeps_both_places_until_then(short_dir: Path, words: Any, vm: Any) -> None:
    async def scenario(agent: Any) -> None:
        plan = await chain(agent, vm)
        big = plan.moves[1].vm_id
        late = agent.hypervisor.faults.hang("reseat", nth=2)
        results = await agent.run(call(plan))
        assert {result.problem.code for result in results} == {"retune.failed"}
        await agent.actions.settle()
        assert agent.context.ledger.holding(big).pending, "it may be moved yet"
        late.set()
        await agent.hypervisor.wait_until_none_lingers()
        await agent.actions.settle()
        assert (await seats(agent))["big"] == (0,)

    run(words, short_dir, scenario)


def test_a_vm_whose_resize_is_still_to_be_taken_back_stays(short_dir: Path, words: Any, vm: Any) -> None:
    """Its old definition, which it gets back later, has its old pins."""

    async def scenario(agent: Any) -> None:
        plan = await chain(agent, vm)
        small = plan.moves[0].vm_id
        await agent.hypervisor.destroy(small)
        agent.hypervisor.faults.fail("redefine", AWAY, after=True)
        agent.hypervisor.faults.fail("redefine", AWAY, nth=2)
        sizes = [{"vm_id": str(small), "vcpus": 2, "memory_mib": 128}]
        resize = ResizeVms.model_validate_json(json.dumps({"operation_id": "resize-1", "fence": 1, "sizes": sizes}))
        (failed,) = await agent.run(resize)
        assert failed.problem.code == "hypervisor.unavailable"
        results = await agent.run(call(plan))
        assert {result.problem.code for result in results} == {"retune.outdated"}
        await agent.actions.settle()
        await agent.hypervisor.start(small)
        assert await seats(agent) == BEFORE

    run(words, short_dir, scenario)


def test_a_vm_that_will_not_be_moved_keeps_no_agent_from_serving(short_dir: Path, words: Any, vm: Any) -> None:
    async def scenario(agent: Any) -> None:
        plan = await chain(agent, vm)
        move = plan.moves[0]
        key = Key("retune-1", "RetuneHost", str(move.vm_id))
        agent.context.journal.append_intents("retune-1", 1, [(key, move.name)])
        agent.hypervisor.faults.fail("reseat", PpecError("hypervisor.failed", "said no"))
        await recover(agent.context)
        assert agent.context.open_seats == {move.vm_id: key}
        await agent.actions.settle()
        assert (agent.context.open_seats, agent.context.journal.in_flight()) == ({}, ())
        assert await seats(agent) == BEFORE

    run(words, short_dir, scenario)


def test_vms_do_not_trade_places(short_dir: Path, words: Any, vm: Any) -> None:
    """No plan of the host's own has it: the first would be on the second's cores until that has left."""

    async def scenario(agent: Any) -> None:
        plan = await chain(agent, vm)
        small = plan.moves[0]
        (there,) = [held for held in agent.context.ledger.holdings() if held.name == "mid"]
        mid = type(small.after)(cell=2, pins=there.plan.pins)
        trade = (
            small.model_copy(update={"after": mid}),
            small.model_copy(
                update={"vm_id": there.vm_id, "name": "mid", "before": mid, "after": small.before, "memory_mib": 512}
            ),
        )
        results = await agent.run(call(plan.model_copy(update={"moves": trade})))
        assert {(result.problem.code, result.problem.details["code"]) for result in results} == {
            ("retune.failed", "vm.wrong_state")
        }
        assert agent.hypervisor.faults.calls("reseat") == 0
        assert await seats(agent) == BEFORE

    run(words, short_dir, scenario)
