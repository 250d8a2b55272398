# SPDX-License-Identifier: Apache-2.0
"""Resizes of VMs that sit on several cells, share CPUs, or have huge pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import UUID

from .resizing import LATER, NOW, SAME, assert_all_agree, code, effects, held, resized, restart, run_with_agent, seen


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
