# SPDX-License-Identifier: Apache-2.0
"""A plan that needs running VMs moved contains the moves: the fewest there are, in an order in which each has room."""

from __future__ import annotations

import random
from dataclasses import replace
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppec_contract.api_placement import Policy
from ppec_contract.vm import CpuPolicy, NumaPolicy
from ppec_orchestrator.placement.applied import applied
from ppec_orchestrator.placement.checker import check
from ppec_orchestrator.placement.demand import memory_resource
from ppec_orchestrator.placement.evacuation import exposed
from ppec_orchestrator.placement.fleet import CellState, Fleet, HostState, SeatedVm
from ppec_orchestrator.placement.moves import worth_opening
from ppec_orchestrator.placement.plan import Move, Plan
from ppec_orchestrator.placement.planner import Planner, plan
from ppec_orchestrator.placement.reasons import Reason
from ppec_orchestrator.placement.request import (
    Group,
    Level,
    PlanRequest,
    Profile,
    Shape,
    Spare,
    SpareRule,
    VmRequest,
    Where,
)

from .occupied import (
    Account,
    a_profile,
    an_occupied_fleet,
    groups_kept,
    may_stand,
    of_one_cell,
    some_groups,
)

SEEDS = st.integers(0, 2**32)
MOST = 3


# --- brute force ------------------------------------------------------------------------------------------------------


def cheapest(
    account: Account, row: int, shape: Shape, most: int, moved: frozenset[UUID] = frozenset()
) -> tuple[int, int] | None:
    """Moves and MiB: every sequence of moves on the host is tried. None if none does."""
    if next(account.seats(shape, row), None) is not None:
        return 0, 0
    best: tuple[int, int] | None = None
    if not most:
        return None
    host = account.hosts[row]
    for vm in host.vms:
        if not vm.movable or len(vm.cells) > 1 or vm.vm_id in moved:
            continue
        source = [cell.cell for cell in host.cells].index(vm.cells[0])
        for target in range(len(host.cells)):
            if not _try(account, row, vm, source, target):
                continue
            rest = cheapest(account, row, shape, most - 1, moved | {vm.vm_id})
            _shift(account, row, vm, target, source)
            if rest is not None:
                cost = (1 + rest[0], vm.profile.shape.memory_mib + rest[1])
                best = cost if best is None else min(best, cost)
    return best


def _try(account: Account, row: int, vm: SeatedVm, source: int, target: int) -> bool:
    cells, shape = account.hosts[row].cells, vm.profile.shape
    if source == target:
        return False
    if shape.numa.cpus is CpuPolicy.DEDICATED and cells[source].threads_per_core != cells[target].threads_per_core:
        return False
    taken = of_one_cell(shape, cells[target])
    if taken is None or not account.holds(row, target, taken):
        return False
    _shift(account, row, vm, source, target)
    return True


def _shift(account: Account, row: int, vm: SeatedVm, source: int, target: int) -> None:
    taken = of_one_cell(vm.profile.shape, account.hosts[row].cells[source])
    assert taken is not None
    for name, amount in taken.items():
        account.free[row][source][name] += amount
        account.free[row][target][name] -= amount


# --- properties -------------------------------------------------------------------------------------------------------


def a_request(rng: random.Random, count: int, most_moves: int = MOST) -> PlanRequest:
    vms = tuple(VmRequest(UUID(int=n + 1), f"vm-{n}", a_profile(rng), groups=some_groups(rng)) for n in range(count))
    return PlanRequest(vms, rng.choice(list(Policy)), most_moves=most_moves)


def a_crowded_fleet(rng: random.Random, hosts: int) -> Fleet:
    return an_occupied_fleet(rng, most_hosts=hosts, most_vms=8 * hosts, most_cells=3, size=2)


def just_too_large(rng: random.Random, fleet: Fleet, asked: VmRequest) -> VmRequest:
    """More cores, or memory or huge pages, than any one cell has free, if only by one."""
    shape, more = asked.profile.shape, rng.choice((1, 1, 2))
    cores, units = (int(fleet.free(each).max(initial=0)) + more for each in ("cores", memory_resource(shape)))  # type: ignore[arg-type]
    unit_mib = shape.numa.huge_page_kib // 1024 or 1
    larger = replace(shape, vcpus=2 * cores) if rng.random() < 0.7 else replace(shape, memory_mib=units * unit_mib)
    return replace(asked, profile=replace(asked.profile, shape=larger))


