# SPDX-License-Identifier: Apache-2.0
"""Resize on the fake: what is live, what waits, what is held meanwhile, refusals, undo, and a crash at every call."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from ppec_agentd.hypervisor import Domain
from ppec_contract.agent import Effect, ResizeVms, StartVms, StopVms, VmResult, VmSize
from ppec_contract.errors import PpecError
from ppec_contract.vm import Size, VmState
from ppec_lab.conditions import wait_until

NOW, LATER, SAME = Effect.NOW, Effect.NEXT_START, Effect.UNCHANGED
GROWS = {"max_vcpus": 6, "max_memory_mib": 2048}


def size_of(vm_id: UUID, vcpus: int, memory_mib: int, fence: int = 1) -> ResizeVms:
    size = VmSize(vm_id=vm_id, vcpus=vcpus, memory_mib=memory_mib)
    return ResizeVms(operation_id=f"resize-{fence}", fence=fence, sizes=(size,), timeout_s=0)


async def resized(agent: Any, vm_id: UUID, vcpus: int, memory_mib: int, fence: int = 1) -> VmResult:
    (result,) = await agent.run(size_of(vm_id, vcpus, memory_mib, fence))
    assert isinstance(result, VmResult)
    return result


async def restart(agent: Any, vm_id: UUID) -> None:
    stop = StopVms(operation_id="stop", fence=9, vm_ids=(vm_id,), timeout_s=0, force=True)
    start = StartVms(operation_id="start", fence=9, vm_ids=(vm_id,))
    for request in (stop, start):
        (result,) = await agent.run(request)
        assert result.problem is None, result.problem


def code(result: VmResult) -> str:
    return "" if result.problem is None else result.problem.code


def effects(result: VmResult) -> tuple[Effect, Effect]:
    assert result.problem is None, result.problem
    assert result.resized is not None
    return result.resized.vcpus, result.resized.memory_mib


def held(agent: Any, vm_id: UUID) -> tuple[int, int, int]:
    """vCPUs, whole CPUs and memory that the ledger has for the VM; nothing is pending there."""
    holding = agent.context.ledger.holding(vm_id)
    assert holding.before is None
    return holding.vcpus, len(holding.cpus), holding.memory_mib


async def seen(agent: Any, vm_id: UUID) -> Domain:
    domain = await agent.hypervisor.domain(vm_id)
    assert domain is not None
    return domain


async def assert_all_agree(agent: Any) -> None:
    """Ledger and metadata hold the larger of what runs and what starts next, and no CPU has two owners."""
    domains = await agent.hypervisor.domains()
    for domain in domains:
        later = domain.next or domain.metadata
        wanted = (max(domain.vcpus, later.vcpus), max(domain.memory_mib, later.memory_mib))
        assert (domain.metadata.vcpus, domain.metadata.memory_mib) == wanted
        vcpus, _, memory_mib = held(agent, domain.vm_id)
        assert (vcpus, memory_mib) == wanted
        assert domain.metadata.pending == ((domain.vcpus, domain.memory_mib) != (later.vcpus, later.memory_mib))
        granted = agent.context.ledger.holding(domain.vm_id).plan.pins
        assert domain.metadata.pins == granted
        assert later.pins == granted[: later.vcpus]
        assert domain.pins == granted[: domain.vcpus]
    taken = [cpu for holding in agent.context.ledger.holdings() for cpu in holding.cpus]
    assert len(taken) == len(set(taken))
    assert agent.context.ledger.audit(domains) == ()


def run_with_agent(settings: Any, words: Any, scenario: Callable[[Any], Any]) -> None:
    async def whole() -> None:
        async with words.open_agent(settings) as agent:
            await scenario(agent)

    asyncio.run(whole())


def test_within_its_maxima_it_grows_at_once(settings: Any, words: Any, vm: Any) -> None:
    async def scenario(agent: Any) -> None:
        one = vm(**GROWS)
        (made,) = await agent.create(one)
        assert (made.vm.max_vcpus, made.vm.max_memory_mib, made.vm.pending) == (6, 2048, None)
        result = await resized(agent, one.vm_id, 4, 768)
        assert effects(result) == (NOW, NOW)
        assert result.changed
        info = result.vm
        assert info is not None
        assert (info.vcpus, info.memory_mib, info.pending) == (4, 768, None)
        assert info.pins[:2] == made.vm.pins
        assert len({pin.pcpu for pin in info.pins}) == 4
        assert held(agent, one.vm_id) == (4, 4, 768)
        await assert_all_agree(agent)
        again = await resized(agent, one.vm_id, 4, 768, fence=2)
        assert (again.changed, effects(again)) == (False, (SAME, SAME))
        await restart(agent, one.vm_id)
        domain = await seen(agent, one.vm_id)
        assert (domain.vcpus, domain.memory_mib, domain.max_vcpus) == (4, 768, 6)
        await assert_all_agree(agent)

    run_with_agent(settings, words, scenario)


def test_beyond_its_maxima_it_waits_and_holds_from_now_on(settings: Any, words: Any, vm: Any) -> None:
    async def scenario(agent: Any) -> None:
        one = vm()
        await agent.create(one)
        result = await resized(agent, one.vm_id, 4, 1024)
        assert effects(result) == (LATER, LATER)
        assert result.vm is not None
        assert (result.vm.vcpus, result.vm.memory_mib) == (2, 512)
        assert result.vm.pending == Size(vcpus=4, memory_mib=1024)
        assert held(agent, one.vm_id) == (4, 4, 1024)
        await assert_all_agree(agent)
        # Changed its mind: what was held for it is given back.
        back = await resized(agent, one.vm_id, 2, 512, fence=2)
        assert back.changed
        assert (back.vm.pending, held(agent, one.vm_id)) == (None, (2, 2, 512))  # type: ignore[union-attr]
        await resized(agent, one.vm_id, 4, 1024, fence=3)
        await restart(agent, one.vm_id)
        domain = await seen(agent, one.vm_id)
        assert (domain.vcpus, domain.memory_mib, domain.next) == (4, 1024, None)
        await assert_all_agree(agent)

    run_with_agent(settings, words, scenario)


@pytest.mark.parametrize("odd_mib", [64, 100])
def test_memory_that_is_not_whole_blocks_waits(settings: Any, words: Any, vm: Any, odd_mib: int) -> None:
    async def scenario(agent: Any) -> None:
        one = vm(**GROWS)
        await agent.create(one)
        assert effects(await resized(agent, one.vm_id, 4, 512 + odd_mib)) == (NOW, LATER)
        assert held(agent, one.vm_id) == (4, 4, 512 + odd_mib)
        await assert_all_agree(agent)

    run_with_agent(settings, words, scenario)


def test_a_guest_that_lets_go_shrinks_at_once_and_memory_at_its_next_start(settings: Any, words: Any, vm: Any) -> None:
    async def scenario(agent: Any) -> None:
        one = vm(vcpus=4, memory_mib=1024, max_vcpus=4)
        await agent.create(one)
        result = await resized(agent, one.vm_id, 2, 512)
        assert effects(result) == (NOW, LATER)
        assert result.vm.pending == Size(vcpus=2, memory_mib=512)  # type: ignore[union-attr]
        assert held(agent, one.vm_id) == (2, 2, 1024), "what it still has is not given away"
        await assert_all_agree(agent)
        await agent.actions.settle()
        assert held(agent, one.vm_id) == (2, 2, 1024)
        await restart(agent, one.vm_id)
        assert held(agent, one.vm_id) == (2, 2, 512)
        assert agent.context.unfit != {}
        await agent.actions.settle()
        assert agent.context.unfit == {}
        await assert_all_agree(agent)

    run_with_agent(settings, words, scenario)


def test_a_deaf_guest_keeps_its_vcpus_until_it_starts_anew(short_dir: Path, words: Any, vm: Any) -> None:
    async def scenario(agent: Any) -> None:
        one = vm(vcpus=4, max_vcpus=6)
        await agent.create(one)
        # One grows while the other waits: the ledger has the larger of each.
        result = await resized(agent, one.vm_id, 2, 1024)
        assert effects(result) == (LATER, LATER)
        assert held(agent, one.vm_id) == (4, 4, 1024)
        await assert_all_agree(agent)
        # Started behind the agent's back: housekeeping gives back what is gone.
        await agent.hypervisor.destroy(one.vm_id)
        await agent.hypervisor.start(one.vm_id)
        await agent.actions.settle()
        assert held(agent, one.vm_id) == (2, 2, 1024)
        await assert_all_agree(agent)

    run_with_agent(words.settings_of(short_dir, lab={"deaf_guests": True}), words, scenario)


def test_a_guest_that_obeys_later_is_believed_later(short_dir: Path, words: Any, vm: Any) -> None:
    async def scenario(agent: Any) -> None:
        one = vm(vcpus=4, max_vcpus=4)
        await agent.create(one)
        assert effects(await resized(agent, one.vm_id, 2, 512)) == (LATER, SAME)
        domain = await seen(agent, one.vm_id)
        agent.hypervisor.make_by_hand(replace(domain, vcpus=2, pins=domain.pins[:2]))
        await agent.actions.settle()
        domain = await seen(agent, one.vm_id)
        assert (domain.next, held(agent, one.vm_id)) == (None, (2, 2, 512))
        await assert_all_agree(agent)

    run_with_agent(words.settings_of(short_dir, lab={"deaf_guests": True}), words, scenario)


def test_a_guest_that_lets_go_of_one_after_the_other_is_followed(short_dir: Path, words: Any, vm: Any) -> None:
    """With three vCPUs it holds what four take: an odd number is none that a VM can be given."""

    async def scenario(agent: Any) -> None:
        one = vm(vcpus=6, max_vcpus=6)
        await agent.create(one)
        assert effects(await resized(agent, one.vm_id, 2, 512)) == (LATER, SAME)
        for left, holds in ((5, 6), (4, 4), (3, 4)):
            domain = await seen(agent, one.vm_id)
            agent.hypervisor.make_by_hand(replace(domain, vcpus=left, pins=domain.pins[:left]))
            await agent.actions.settle()
            domain = await seen(agent, one.vm_id)
            assert (domain.metadata.vcpus, held(agent, one.vm_id)) == (holds, (holds, holds, 512))  # type: ignore[union-attr]
            assert agent.context.ledger.audit([domain]) == ()
        # Asked again while there are three.
        again = await resized(agent, one.vm_id, 2, 512, fence=2)
        assert (effects(again), again.vm.vcpus) == ((LATER, SAME), 3)  # type: ignore[union-attr]
        domain = await seen(agent, one.vm_id)
        agent.hypervisor.make_by_hand(replace(domain, vcpus=2, pins=domain.pins[:2]))
        await agent.actions.settle()
        assert held(agent, one.vm_id) == (2, 2, 512)
        await assert_all_agree(agent)

    run_with_agent(words.settings_of(short_dir, lab={"deaf_guests": True}), words, scenario)


def test_a_vm_that_is_off_has_its_new_size_at_once(settings: Any, words: Any, vm: Any) -> None:
    async def scenario(agent: Any) -> None:
        one = vm(vcpus=4)
        await agent.create(one)
        await agent.run(StopVms(operation_id="stop", fence=1, vm_ids=(one.vm_id,), timeout_s=0, force=True))
        for fence, (vcpus, memory_mib) in enumerate(((6, 256), (2, 4096)), start=1):
            result = await resized(agent, one.vm_id, vcpus, memory_mib, fence)
            assert effects(result) == (NOW, NOW)
            assert (result.vm.vcpus, result.vm.memory_mib) == (vcpus, memory_mib)  # type: ignore[union-attr]
            assert held(agent, one.vm_id) == (vcpus, vcpus, memory_mib)
            await assert_all_agree(agent)

    run_with_agent(settings, words, scenario)


CHANGING = ("annotate", "redefine", "set_vcpus", "grow_memory")


@pytest.mark.parametrize(
    ("refusal", "wanted", "details"),
    [
        ("vm.exceeds_socket", (10, 512), {"wanted": 10}),
        ("host.no_capacity", (8, 512), {"resource": "vcpus"}),
        ("host.no_capacity", (2, 8192), {"resource": "memory_mib"}),
        ("request.invalid", (2, 513), {}),
    ],
)
def test_a_refusal_changes_nothing(
    short_dir: Path, words: Any, vm: Any, refusal: str, wanted: tuple[int, int], details: dict[str, Any]
) -> None:
    async def scenario(agent: Any) -> None:
        neighbour, one = vm(vcpus=4, memory_mib=1024), vm(vcpus=2)
        if refusal == "request.invalid":
            one = vm(vcpus=2, numa={"huge_page_kib": 2048})
        for result in await agent.create(neighbour, one):
            assert code(result) == ""
        before = (held(agent, one.vm_id), agent.context.ledger.totals(), await agent.hypervisor.domains())
        result = await resized(agent, one.vm_id, *wanted)
        assert code(result) == refusal
        assert result.problem is not None
        assert details.items() <= result.problem.details.items()
        if refusal == "host.no_capacity":
            assert result.problem.details["wanted"] > result.problem.details["free"]
        assert (held(agent, one.vm_id), agent.context.ledger.totals(), await agent.hypervisor.domains()) == before
        assert [agent.hypervisor.faults.calls(method) for method in CHANGING] == [0, 0, 0, 0]

    topology = "sockets=2,cores=4,threads=2,memory_mib=8192"
    if refusal == "request.invalid":
        topology += ",huge_2m=1024"
    run_with_agent(words.settings_of(short_dir, lab={"topology": topology}), words, scenario)


def test_wrong_states_and_strangers(settings: Any, words: Any, vm: Any) -> None:
    async def scenario(agent: Any) -> None:
        one, pet = vm(), uuid4()
        await agent.create(one)
        agent.hypervisor.make_by_hand(Domain(pet, "pet", VmState.RUNNING, 2, 256))
        await agent.hypervisor.pause(one.vm_id)
        assert code(await resized(agent, one.vm_id, 4, 512)) == "vm.wrong_state"
        assert code(await resized(agent, pet, 4, 512)) == "vm.wrong_state"
        assert code(await resized(agent, uuid4(), 4, 512)) == "vm.not_found"
        with pytest.raises(ValueError, match="odd"):
            size_of(one.vm_id, 3, 512)
        twice = VmSize(vm_id=one.vm_id, vcpus=2, memory_mib=512)
        with pytest.raises(PpecError, match="twice"):
            await agent.run(ResizeVms(operation_id="op-9", fence=1, sizes=(twice, twice)))

    run_with_agent(settings, words, scenario)


@pytest.mark.parametrize("after", [False, True], ids=["refused", "answer-lost"])
@pytest.mark.parametrize("method", CHANGING)
def test_what_fails_is_taken_back(settings: Any, words: Any, vm: Any, method: str, after: bool) -> None:
    async def scenario(agent: Any) -> None:
        one = vm(**GROWS)
        await agent.create(one)
        agent.hypervisor.faults.fail(method, PpecError("hypervisor.failed", "no"), after=after)
        result = await resized(agent, one.vm_id, 4, 768)
        assert code(result) == "hypervisor.failed"
        domain = await seen(agent, one.vm_id)
        await assert_all_agree(agent)
        assert (domain.next or domain.metadata).vcpus == 2  # type: ignore[union-attr]
        assert (result.vm.vcpus, result.vm.memory_mib) == (domain.vcpus, domain.memory_mib)  # type: ignore[union-attr]
        assert result.observed_at is not None, "it says what is left"
        # A DIMM can't be taken back before the next start; all else can.
        stays = method == "grow_memory" and after
        assert (domain.vcpus, domain.memory_mib) == (2, 768 if stays else 512)
        assert held(agent, one.vm_id) == (2, 2, 768 if stays else 512)
        assert effects(await resized(agent, one.vm_id, 4, 768, fence=2)) == (NOW, NOW)
        await assert_all_agree(agent)

    run_with_agent(settings, words, scenario)


def test_a_call_that_hangs_is_taken_back_when_it_has_ended(settings: Any, words: Any, vm: Any) -> None:
    async def scenario(agent: Any) -> None:
        one = vm(**GROWS)
        await agent.create(one)
        ended = agent.hypervisor.faults.hang("redefine")
        result = await resized(agent, one.vm_id, 4, 768)
        assert (code(result), result.vm) == ("hypervisor.unavailable", None), "nobody knows yet"
        assert agent.context.ledger.holding(one.vm_id).kept().memory_mib == 768, "it may yet come to that"
        await agent.actions.settle()
        assert one.vm_id in agent.context.unfit
        ended.set()
        await agent.hypervisor.wait_until_none_lingers()
        await agent.actions.settle()
        assert agent.context.unfit == {}
        assert held(agent, one.vm_id) == (2, 2, 512)
        domain = await seen(agent, one.vm_id)
        assert (domain.vcpus, domain.memory_mib, domain.next) == (2, 512, None)
        await restart(agent, one.vm_id)
        await assert_all_agree(agent)

    run_with_agent(settings, words, scenario)


AWAY = PpecError("hypervisor.unavailable", "gone")


async def off_with_an_undo_due(agent: Any, one: Any, vcpus: int, memory_mib: int) -> None:
    """A VM that is off, and whose resize failed after it had taken effect, as did its undo."""
    await agent.create(one)
    await agent.run(StopVms(operation_id="off", fence=1, vm_ids=(one.vm_id,), timeout_s=0, force=True))
    agent.hypervisor.faults.fail("redefine", AWAY, after=True)
    agent.hypervisor.faults.fail("redefine", AWAY, nth=2)
    assert code(await resized(agent, one.vm_id, vcpus, memory_mib)) == "hypervisor.unavailable"
    assert agent.context.unfit[one.vm_id] is not None


@pytest.mark.parametrize("wanted", [(6, 1024), (2, 256), (2, 1024)], ids=["grow", "shrink", "mixed"])
def test_a_resize_still_to_be_taken_back_is_taken_back_before_a_start(
    settings: Any, words: Any, vm: Any, wanted: tuple[int, int]
) -> None:
    async def scenario(agent: Any) -> None:
        one = vm(vcpus=4)
        await off_with_an_undo_due(agent, one, *wanted)
        start = StartVms(operation_id="start", fence=1, vm_ids=(one.vm_id,))
        agent.hypervisor.faults.fail("redefine", AWAY)
        (refused,) = await agent.run(start)
        assert code(refused) == "hypervisor.unavailable", "it can't be started with the size it was refused"
        (started,) = await agent.run(start)
        assert code(started) == ""
        assert (started.vm.vcpus, started.vm.memory_mib, started.vm.pending) == (4, 512, None)
        assert agent.context.unfit == {}
        await agent.actions.settle()
        await assert_all_agree(agent)
        await restart(agent, one.vm_id)
        domain = await seen(agent, one.vm_id)
        assert (domain.vcpus, domain.memory_mib) == (4, 512), "it has one size, over all starts"
        await assert_all_agree(agent)

    run_with_agent(settings, words, scenario)


@pytest.mark.parametrize("wanted", [(6, 1024), (2, 256), (2, 1024)], ids=["grow", "shrink", "mixed"])
def test_started_by_hand_before_its_resize_is_taken_back_it_says_what_its_next_start_is(
    settings: Any, words: Any, vm: Any, wanted: tuple[int, int]
) -> None:
    async def scenario(agent: Any) -> None:
        one = vm(vcpus=4)
        await off_with_an_undo_due(agent, one, *wanted)
        await agent.hypervisor.start(one.vm_id)
        await agent.actions.settle()
        domain = await seen(agent, one.vm_id)
        assert (domain.vcpus, domain.memory_mib) == wanted
        assert domain.next is not None
        assert (domain.next.vcpus, domain.next.memory_mib) == (4, 512)
        await assert_all_agree(agent)
        await restart(agent, one.vm_id)
        await agent.actions.settle()
        assert held(agent, one.vm_id) == (4, 4, 512)
        await assert_all_agree(agent)

    run_with_agent(settings, words, scenario)


def test_a_vm_whose_resize_never_took_effect_can_be_started(settings: Any, words: Any, vm: Any) -> None:
    """Its definition is as it was: nothing is asked of a hypervisor that refuses to change it."""

    async def scenario(agent: Any) -> None:
        one = vm(vcpus=4)
        await agent.create(one)
        await agent.run(StopVms(operation_id="off", fence=1, vm_ids=(one.vm_id,), timeout_s=0, force=True))
        for nth in (1, 2):
            agent.hypervisor.faults.fail("redefine", PpecError("hypervisor.failed", "said no"), nth=nth)
        assert code(await resized(agent, one.vm_id, 6, 1024)) == "hypervisor.failed"
        (started,) = await agent.run(StartVms(operation_id="start", fence=1, vm_ids=(one.vm_id,)))
        assert (code(started), started.vm.vcpus, held(agent, one.vm_id)) == ("", 4, (4, 4, 512))
        await assert_all_agree(agent)

    run_with_agent(settings, words, scenario)


TARGETS = {"grow": (4, 768), "shrink": (2, 256), "mixed": (2, 768), "wait": (8, 640), "grow-far": (4, 4096)}
CALLED = {
    "grow": {"annotate", "redefine", "set_vcpus", "grow_memory"},
    "shrink": {"annotate", "redefine", "set_vcpus"},
    "mixed": {"annotate", "redefine", "set_vcpus", "grow_memory"},
    "wait": {"annotate", "redefine", "set_vcpus", "grow_memory"},
    "grow-far": {"annotate", "redefine", "set_vcpus", "grow_memory"},
    "off": {"redefine"},
}


@pytest.mark.parametrize("target", CALLED)
def test_a_crash_at_every_point(memory_dir: Path, words: Any, tiny_vm: Any, target: str) -> None:
    """Recovery finds enough held and no more, and a repeated request ends where the first would have."""
    off = target == "off"
    vcpus, memory_mib = TARGETS["mixed" if off else target]
    first = 4 if target in ("shrink", "mixed", "off") else 2
    one = tiny_vm(name="one", vcpus=first, max_vcpus=6, max_memory_mib=2048)

    async def prepare(agent: Any) -> Callable[[int], ResizeVms]:
        results = await agent.create(tiny_vm(name="neighbour"), one, operation="before")
        assert [code(result) for result in results] == ["", ""]
        if off:
            await agent.run(StopVms(operation_id="off", fence=1, vm_ids=(one.vm_id,), timeout_s=0, force=True))
        return lambda fence: size_of(one.vm_id, vcpus, memory_mib, fence).model_copy(update={"operation_id": "op-1"})

    async def recovered(agent: Any) -> None:
        await assert_all_agree(agent)
        domain = await seen(agent, one.vm_id)
        assert domain.state is (VmState.STOPPED if off else VmState.RUNNING)
        for found, allowed in ((domain.vcpus, {first, vcpus}), (domain.memory_mib, {512, memory_mib})):
            assert found in allowed

    async def done(agent: Any) -> None:
        await assert_all_agree(agent)
        await restart(agent, one.vm_id)
        await agent.actions.settle()
        await assert_all_agree(agent)
        domain = await seen(agent, one.vm_id)
        assert (domain.vcpus, domain.memory_mib) == (vcpus, memory_mib)

    settings = words.settings_of(memory_dir, lab={"topology": "cores=8,threads=2,memory_mib=8192"})
    found = words.crash_everywhere(words.crash_scenario(settings, prepare, recovered, done))
    assert found.kinds == {"domain", "journal: ResizeVms intent", "journal: ResizeVms answer"} | CALLED[target]
    for kind in found.kinds:
        assert found.counted[kind, "before"] == found.counted[kind, "after"] > 0
        assert (found.counted[kind, "torn"] > 0) == kind.startswith("journal")
    assert found.recoveries > len(CALLED[target])


async def assert_memory_lies_as_shown(agent: Any, vm_id: UUID) -> None:
    """What the ledger counts on each host cell is what the guest's cells there have."""
    holding, domain = agent.context.ledger.holding(vm_id), await seen(agent, vm_id)
    assert domain.metadata is not None
    shown = {cell.cell: cell.memory_mib for cell in domain.metadata.guest_cells}
    assert shown == dict(holding.memory_by_cell_mib)
    assert sum(shown.values()) == domain.metadata.memory_mib


