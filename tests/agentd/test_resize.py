# SPDX-License-Identifier: Apache-2.0
"""Resize on the fake: what is live, what waits, what is held meanwhile, and refusals, which change nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from ppec_agentd.hypervisor import Domain
from ppec_contract.agent import ResizeVms, StopVms, VmSize
from ppec_contract.errors import PpecError
from ppec_contract.vm import Size, VmState

from .resizing import (
    CHANGING,
    GROWS,
    LATER,
    NOW,
    SAME,
    assert_all_agree,
    code,
    effects,
    held,
    resized,
    restart,
    run_with_agent,
    seen,
    size_of,
)


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