@settings(max_examples=800)
@given(SEEDS, st.integers(1, MOST))
def test_moves_are_the_fewest_and_a_refusal_means_that_there_are_none(seed: int, most: int) -> None:
    rng = random.Random(seed)
    fleet = a_crowded_fleet(rng, 2)
    request = a_request(rng, 1, most)
    vm = just_too_large(rng, fleet, request.vms[0])
    request = replace(request, vms=(vm,))
    newcomer = SeatedVm(vm.vm_id, vm.name, vm.profile, (), vm.groups)
    standing = [(other, host) for host in fleet.hosts for other in host.vms]
    ways = []
    for row, host in enumerate(fleet.hosts):
        if may_stand(vm.profile, host) and groups_kept(newcomer, host, standing):
            cost = cheapest(Account(fleet), row, vm.profile.shape, most)
            if cost is not None and (not cost[0] or worth_opening(vm.profile.shape)):
                ways.append((*cost, host.name))
    result = plan(fleet, request)
    if not ways:
        assert not result.placed
        return
    moves = result.evidence[0].moves
    assert (len(moves), _moved_mib(fleet, moves)) == min(ways)[:2]
    if moves:
        assert result.placed[0].host == min(ways)[2]


@settings(max_examples=400)
@given(SEEDS)
def test_each_move_has_its_room_when_it_is_made_and_then_the_vm_fits(seed: int) -> None:
    rng = random.Random(seed)
    fleet = a_crowded_fleet(rng, 3)
    request = a_request(rng, 4)
    request = replace(request, vms=(just_too_large(rng, fleet, request.vms[0]), *request.vms[1:]))
    planner = Planner(fleet)
    before = {name: free.copy() for name, free in planner.workspace.free.items()}
    result = planner.plan(request)
    assert all((planner.workspace.free[name] == free).all() for name, free in before.items())
    again = planner.plan(request)
    assert (again.placed, again.refused, _moves(again)) == (result.placed, result.refused, _moves(result))
    _carry_out(fleet, request, result)
    assert check(fleet, request, result) == []
    after = applied(fleet, request.vms, result)
    assert all((after.free(name) >= 0).all() for name in planner.workspace.free)


def _moved_mib(fleet: Fleet, moves: tuple[Move, ...]) -> int:
    sizes = {vm.vm_id: vm.profile.shape.memory_mib for host in fleet.hosts for vm in host.vms}
    return sum(sizes[move.vm_id] for move in moves)


def _moves(result: Plan) -> list[tuple[Move, ...]]:
    return [evidence.moves for evidence in result.evidence]


def _carry_out(fleet: Fleet, request: PlanRequest, result: Plan) -> None:
    """Moves as they come, each VM once, each into free room, and after a VM's moves the VM; all moves in a row, too."""
    account, all_in_a_row = Account(fleet), Account(fleet)
    rows = {host.name: row for row, host in enumerate(fleet.hosts)}
    asked = {vm.vm_id: vm for vm in request.vms}
    moved: set[UUID] = set()
    for place, evidence in sorted(zip(result.placed, result.evidence, strict=True), key=lambda pair: pair[1].step):
        row = rows[place.host]
        numbers = [cell.cell for cell in fleet.hosts[row].cells]
        for move in evidence.moves:
            assert move.vm_id not in moved
            moved.add(move.vm_id)
            vm = next(vm for vm in fleet.hosts[row].vms if vm.vm_id == move.vm_id)
            assert (move.host, move.cells_before, vm.movable) == (place.host, vm.cells, True)
            source, target = (numbers.index(cell) for (cell,) in (move.cells_before, move.cells_after))
            for each in (account, all_in_a_row):
                assert _try(each, row, vm, source, target)
        shape = asked[place.vm_id].profile.shape
        columns = tuple(numbers.index(cell) for cell in place.cells)
        seat = next(seat for seat in account.seats(shape, row) if seat[0] == columns)
        account.take(shape, row, seat)