def test_a_guest_of_several_cells_grows_and_shrinks_in_each(settings: Any, words: Any, vm: Any) -> None:
    async def scenario(agent: Any) -> None:
        policy = {"multi_cell": True}
        one = vm(vcpus=8, memory_mib=1024, cells=[0, 1], numa=policy, max_vcpus=12, max_memory_mib=4096)
        (made,) = await agent.create(one)
        assert code(made) == ""
        assert made.vm.numa.multi_cell
        assert effects(await resized(agent, one.vm_id, 12, 1024 + 512)) == (NOW, NOW)
        await assert_all_agree(agent)
        await assert_memory_lies_as_shown(agent, one.vm_id)
        at = agent.context.facts.topology.cell_of_cpu
        domain = await seen(agent, one.vm_id)
        for guest_cell in domain.metadata.guest_cells:  # type: ignore[union-attr]
            mine = {pin.pcpu for pin in domain.pins if pin.vcpu in guest_cell.vcpus}
            assert {at[cpu] for cpu in mine} == {guest_cell.cell}, "each vCPU is where its guest was told"
        assert effects(await resized(agent, one.vm_id, 12, 700, fence=2)) == (SAME, LATER)
        assert held(agent, one.vm_id)[2] == 1536
        await assert_all_agree(agent)
        await restart(agent, one.vm_id)
        await agent.actions.settle()
        assert held(agent, one.vm_id)[2] == 700
        await assert_all_agree(agent)
        await assert_memory_lies_as_shown(agent, one.vm_id)

    run_with_agent(settings, words, scenario)


