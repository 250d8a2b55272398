# SPDX-License-Identifier: Apache-2.0
"""The search for the cheapest moves, against a plain exhaustive one that knows no shapes, no estimate and no order."""

from __future__ import annotations

import heapq
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppec_agentd.retune.search import Bin, Bounds, Found, Goal, Shape, ShapeMove, _Search, cheapest_moves

GENEROUS = Bounds(moves=5, memory_mib=10**9)


def bin_of(cell: int, cores: int, memory_mib: int, *residents: Shape, width: int | None = 1) -> Bin:
    """A cell of so many cores and MiB in all, with these VMs in it."""
    return Bin(
        cell,
        cores - sum(vm.cores for vm in residents),
        {0: memory_mib - sum(vm.memory_mib for vm in residents if not vm.page_kib)},
        width,
        Counter(residents),
    )


def replayed(bins: list[Bin], found: Found) -> dict[int, tuple[int, int]]:
    """Cores and memory free per cell after the moves; each has room when it is made, and a VM to move."""
    cores = {b.cell: b.cores_free for b in bins}
    memory = {b.cell: dict(b.memory_free_mib) for b in bins}
    residents = {b.cell: Counter(b.residents) for b in bins}
    widths = {b.cell: b.width for b in bins}
    for move in found.moves:
        shape = move.shape
        assert residents[move.source][shape] > 0
        assert widths[move.target] == shape.width
        cores[move.target] -= shape.cores
        memory[move.target][shape.page_kib] = memory[move.target].get(shape.page_kib, 0) - shape.memory_mib
        assert cores[move.target] >= 0
        assert memory[move.target][shape.page_kib] >= 0
        cores[move.source] += shape.cores
        memory[move.source][shape.page_kib] = memory[move.source].get(shape.page_kib, 0) + shape.memory_mib
        residents[move.source][shape] -= 1
        residents[move.target][shape] += 1
    return {cell: (cores[cell], memory[cell].get(0, 0)) for cell in cores}


def exhaustive(bins: list[Bin], goal: Goal, bounds: Bounds) -> tuple[int, int] | None:
    """The least (MiB, moves), by Dijkstra's algorithm over where each single VM is."""
    vms = [(shape, b.cell) for b in bins for shape, count in b.residents.items() for _ in range(count)]
    shapes = [shape for shape, _ in vms]
    start = tuple(cell for _, cell in vms)
    whole = {b.cell: (b.cores_free + _cores(b), b.memory_free_mib.get(0, 0) + _memory(b)) for b in bins}

    def free(where: tuple[int, ...], cell: int) -> tuple[int, int]:
        there = [shape for shape, at in zip(shapes, where, strict=True) if at == cell]
        return whole[cell][0] - sum(s.cores for s in there), whole[cell][1] - sum(s.memory_mib for s in there)

    queue, seen = [(0, 0, start)], set()
    while queue:
        cost, moves, where = heapq.heappop(queue)
        if (moves, where) in seen:
            continue
        seen.add((moves, where))
        opened = [free(where, cell) for cell in goal.cells]
        if sum(c for c, _ in opened) >= goal.cores and sum(m for _, m in opened) >= goal.memory_mib:
            return cost, moves
        if moves == bounds.moves:
            continue
        for index, shape in enumerate(shapes):
            for b in bins:
                cores, memory = free(where, b.cell)
                fits = b.width == shape.width and cores >= shape.cores and memory >= shape.memory_mib
                if b.cell != where[index] and fits and cost + shape.memory_mib <= bounds.memory_mib:
                    there = (*where[:index], b.cell, *where[index + 1 :])
                    heapq.heappush(queue, (cost + shape.memory_mib, moves + 1, there))
    return None


def _cores(b: Bin) -> int:
    return sum(shape.cores * count for shape, count in b.residents.items())


def _memory(b: Bin) -> int:
    return sum(shape.memory_mib * count for shape, count in b.residents.items())


SHAPES = st.builds(Shape, cores=st.integers(1, 3), memory_mib=st.sampled_from([1, 4, 10]))


@st.composite
def hosts(draw: st.DrawFn) -> list[Bin]:
    bins = []
    for cell in range(draw(st.integers(2, 3))):
        residents = draw(st.lists(SHAPES, max_size=2))
        cores = sum(vm.cores for vm in residents) + draw(st.integers(0, 3))
        memory_mib = sum(vm.memory_mib for vm in residents) + draw(st.integers(0, 12))
        bins.append(bin_of(cell, cores, memory_mib, *residents))
    return bins


@given(
    bins=hosts(),
    cores=st.integers(0, 6),
    memory_mib=st.integers(0, 16),
    moves=st.integers(0, 4),
    mib=st.integers(0, 30),
)
def test_it_finds_the_cheapest_sequence_that_can_be_carried_out_or_says_that_there_is_none(
    bins: list[Bin], cores: int, memory_mib: int, moves: int, mib: int
) -> None:
    goal, bounds = Goal(frozenset({0}), cores, memory_mib), Bounds(moves, mib)
    found = cheapest_moves(bins, goal, bounds)
    wanted = exhaustive(bins, goal, bounds)
    if found is None:
        assert wanted is None
        return
    assert found.cheapest
    assert (found.moved_mib, len(found.moves)) == wanted
    after = replayed(bins, found)
    assert after[0][0] >= cores
    assert after[0][1] >= memory_mib


