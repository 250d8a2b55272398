# SPDX-License-Identifier: Apache-2.0
"""What is free says the same in both its forms, whatever was taken, given back and moved; and what a plan may keep."""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID

import numpy as np
import pytest

from ppec_contract.api_placement import Policy
from ppec_contract.vm import CpuPolicy, NumaPolicy
from ppec_orchestrator.placement.balance import Balance
from ppec_orchestrator.placement.checker import check
from ppec_orchestrator.placement.fitting import Fitting
from ppec_orchestrator.placement.fleet import CellState, Fleet, HostState, SeatedVm
from ppec_orchestrator.placement.planner import Planner, plan
from ppec_orchestrator.placement.request import Group, PlanRequest, Profile, Shape, VmRequest
from ppec_orchestrator.placement.workspace import Workspace

SHARED = NumaPolicy(cpus=CpuPolicy.SHARED)


def _cell(number: int, cores: int, free: int, **figures: int) -> CellState:
    return CellState(number, number, 1, cores, free, 65536, 65536, **figures)


def _fleet(*cells: CellState, vms: tuple[SeatedVm, ...] = ()) -> Fleet:
    host = HostState(1, "h1", "d", "c", "r", "v", "x86_64", cells, 1000, 1000, vms=vms, prefixes=((1,),))
    return Fleet.build([host], {})


def _vm(number: int, vcpus: int, memory_mib: int = 64, numa: NumaPolicy | None = None) -> VmRequest:
    profile = Profile(Shape(vcpus, memory_mib, 1, numa or NumaPolicy()), "x86_64")
    return VmRequest(UUID(int=number), f"vm-{number}", profile)


def _packed_anew(workspace: Workspace, fitting: Fitting) -> bool:
    """Whether the packed form is what it would be were it worked out now."""
    fresh = Workspace(workspace.fleet)
    for resource, free in workspace.free.items():
        fresh.free[resource][:] = free
    return bool(np.array_equal(workspace.packed(fitting), fresh.packed(fitting)))


@pytest.mark.parametrize("count", [1, 40])
def test_a_cell_that_shrank_has_nothing_until_all_it_lacks_was_given_back(count: int) -> None:
    workspace, vm = Workspace(_fleet(_cell(0, 8, -2), _cell(1, 8, 8))), _vm(1, 1)
    fitting = Fitting(workspace.fleet, vm.profile.shape)
    workspace.packed(fitting)
    taken = [workspace.take(0, [column], fitting, vm) for column in (0, 1) for _ in range(count)]
    assert _packed_anew(workspace, fitting)
    workspace.give_back(taken.pop())
    workspace.move(0, 0, 1, taken[0].part.by_resource)
    assert _packed_anew(workspace, fitting)
    workspace.move(0, 1, 0, taken[0].part.by_resource)
    workspace.give_back_all(taken)
    assert _packed_anew(workspace, fitting)
    assert workspace.free["cores"].tolist() == [[-2, 8]]


def test_a_move_out_of_a_cell_that_shrank_opens_no_more_than_it_frees() -> None:
    def seated(number: int, cores: int, *, movable: bool) -> SeatedVm:
        return SeatedVm(UUID(int=100 + number), f"s{number}", _vm(0, cores).profile, (0,), movable=movable)

    other = replace(_cell(1, 4, 4), memory_mib=64, memory_free_mib=64)
    fleet = _fleet(_cell(0, 8, -2), other, vms=(seated(1, 4, movable=True), seated(2, 6, movable=False)))
    request = PlanRequest((_vm(1, 2, 1024), _vm(2, 2, 1024)), Policy.PACK, most_moves=1)
    planner = Planner(fleet)
    answer = planner.plan(request)
    assert check(fleet, request, answer) == []
    assert [refusal.name for refusal in answer.refused] == ["vm-2"]
    assert planner.plan(request) == answer


def test_a_vm_is_not_kept_in_a_cell_that_is_of_no_use_to_it_any_more() -> None:
    def fleet(shared_cpus: int) -> Fleet:
        figures = {"shared_vcpus": 16, "shared_vcpus_free": 16}
        return _fleet(_cell(0, 8, 8, shared_cpus=shared_cpus, **figures), _cell(1, 8, 8, shared_cpus=8, **figures))

    request = PlanRequest((_vm(1, 4, numa=SHARED), _vm(2, 2, numa=SHARED)), Policy.PACK)
    first, planner = plan(fleet(8), request), Planner(fleet(2))
    assert first.placed[0].cells == (0,)
    again = planner.plan(request, {first.placed[0].vm_id: (first.placed[0], first.evidence[0])})
    assert [place.cells for place in again.placed] == [(1,), (1,)]
    assert again == planner.plan(request)
    assert planner.workspace.free["shared_vcpus"].tolist() == [[16, 16]]


def test_a_machine_whose_reserve_changed_is_of_another_size() -> None:
    before = _fleet(_cell(0, 8, 8))
    after = _fleet(_cell(0, 8, 8, cores_reserved=8, memory_reserved_mib=65536))
    workspace = Workspace(before)
    workspace.follow(after, [0])
    assert workspace.balance.cpus.tolist() == Balance(after).cpus.tolist()
    assert workspace.balance.memory_mib.tolist() == Balance(after).memory_mib.tolist()


def test_groups_that_nobody_is_in_are_forgotten() -> None:
    planner = Planner(_fleet(_cell(0, 8, 8)))
    for number in range(20):
        planner.plan(PlanRequest((replace(_vm(1, 1), groups=(Group(f"g{number}"),)),)))
    assert len(planner.workspace.groups) == 0