def test_shared_vcpus_are_counted_and_not_pinned(short_dir: Path, words: Any, vm: Any) -> None:
    async def scenario(agent: Any) -> None:
        one = vm(numa={"cpus": "shared"}, max_vcpus=4)
        (made,) = await agent.create(one)
        assert (code(made), made.vm.pins) == ("", ())
        assert effects(await resized(agent, one.vm_id, 4, 512)) == (NOW, SAME)
        assert held(agent, one.vm_id) == (4, 0, 512)
        await assert_all_agree(agent)
        assert code(await resized(agent, one.vm_id, 64, 512, fence=2)) == "vm.exceeds_socket"
        await assert_all_agree(agent)

    settings = words.settings_of(short_dir, reserve={"memory_per_cell_mib": 0, "shared_cores_per_cell": 2})
    run_with_agent(settings, words, scenario)


def test_huge_pages_come_back_when_the_vm_starts_smaller(short_dir: Path, words: Any, vm: Any) -> None:
    async def scenario(agent: Any) -> None:
        def pages_free() -> int:
            return int(agent.context.ledger.cells()[0].huge_pages[0].pages_free)

        one = vm(numa={"huge_page_kib": 2048}, memory_mib=1024)
        assert [code(result) for result in await agent.create(one)] == [""]
        assert pages_free() == 1024 - 512
        refusal = await resized(agent, one.vm_id, 2, 4096)
        assert code(refusal) == "host.no_capacity"
        assert refusal.problem.details["resource"] == "huge_pages_2048_kib"  # type: ignore[union-attr]
        assert effects(await resized(agent, one.vm_id, 2, 512, fence=2)) == (SAME, LATER)
        assert pages_free() == 1024 - 512
        await restart(agent, one.vm_id)
        assert pages_free() == 1024 - 256
        await assert_all_agree(agent)

    topology = "sockets=1,cores=4,threads=2,memory_mib=8192,huge_2m=1024"
    run_with_agent(words.settings_of(short_dir, lab={"topology": topology}), words, scenario)


