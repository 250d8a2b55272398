# SPDX-License-Identifier: Apache-2.0
"""What tests of resizes ask of an agent in process, and what must hold after each: ledger and metadata agree."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any
from uuid import UUID

from ppec_agentd.hypervisor import Domain
from ppec_contract.agent import Effect, ResizeVms, StartVms, StopVms, VmResult, VmSize

NOW, LATER, SAME = Effect.NOW, Effect.NEXT_START, Effect.UNCHANGED
GROWS = {"max_vcpus": 6, "max_memory_mib": 2048}
# The calls of the hypervisor by which a size changes.
CHANGING = ("annotate", "redefine", "set_vcpus", "grow_memory")


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
