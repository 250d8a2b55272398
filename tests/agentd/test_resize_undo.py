# SPDX-License-Identifier: Apache-2.0
"""A resize that fails is taken back: at once, when a call that hangs has ended, or before the next start."""

from __future__ import annotations

from typing import Any

import pytest

from ppec_contract.agent import StartVms, StopVms
from ppec_contract.errors import PpecError

from .resizing import (
    CHANGING,
    GROWS,
    NOW,
    assert_all_agree,
    code,
    effects,
    held,
    resized,
    restart,
    run_with_agent,
    seen,
)


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