# --- cases ------------------------------------------------------------------------------------------------------------


def a_vm(name: str, cores: int, cell: int, memory_mib: int = 1024, **more: object) -> SeatedVm:
    """On two threads to the core."""
    numa = more.pop("numa", NumaPolicy())
    shape = Shape(2 * cores, memory_mib, 1, numa, nvme=more.pop("nvme", 0))  # type: ignore[arg-type]
    return SeatedVm(UUID(int=sum(map(ord, name))), name, Profile(shape, "x86_64"), (cell,), **more)  # type: ignore[arg-type]


def a_host(name: str, *vms: SeatedVm, cells: int = 2, cores: int = 8) -> HostState:
    free = dict.fromkeys(range(cells), (cores, 65536))
    for vm in vms:
        (cell,) = vm.cells
        free[cell] = (
            free[cell][0] - vm.profile.shape.vcpus // 2,
            free[cell][1] - vm.profile.shape.memory_mib,
        )
    states = tuple(CellState(n, n, 2, cores, free[n][0], 65536, free[n][1], nvme=4, nvme_free=4) for n in range(cells))
    place = (int(name[1:]), name, "d1", "c1", "r1", "v1", "x86_64")
    return HostState(*place, states, 1000, 1000, vms, prefixes=((1,),))


def ask(*cores: int, most: int = 4, **more: object) -> PlanRequest:
    profiles = {each: Profile(Shape(2 * each, 1024, 10), "x86_64") for each in cores}
    vms = tuple(VmRequest(UUID(int=n + 1), f"vm-{n}", profiles[each]) for n, each in enumerate(cores))
    return PlanRequest(vms, Policy.PACK, most_moves=most, **more)  # type: ignore[arg-type]


def told(result: Plan) -> list[list[tuple[str, str, tuple[int, ...], tuple[int, ...]]]]:
    return [
        [(move.host, move.name, move.cells_before, move.cells_after) for move in evidence.moves]
        for evidence in result.evidence
    ]


def refused(result: Plan) -> dict[Reason, int]:
    return dict(result.refused[0].reasons)


# Six cores free in two cells, three in each.
SPLIT = (a_vm("a", 2, 0), a_vm("b", 3, 0, 2048), a_vm("c", 5, 1))


def test_without_moves_what_is_split_is_of_no_use() -> None:
    assert refused(plan(Fleet.build([a_host("h1", *SPLIT)]), ask(5, most=0))) == {Reason.NUMA_FIT: 1}


def test_the_vm_with_the_least_memory_is_moved() -> None:
    result = plan(Fleet.build([a_host("h1", *SPLIT)]), ask(5))
    assert told(result) == [[("h1", "a", (0,), (1,))]]
    assert (result.placed[0].cells, result.evidence[0].candidates) == ((0,), 1)


def test_a_host_that_needs_no_moves_comes_first_whatever_the_policy_says() -> None:
    result = plan(Fleet.build([a_host("h1", *SPLIT), a_host("h2", cores=32)]), ask(5))
    assert (result.placed[0].host, told(result)) == ("h2", [[]])


