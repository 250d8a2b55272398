# SPDX-License-Identifier: Apache-2.0
"""Small batches by brute force: what can be placed whole, in any way at all, is not refused."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import combinations
from uuid import UUID

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppec_contract.api_placement import Policy
from ppec_orchestrator.placement.checker import check
from ppec_orchestrator.placement.fleet import CellState, Fleet, HostState
from ppec_orchestrator.placement.planner import plan
from ppec_orchestrator.placement.replay import Replay
from ppec_orchestrator.placement.request import PlanRequest, Profile, Shape, Spare, SpareRule, VmRequest, Where

from .fleets import a_fleet, a_request


@settings(max_examples=400, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_batch_that_can_be_placed_whole_is(seed: int) -> None:
    rng = random.Random(seed)
    fleet = a_fleet(rng, most_hosts=3)
    request = a_request(rng, most_vms=4, all_or_nothing=rng.random() < 0.5, batch_hosts={})
    answer = plan(fleet, request)
    assert check(fleet, request, answer) == []
    if answer.refused:
        assert not _placeable(Replay(fleet, request), request.vms)


def _placeable(replay: Replay, vms: Sequence[VmRequest]) -> bool:
    """Every order, as groups of VMs that stand together begin with whichever comes first; every host, every cell."""
    if not vms:
        return True
    for at, vm in enumerate(vms):
        rest = [*vms[:at], *vms[at + 1 :]]
        for row in np.flatnonzero(replay.candidates(vm)).tolist():
            for columns in _seats(replay, row, vm):
                after = deepcopy(replay)
                after.place(vm, row, columns)
                if _placeable(after, rest):
                    return True
    return False


def _seats(replay: Replay, row: int, vm: VmRequest) -> list[list[int]]:
    numbers = [cell.cell for cell in replay.hosts[row].cells]
    chosen = (cells for count in range(1, len(numbers) + 1) for cells in combinations(numbers, count))
    return [columns for cells in chosen if (columns := replay.seat(row, vm.profile.shape, cells, new=True))]


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_vms_for_which_there_is_exactly_room_are_placed(seed: int) -> None:
    """The room of each cell is the sum of what some of the VMs take: there is a way, and often only one."""
    fleet, request = _planted(random.Random(seed))
    answer = plan(fleet, request)
    assert not answer.refused
    assert check(fleet, request, answer) == []


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_so_are_vms_that_may_not_stand_everywhere(seed: int) -> None:
    """As in a replan, where each has failed on hosts of its own, or with VMs that are asked for on one host."""
    rng = random.Random(seed)
    fleet, request = _planted(rng, picky=True)
    answer = plan(fleet, request)
    assert not answer.refused
    assert check(fleet, request, answer) == []


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 8), st.integers(85, 100), st.sampled_from(Policy))
def test_nearly_as_many_as_have_room_in_cpus_and_memory_are_placed(
    seed: int, hosts: int, percent: int, policy: Policy
) -> None:
    """Up to a hundred VMs of six sizes, each way round: too many for brute force, but that there is a way is known."""
    fleet, vms = _tight(random.Random(seed), hosts, percent)
    for all_or_nothing in (True, False):
        request = PlanRequest(vms, policy, all_or_nothing=all_or_nothing)
        answer = plan(fleet, request)
        assert not answer.refused
        assert check(fleet, request, answer) == []


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), hosts=st.integers(1, 5), policy=st.sampled_from(Policy))
def test_of_more_than_have_room_those_who_come_first_are_placed(seed: int, hosts: int, policy: Policy) -> None:
    """They use up all CPUs. Only if small ones that come later are more in number, some of the first are left out."""
    fleet, first = _tight(random.Random(seed), hosts, 100)
    later = [replace(vm, vm_id=UUID(int=1000 + number), name=f"late-{number}") for number, vm in enumerate(first)]
    request = PlanRequest((*first, *later), policy)
    answer = plan(fleet, request)
    assert len(answer.placed) >= len(first)
    if len(answer.placed) == len(first):
        assert [refusal.name for refusal in answer.refused] == [vm.name for vm in later]
    assert check(fleet, request, answer) == []


def test_a_host_that_holds_more_than_it_has_keeps_nobody_from_the_others() -> None:
    """As where a disk was replaced by a smaller one. Of these, VM after VM leaves some out."""
    fleet, vms = _tight(random.Random(3), 4, 100)
    cell = CellState(0, 0, 1, 24, 24, 99999, 99999)
    full = HostState(9, "h9", "d", "c", "r", "v", "x86_64", (cell,), 100, -5, prefixes=((1,),))
    request = PlanRequest(vms, Policy.PACK, all_or_nothing=True)
    answer = plan(Fleet.build([*fleet.hosts, full]), request)
    assert not answer.refused
    assert any(why.searched for why in answer.evidence)


def _tight(rng: random.Random, hosts: int, percent: int) -> tuple[Fleet, tuple[VmRequest, ...]]:
    """Cells as large as what some VMs take of them together; and of all these VMs so many."""
    sizes = ((2, 3000), (6, 11000), (10, 31000), (12, 7000), (14, 50000), (4, 9000))
    made, asked = [], list[tuple[int, int]]()
    for number in range(hosts):
        cells = []
        for cell in (0, 1):
            mine = list(_filling(rng, sizes, 24))
            asked += mine
            memory_mib = sum(mib for _, mib in mine)
            cells.append(CellState(cell, cell, 1, 24, 24, memory_mib, memory_mib))
        made.append(
            HostState(number, f"h{number}", "d", "c", "r", "v", "x86_64", tuple(cells), 100, 100, prefixes=((1,),))
        )
    rng.shuffle(asked)
    chosen = asked[: len(asked) * percent // 100]
    shapes = {size: Profile(Shape(*size, 1), "x86_64", Where()) for size in sizes}
    return Fleet.build(made), tuple(
        VmRequest(UUID(int=number + 1), f"v{number}", shapes[size]) for number, size in enumerate(chosen)
    )


def _filling(rng: random.Random, sizes: Sequence[tuple[int, int]], vcpus: int) -> Iterator[tuple[int, int]]:
    while fitting := [size for size in sizes if size[0] <= vcpus]:
        size = rng.choice(fitting)
        vcpus -= size[0]
        yield size


@pytest.mark.parametrize("policy", Policy)
@pytest.mark.parametrize("all_or_nothing", [True, False])
def test_a_small_batch_that_can_be_placed_and_made_good_is(policy: Policy, *, all_or_nothing: bool) -> None:
    """With N+1. Each of two hosts has room for all, but the first choices of some policies leave the last one without a
    restart."""
    cells = [
        tuple(CellState(n, n, 1, cores, cores, 8192, 8192) for n, cores in enumerate(each)) for each in ((6, 8), (8, 8))
    ]
    hosts = [
        HostState(number, f"h{number}", "d", "c", "r", "v", "x86_64", each, 100, 100, prefixes=((1,),))
        for number, each in enumerate(cells)
    ]
    vms = tuple(
        VmRequest(UUID(int=number), f"v{number}", Profile(Shape(vcpus, 64, 1), "x86_64"))
        for number, vcpus in enumerate((6, 4, 4), 1)
    )
    fleet, spare = Fleet.build(hosts), SpareRule(Spare.REQUIRED, witnessed=True)
    request = PlanRequest(vms, policy, all_or_nothing=all_or_nothing, spare=spare)
    answer = plan(fleet, request)
    assert not answer.refused
    assert check(fleet, request, answer) == []


def test_some_of_these_need_the_search() -> None:
    searched = [any(why.searched for why in plan(*_planted(random.Random(seed))).evidence) for seed in range(100)]
    assert any(searched)
    assert not all(searched)


def _planted(rng: random.Random, *, picky: bool = False) -> tuple[Fleet, PlanRequest]:
    count = rng.randint(1, 3)
    vms: list[VmRequest] = []
    hosts = []
    for number in range(count):
        cells = []
        for cell in (0, 1):
            mine = [(rng.choice((2, 4, 6)), rng.choice((512, 1024, 2048))) for _ in range(rng.randint(1, 2))]
            cores, memory_mib = sum(vcpus for vcpus, _ in mine), sum(mib for _, mib in mine)
            cells.append(CellState(cell, cell, 1, 16, cores, 16384, memory_mib))
            for vcpus, mib in mine:
                pinned = Where(host=f"h{number}") if picky and rng.random() < 0.2 else Where()
                failed = [f"h{other}" for other in range(count) if picky and other != number and rng.random() < 0.3]
                profile = Profile(Shape(vcpus, mib, 1), "x86_64", pinned)
                vms.append(VmRequest(UUID(int=len(vms) + 1), f"v{len(vms)}", profile, frozenset(failed)))
        hosts.append(
            HostState(number, f"h{number}", "d", "c", "r", "v", "x86_64", tuple(cells), 100, 100, prefixes=((1,),))
        )
    return Fleet.build(hosts), PlanRequest(tuple(vms), rng.choice(list(Policy)), all_or_nothing=rng.random() < 0.5)