@pytest.mark.parametrize("slow", CHANGING)
def test_killed_in_mid_resize_it_comes_back_clean_and_a_repeat_succeeds(
    agent_process: Callable[..., Any], vm: Any, slow: str
) -> None:
    agent = agent_process(lab={"delays_s": {slow: 600}}).start()
    one = vm(**GROWS)
    create = {"operation_id": "op-1", "fence": 1, "vms": [one.model_dump(mode="json")]}
    assert agent.client().call("CreateVms", create)["parameters"]["results"][0]["problem"] is None
    request = size_of(one.vm_id, 4, 768).model_dump(mode="json")
    agent.client().send("cloud.ppec.agent.ResizeVms", request, more=True)
    journal = agent.settings.storage.journal
    wait_until(lambda: b"ResizeVms" in journal.read_bytes(), "the intent is on disk", timeout_s=60)
    time.sleep(0.3)
    agent.kill()
    settings = agent.settings
    agent.write_settings(settings.model_copy(update={"lab": settings.lab.model_copy(update={"delays_s": {}})}))
    agent.start()
    (result,) = agent.client().call("ResizeVms", request)["parameters"]["results"]
    # The answer tells what the repeated call did: by the time of its last step the first had plugged the vCPUs.
    vcpus = "unchanged" if slow == "grow_memory" else "now"
    assert (result["problem"], result["resized"]) == (None, {"vcpus": vcpus, "memory_mib": "now"})
    report = agent.client().call("GetReport")["parameters"]["report"]
    (info,) = report["vms"]
    assert (info["vcpus"], info["memory_mib"], info["pending"]) == (4, 768, None)
    cell = report["cells"][0]
    assert cell["memory_mib"] - cell["memory_free_mib"] == 768
    assert cell["cores"] - cell["cores_reserved"] - cell["cores_free"] == 2