def test_fewest_moves_then_fewest_mib_then_the_name() -> None:
    two = a_host(
        "h0", a_vm("d", 1, 0, 64), a_vm("e", 1, 0, 64), a_vm("f", 3, 0, 99999 // 2, movable=False), a_vm("g", 5, 1)
    )
    heavy = a_host(
        "h1", *(replace(vm, profile=a_vm("x", vm.profile.shape.vcpus // 2, 0, 4096).profile) for vm in SPLIT)
    )
    light = a_host("h2", *SPLIT)
    again = a_host("h3", *SPLIT)
    fleet = Fleet.build([two, heavy, light, again])
    result = plan(fleet, ask(5))
    assert (result.placed[0].host, result.evidence[0].candidates) == ("h2", 3)


@pytest.mark.parametrize("why", [{"movable": False}, {"nvme": 1}])
def test_who_stays_stays(why: dict[str, object]) -> None:
    fixed = tuple(a_vm(vm.name, vm.profile.shape.vcpus // 2, vm.cells[0], **why) for vm in SPLIT)
    assert refused(plan(Fleet.build([a_host("h1", *fixed)]), ask(5))) == {Reason.NUMA_FIT: 1}


@pytest.mark.parametrize("numa", [NumaPolicy(multi_cell=True), NumaPolicy(cpus=CpuPolicy.SHARED)])
def test_nothing_is_opened_for_whom_no_host_would(numa: NumaPolicy) -> None:
    """Two of one core each, whose memory fits in neither cell, nor in both in equal parts."""
    host = a_host("h1", a_vm("a", 1, 0, 40000), a_vm("b", 1, 1, 20000))
    cells = tuple(replace(cell, shared_cpus=8, shared_vcpus=64, shared_vcpus_free=64) for cell in host.cells)
    request = PlanRequest(
        (VmRequest(UUID(int=1), "vm", Profile(Shape(2, 64000, 1, numa), "x86_64")),), Policy.PACK, most_moves=4
    )
    assert not plan(Fleet.build([replace(host, cells=cells)]), request).placed


def test_vms_do_not_trade_places() -> None:
    # Four cores would be free in cell 0 if a and c changed places, and neither has room to begin.
    host = a_host("h1", a_vm("a", 5, 0), a_vm("c", 4, 1), a_vm("d", 3, 1, movable=False))
    assert refused(plan(Fleet.build([host]), ask(4))) == {Reason.NUMA_FIT: 1}


def test_no_more_moves_than_the_request_allows() -> None:
    host = a_host("h1", a_vm("a", 1, 0), a_vm("b", 1, 0), a_vm("c", 4, 0, movable=False), a_vm("d", 6, 1))
    assert refused(plan(Fleet.build([host]), ask(4, most=1))) == {Reason.NUMA_FIT: 1}
    assert len(told(plan(Fleet.build([host]), ask(4, most=2)))[0]) == 2


def test_later_vms_are_planned_on_the_room_after_the_moves_and_nobody_moves_twice() -> None:
    result = plan(Fleet.build([a_host("h1", *SPLIT)]), ask(5, 1))
    assert [place.cells for place in result.placed] == [(0,), (1,)]
    assert told(result) == [[("h1", "a", (0,), (1,))], []]
    third = plan(Fleet.build([a_host("h1", *SPLIT)]), ask(5, 1, 1))
    assert len(third.placed) == 2


def test_who_was_moved_for_is_planned_anew_after_a_race() -> None:
    """`a` is gone when the plan is made again: nobody has to move any more, and then nobody does."""
    before, after = (Fleet.build([a_host("h1", *vms)]) for vms in (SPLIT, SPLIT[1:]))
    first = plan(before, ask(5))
    assert told(first) == [[("h1", "a", (0,), (1,))]]
    again = Planner(after).plan(ask(5), {first.placed[0].vm_id: (first.placed[0], first.evidence[0])})
    assert told(again) == [[]]
    assert again == plan(after, ask(5))


def fixed(name: str, cores: int, cell: int) -> SeatedVm:
    return a_vm(name, cores, cell, movable=False)


def test_two_vms_of_a_kind_are_each_opened_a_cell_by_moves_of_their_own() -> None:
    vms = (a_vm("a", 2, 0), fixed("k", 3, 0), fixed("l", 5, 1), a_vm("c", 2, 2), fixed("m", 3, 2), fixed("n", 5, 3))
    result = plan(Fleet.build([a_host("h1", *vms, cells=4)]), ask(5, 5))
    assert sorted(move[1] for moves in told(result) for move in moves) == ["a", "c"]
    assert sorted(place.cells for place in result.placed) == [(0,), (2,)]


def test_of_many_that_are_alike_no_more_move_than_have_to() -> None:
    vms = (a_vm("a", 1, 0), a_vm("b", 1, 0), a_vm("c", 1, 0), fixed("k", 4, 0), fixed("l", 7, 1))
    assert told(plan(Fleet.build([a_host("h1", *vms)]), ask(2, most=1))) == [[("h1", "a", (0,), (1,))]]


def test_two_moves_of_little_memory_are_found_behind_dearer_ones() -> None:
    # Five cores have to leave cell 0: a and z, or b and c.
    movable = (a_vm("a", 1, 0, 64), a_vm("b", 2, 0, 128), a_vm("c", 3, 0, 192), a_vm("z", 4, 0, 8192))
    host = a_host("h1", *movable, fixed("l", 7, 1), fixed("m", 6, 2), cells=3, cores=10)
    result = plan(Fleet.build([host]), ask(5, most=2))
    assert [move[1] for move in told(result)[0]] == ["b", "c"]


def test_moves_and_n_plus_one_are_kept_together() -> None:
    # h3 has room for all of h1's, and can't be given more itself: nobody could take its own VM in. So the VM may come
    # to h1, which has to be opened for it, unless x of h2 needs just that room.
    ssd = Where(labels=frozenset({("disk", "ssd")}))
    x = a_vm("x", 3, 0)
    x = replace(x, profile=replace(x.profile, where=ssd))
    h1 = replace(a_host("h1", *SPLIT), labels={"disk": "ssd"})
    h3 = a_host("h3", a_vm("huge", 12, 0), cores=16)
    required = ask(5, spare=SpareRule(Spare.REQUIRED))
    for vms in ((), (x,)):
        fleet = Fleet.build([h1, replace(a_host("h2", *vms, cells=1, cores=3), labels={"disk": "ssd"}), h3])
        assert [each.domain for each in exposed(fleet, Level.HOST)] == ["h3"]
        result = plan(fleet, required)
        assert [each.domain for each in result.exposed] == ["h3"]
        if not vms:
            assert (result.placed[0].host, len(result.evidence[0].moves)) == ("h1", 1)
            assert [each.domain for each in exposed(applied(fleet, required.vms, result), Level.HOST)] == ["h3"]
        else:
            assert refused(result) == {Reason.NUMA_FIT: 1, Reason.VM_LARGER_THAN_CELL: 1, Reason.N_PLUS_ONE: 1}


def test_a_host_that_a_hard_group_closes_is_not_opened() -> None:
    group = (Group("apart"),)
    host = a_host("h1", *(replace(vm, groups=group) for vm in SPLIT))
    asked = ask(5)
    vms = (replace(asked.vms[0], groups=group),)
    assert refused(plan(Fleet.build([host]), replace(asked, vms=vms))) == {Reason.ANTI_AFFINITY: 1}


@pytest.mark.parametrize("policy", Policy)
@pytest.mark.parametrize("all_or_nothing", [True, False])
def test_a_batch_that_fits_as_the_hosts_are_moves_nobody(policy: Policy, *, all_or_nothing: bool) -> None:
    """Exactly room for all: whoever comes first and takes the wrong cell can't be helped by moves."""
    cells = tuple(CellState(cell, cell, 2, cores, cores, 65536, 65536) for cell, cores in ((0, 10), (1, 8)))
    large = [replace(a_host(name), cells=cells) for name in ("h1", "h2")]
    fleet = Fleet.build([*large, replace(a_host("h3"), cells=cells[:1])])
    names = list(enumerate((10, 4, 10, 4, 6, 8, 4)))
    vms = tuple(VmRequest(UUID(int=n + 1), f"v{n}", Profile(Shape(2 * vcpus, 64, 1), "x86_64")) for n, vcpus in names)
    request = PlanRequest(vms, policy, all_or_nothing=all_or_nothing, most_moves=4)
    result = plan(fleet, request)
    assert not result.refused
    assert not result.moves
    assert check(fleet, request, result) == []


@settings(max_examples=100, deadline=None)
@given(seed=SEEDS)
def test_moves_that_are_allowed_cost_nobody_a_place(seed: int) -> None:
    rng = random.Random(seed)
    fleet = an_occupied_fleet(rng)
    vms = tuple(VmRequest(UUID(int=10_000 + n), f"new-{n}", a_profile(rng)) for n in range(rng.randint(1, 6)))
    still = PlanRequest(vms, rng.choice(list(Policy)), all_or_nothing=rng.random() < 0.5)
    moving = replace(still, most_moves=rng.randint(1, MOST))
    assert len(plan(fleet, moving).placed) >= len(plan(fleet, still).placed)