@given(bins=hosts(), cores=st.integers(0, 6))
def test_a_search_cut_short_still_finds_only_what_can_be_carried_out(bins: list[Bin], cores: int) -> None:
    found = cheapest_moves(bins, Goal(frozenset({0}), cores, 0), GENEROUS, expansions=3)
    if found is not None:
        assert replayed(bins, found)[0][0] >= cores


SMALL, BIG = Shape(2, 100), Shape(4, 50)


def test_an_open_cell_needs_no_move() -> None:
    found = cheapest_moves([bin_of(0, 8, 1000), bin_of(1, 8, 1000, BIG)], Goal(frozenset({0}), 8, 1000), GENEROUS)
    assert found == Found((), 0, cheapest=True)


def test_the_lighter_vms_leave() -> None:
    bins = [bin_of(0, 8, 1000, SMALL, BIG), bin_of(1, 8, 1000)]
    found = cheapest_moves(bins, Goal(frozenset({0}), 4, 0), GENEROUS)
    assert found == Found((ShapeMove(BIG, 0, 1),), 50, cheapest=True)


def test_room_is_made_first_where_there_is_none() -> None:
    """The four cores of BIG fit nowhere before the small VM of cell 1 has gone to cell 2."""
    bins = [bin_of(0, 4, 1000, BIG), bin_of(1, 4, 1000, SMALL), bin_of(2, 2, 1000)]
    found = cheapest_moves(bins, Goal(frozenset({0}), 4, 0), GENEROUS)
    assert found is not None
    assert found.moves == (ShapeMove(SMALL, 1, 2), ShapeMove(BIG, 0, 1))


@pytest.mark.parametrize(
    "bounds", [Bounds(moves=1, memory_mib=10**6), Bounds(moves=5, memory_mib=149)], ids=["moves", "memory"]
)
def test_a_bound_that_is_too_low_finds_nothing(bounds: Bounds) -> None:
    bins = [bin_of(0, 4, 1000, BIG), bin_of(1, 4, 1000, SMALL), bin_of(2, 2, 1000)]
    assert cheapest_moves(bins, Goal(frozenset({0}), 4, 0), bounds) is None


def test_a_host_without_the_room_in_all_is_given_up_before_anything_is_tried() -> None:
    crowded = [bin_of(cell, 40, 100, *[Shape(cores, 1) for cores in (1, 2, 3) * 4]) for cell in range(4)]
    assert sum(b.cores_free for b in crowded) == 64
    search = _Search(crowded, Goal(frozenset({0, 1}), 65, 0), Bounds(256, 10**9))
    assert search.run(1, expansions=0) == (None, True)
    roomy = _Search(crowded, Goal(frozenset({0, 1}), 64, 0), Bounds(256, 10**9))
    assert roomy.run(1, expansions=0) == (None, False)


def test_too_few_moves_are_given_up_without_trying_all_of_them() -> None:
    cells = [bin_of(0, 24, 100, *[Shape(cores, 1) for cores in (1, 2, 3) * 4]), bin_of(1, 24, 100)]
    search = _Search(cells, Goal(frozenset({0}), 24, 0), Bounds(moves=11, memory_mib=10**9))
    assert search.run(1, expansions=1) == (None, True)
    assert len(cheapest_moves(cells, Goal(frozenset({0}), 24, 0), Bounds(12, 10**9)).moves) == 12  # type: ignore[union-attr]


def test_two_full_cells_can_only_change_places_through_free_cores() -> None:
    full = [bin_of(0, 4, 1000, BIG), bin_of(1, 4, 1000, SMALL, SMALL)]
    assert cheapest_moves(full, Goal(frozenset({0}), 4, 0), GENEROUS) is None


def test_cores_of_another_width_take_no_vm() -> None:
    bins = [bin_of(0, 4, 1000, BIG), bin_of(1, 4, 1000, width=2), bin_of(2, 4, 1000, width=None)]
    assert cheapest_moves(bins, Goal(frozenset({0}), 4, 0), GENEROUS) is None


def test_huge_pages_and_ordinary_memory_are_not_the_same_room() -> None:
    huge = Shape(2, 100, page_kib=2048)
    bins = [Bin(0, 0, {0: 0, 2048: 0}, 1, {huge: 1}), Bin(1, 2, {0: 1000, 2048: 50}, 1)]
    assert cheapest_moves(bins, Goal(frozenset({0}), 2, 0), GENEROUS) is None
    roomy = [bins[0], Bin(1, 2, {0: 0, 2048: 100}, 1)]
    found = cheapest_moves(roomy, Goal(frozenset({0}), 2, 0), GENEROUS)
    assert found == Found((ShapeMove(huge, 0, 1),), 100, cheapest=True)


def test_a_large_host_is_searched_within_its_budget() -> None:
    """Eight cells of sixty cores, a hundred VMs of five shapes: a sequence is found, cheapest or not."""
    shapes = [Shape(cores, cores * weight) for cores, weight in ((1, 4), (2, 4), (4, 2), (8, 8), (2, 16))]
    bins = []
    for cell in range(8):
        residents = [shapes[(cell * 7 + n) % 5] for n in range(13)]
        bins.append(bin_of(cell, 60, 600, *residents))
    goal = Goal(frozenset({3}), 60, 0)
    found = cheapest_moves(bins, goal, Bounds(moves=40, memory_mib=10**6), expansions=2000)
    assert found is not None
    assert replayed(bins, found)[3][0] == 60
