# SPDX-License-Identifier: Apache-2.0
"""Batches that VM after VM finds no whole place for: what tells hosts apart, who is tried first, and how long."""

from __future__ import annotations

from uuid import UUID

import pytest

from ppec_contract.api_placement import Policy
from ppec_contract.vm import CpuPolicy, NumaPolicy
from ppec_orchestrator.placement.checker import check
from ppec_orchestrator.placement.fleet import CellState, Fleet, HostState
from ppec_orchestrator.placement.planner import Planner, plan
from ppec_orchestrator.placement.request import Group, PlanRequest, Profile, Shape, VmRequest, Where
from ppec_orchestrator.placement.search import MOST_TRIES, MOST_VMS


def _cell(cores: int, number: int = 0, **figures: int) -> CellState:
    return CellState(number, number, 1, cores, cores, 8192, 8192, **figures)


def _host(number: int, *cells: CellState, rack: str = "r1") -> HostState:
    name = f"h{number:03}"
    return HostState(number, name, "d", "c", rack, "v", "x86_64", cells, 1000, 1000, prefixes=((1,),))


def _vm(
    number: int,
    vcpus: int = 2,
    *,
    where: Where | None = None,
    failed: frozenset[str] = frozenset(),
    numa: NumaPolicy | None = None,
    groups: tuple[Group, ...] = (),
    priority: int = 0,
) -> VmRequest:
    profile = Profile(Shape(vcpus, 64, 1, numa or NumaPolicy()), "x86_64", where or Where())
    return VmRequest(UUID(int=number), f"vm-{number}", profile, failed, groups, priority)


def _whole(fleet: Fleet, *vms: VmRequest, policy: Policy = Policy.PACK) -> dict[str, str]:
    """The host of each VM."""
    request = PlanRequest(vms, policy, all_or_nothing=True)
    answer = plan(fleet, request)
    assert check(fleet, request, answer) == []
    assert not answer.refused
    return {place.name: place.host for place in answer.placed}


@pytest.mark.parametrize("policy", Policy)
@pytest.mark.parametrize("second", [_vm(2, failed=frozenset({"h002"})), _vm(2, where=Where(host="h001"))])
def test_hosts_are_told_apart_by_who_may_stand_there(policy: Policy, second: VmRequest) -> None:
    fleet = Fleet.build([_host(1, _cell(2)), _host(2, _cell(2))], {})
    assert _whole(fleet, _vm(1), second, policy=policy) == {"vm-1": "h002", "vm-2": "h001"}


def test_cells_are_told_apart_by_how_many_cpus_they_share() -> None:
    shared = NumaPolicy(cpus=CpuPolicy.SHARED)
    cells = [_cell(8, shared_cpus=cpus, shared_vcpus=16, shared_vcpus_free=4) for cpus in (8, 2)]
    fleet = Fleet.build([_host(number, cell) for number, cell in enumerate(cells)], {})
    small = [_vm(number, 2, numa=shared, priority=1) for number in (1, 2)]
    assert _whole(fleet, *small, _vm(3, 4, numa=shared)) == {"vm-1": "h001", "vm-2": "h001", "vm-3": "h000"}


def _one_small_among(hosts: int) -> Fleet:
    """The first is the tightest for all, and the only one in its rack."""
    large = [_host(number, _cell(16), _cell(16, 1)) for number in range(1, hosts)]
    return Fleet.build([_host(0, _cell(2), rack="r0"), *large], {})


def test_those_with_the_fewest_hosts_are_tried_first() -> None:
    pinned = _vm(99, where=Where(rack="r0"))
    found = _whole(_one_small_among(60), *(_vm(number) for number in range(1, 22)), pinned)
    assert found["vm-99"] == "h000"


def test_that_takes_few_tries() -> None:
    planner, pinned = Planner(_one_small_among(60)), _vm(99, where=Where(rack="r0"))
    larger = [_vm(number, 4) for number in range(2, 12)]
    request = PlanRequest((_vm(1, priority=5), pinned, *larger), Policy.PACK, all_or_nothing=True)
    before = planner.workspace.moment
    assert not planner.plan(request).refused
    # Three times through the batch, give or take a few: on the way, in the search, and into the seats it found.
    assert planner.workspace.moment - before < 2 * 4 * len(request.vms)


@pytest.mark.parametrize("count", [19, 150])
def test_a_search_that_finds_nothing_ends(count: int) -> None:
    """Two in one place, among others that are told apart by a group: every order of them is another one. Of many VMs
    fewer are tried."""
    planner = Planner(_one_small_among(200))
    pinned = [_vm(number, where=Where(rack="r0")) for number in (998, 999)]
    others = [_vm(number, 3, groups=(Group("g", hard=True),), priority=1) for number in range(1, count + 1)]
    request = PlanRequest((*others, *pinned), Policy.PACK, all_or_nothing=True)
    before = planner.workspace.moment
    answer = planner.plan(request)
    assert [refusal.name for refusal in answer.refused] == ["vm-999"]
    # Whatever is tried is taken and given back; and the batch is planned a few times, VM after VM.
    tried = MOST_TRIES * MOST_VMS // max(len(request.vms), MOST_VMS)
    assert planner.workspace.moment - before < 2 * tried + 10 * len(request.vms)
    assert planner.plan(request) == answer
