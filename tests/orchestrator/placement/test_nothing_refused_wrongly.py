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
from ppec_contract.vm import NumaPolicy
from ppec_orchestrator.placement.addresses import Prefixes
from ppec_orchestrator.placement.checker import check
from ppec_orchestrator.placement.fleet import CellState, Fleet, HostState
from ppec_orchestrator.placement.planner import Planner, plan
from ppec_orchestrator.placement.reasons import Reason
from ppec_orchestrator.placement.replay import Replay
from ppec_orchestrator.placement.request import Network, PlanRequest, Profile, Shape, Spare, SpareRule, VmRequest, Where

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


@settings(max_examples=400, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_so_is_a_batch_of_vms_all_alike(seed: int) -> None:
    """Over several cells, or with addresses of prefixes that some hosts share, one can cost the others their places."""
    rng = random.Random(seed)
    fleet, request = _alike(rng)
    answer = plan(fleet, request)
    assert check(fleet, request, answer) == []
    if answer.refused:
        assert not _placeable(Replay(fleet, request), request.vms)


def test_which_of_the_alike_goes_where_counts_for_addresses() -> None:
    """Both VMs have one of `C` and one of any: on the first host two of `C`, which leaves none."""
    any_and_c: tuple[Network, ...] = (None, frozenset({3}))
    hosts = [_host(number, (8,), prefixes) for number, prefixes in enumerate((((3,),), ((1, 3),)))]
    fleet = Fleet.build(hosts, {1: 2, 3: 2})
    request = PlanRequest(_vms(2, Profile(Shape(2, 64, 1), "x86_64", networks=any_and_c)), Policy.PACK)
    answer = plan(fleet, request)
    assert [place.host for place in answer.placed] == ["h1", "h1"]
    assert check(fleet, request, answer) == []


def test_which_cells_the_alike_have_counts_if_each_has_several() -> None:
    """The tightest cells for one, 5 + 5 + 5, leave no three for the other."""
    profile = Profile(Shape(15, 60, 1, NumaPolicy(multi_cell=True)), "x86_64")
    fleet, request = Fleet.build([_host(0, (10, 5, 5, 5, 5))]), PlanRequest(_vms(2, profile), Policy.PACK)
    answer = plan(fleet, request)
    assert sorted(len(place.cells) for place in answer.placed) == [3, 3]
    assert check(fleet, request, answer) == []


def test_places_that_are_kept_cost_nobody_his() -> None:
    """Since the small one went to the second host, somebody else came to the first: the large one has only the second,
    for which the small one makes way."""
    large, small = (Profile(Shape(cores, 64, 1), "x86_64") for cores in (8, 4))
    request = PlanRequest((*_vms(1, large), *_vms(1, small, first=2)), Policy.PACK, all_or_nothing=True)
    before = Fleet.build([_host(0, (8,)), _host(1, (8,))])
    earlier = plan(before, request)
    assert [place.host for place in earlier.placed] == ["h0", "h1"]
    now = before.changed([_host(0, (8,), cores_free=4)])
    kept = {earlier.placed[1].vm_id: (earlier.placed[1], earlier.evidence[1])}
    answer = Planner(now).plan(request, kept)
    assert [place.host for place in answer.placed] == ["h1", "h0"]
    assert check(now, request, answer) == []


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_so_is_a_batch_that_is_planned_again_with_places_kept(seed: int) -> None:
    """Since it was planned, somebody else took room on one of its hosts."""
    rng = random.Random(seed)
    fleet = a_fleet(rng, most_hosts=3)
    request = a_request(rng, most_vms=4, all_or_nothing=rng.random() < 0.5, batch_hosts={})
    earlier = plan(fleet, request)
    lost = rng.choice([place.host for place in earlier.placed] or [fleet.hosts[0].name])
    host = fleet.hosts[fleet.index[lost]]
    now = fleet.changed([replace(host, cells=tuple(replace(cell, cores_free=0) for cell in host.cells))])
    pairs = zip(earlier.placed, earlier.evidence, strict=True)
    kept = {place.vm_id: (place, why) for place, why in pairs if place.host != lost}
    answer = Planner(now).plan(request, kept)
    if answer.refused:
        assert not _placeable(Replay(now, request), request.vms)


def test_places_that_are_kept_stay_where_that_costs_nobody_his() -> None:
    small = Profile(Shape(4, 64, 1), "x86_64")
    request = PlanRequest(_vms(2, small), Policy.PACK)
    fleet = Fleet.build([_host(0, (8,)), _host(1, (8,))])
    earlier = plan(fleet.changed([_host(0, (8,), cores_free=0)]), request)
    assert [place.host for place in earlier.placed] == ["h1", "h1"]
    kept = {earlier.placed[1].vm_id: (earlier.placed[1], earlier.evidence[1])}
    assert [place.host for place in Planner(fleet).plan(request, kept).placed] == ["h1", "h1"]


def test_who_can_not_have_the_seat_found_for_it_has_another() -> None:
    """Moved about until three have places, the VM over several cells finds one cell free when its turn comes, and takes
    that, as the policy has it, though two others were found for it."""
    several = NumaPolicy(multi_cell=True)
    hosts = [_host(0, (8,)), _host(1, (10,)), replace(_host(2, (8, 4, 4)), rack="x")]
    profiles = (
        Profile(Shape(8, 64, 1), "x86_64", Where(rack="r")),
        Profile(Shape(8, 64, 1), "x86_64", Where(host="h0")),
        Profile(Shape(8, 64, 1, several), "x86_64", Where(rack="x")),
        Profile(Shape(8, 64, 1), "x86_64", Where(rack="x")),
        Profile(Shape(8, 64, 1), "x86_64", Where(rack="x")),
    )
    vms = tuple(_vms(1, profile, first=number)[0] for number, profile in enumerate(profiles, 1))
    fleet, request = Fleet.build(hosts), PlanRequest(vms, Policy.PACK)
    answer = plan(fleet, request)
    assert check(fleet, request, answer) == []
    assert Reason.N_PLUS_ONE not in {reason for refusal in answer.refused for reason in refusal.reasons}
    assert len(answer.placed) >= 3


def _alike(rng: random.Random) -> tuple[Fleet, PlanRequest]:
    """Two or three VMs of one profile, for which there is about room enough."""
    networks: list[tuple[Network, ...]] = [(None,), (None, frozenset({1})), (frozenset({1, 2}), frozenset({1}))]
    profile = Profile(
        Shape(rng.choice((4, 6, 9)), 64, 1, NumaPolicy(multi_cell=rng.random() < 0.5)),
        "x86_64",
        networks=rng.choice(networks),
    )
    prefixes: list[Prefixes] = [((1,),), ((2, 1),), ((1, 2),), ((2,), (1, 3))]
    hosts = [
        _host(number, tuple(rng.randint(2, 9) for _ in range(rng.randint(1, 5))), rng.choice(prefixes))
        for number in range(rng.randint(1, 2))
    ]
    left = {prefix: rng.randint(1, 4) for prefix in (1, 2, 3)}
    request = PlanRequest(_vms(rng.randint(2, 3), profile), rng.choice(list(Policy)), all_or_nothing=rng.random() < 0.5)
    return Fleet.build(hosts, left), request


def _vms(count: int, profile: Profile, first: int = 1) -> tuple[VmRequest, ...]:
    return tuple(VmRequest(UUID(int=number), f"v{number}", profile) for number in range(first, first + count))


def _host(
    number: int, cores: Sequence[int], prefixes: Prefixes = ((1,),), *, cores_free: int | None = None
) -> HostState:
    """All its cells are of one socket."""
    cells = tuple(
        CellState(cell, 0, 1, each, each if cores_free is None else cores_free, 8192, 8192)
        for cell, each in enumerate(cores)
    )
    return HostState(number, f"h{number}", "d", "c", "r", "v", "x86_64", cells, 100, 100, prefixes=prefixes)


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
    """They use up all CPUs, so that small ones that come later and are more in number have not more."""
    fleet, first = _tight(random.Random(seed), hosts, 100)
    later = [replace(vm, vm_id=UUID(int=1000 + number), name=f"late-{number}") for number, vm in enumerate(first)]
    request = PlanRequest((*first, *later), policy)
    answer = plan(fleet, request)
    assert [refusal.name for refusal in answer.refused] == [vm.name for vm in later]
    assert check(fleet, request, answer) == []


def test_those_who_come_later_keep_the_first_out_if_there_would_not_be_enough() -> None:
    """The large one has room beside two of the small ones, if the others make way."""
    small, large = Profile(Shape(2, 64, 1), "x86_64"), Profile(Shape(8, 64, 1), "x86_64")
    fleet = Fleet.build([_host(0, (8,)), _host(1, (4,))])
    request = PlanRequest((*_vms(2, small), *_vms(1, large, first=3), *_vms(4, small, first=4)), Policy.BALANCED)
    for at_least, placed in ((0, 3), (3, 3), (4, 6)):
        answer = plan(fleet, replace(request, at_least=at_least))
        assert len(answer.placed) == placed, at_least
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
