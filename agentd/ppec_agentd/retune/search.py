# SPDX-License-Identifier: Apache-2.0
"""Which VMs to move between cells so that one opens, at the least cost. Pure.

Cells are bins of cores and memory; VMs of one *shape* are interchangeable. The search is A* over arrangements (how many
VMs of each shape are in each cell). A step moves one VM into a cell that has room for it *then*: so every sequence
found can be carried out as it stands, with no two VMs ever on one core. The cost is what the memory weighs, then the
number of moves. The estimate of what is left (`_Search.at_least_mib`) never exceeds the truth, so the first arrangement
that reaches the goal costs the least.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import mul

# Expansions before the search for the cheapest sequence becomes one for any good sequence: a second or so.
EXPANSIONS = 20_000
# How much more the estimate counts then: reaching the goal comes before the cost of getting there.
HASTE = 4


@dataclass(frozen=True, slots=True, order=True)
class Shape:
    """What a VM takes of whatever cell it is in. `page_kib` is the size of its pages, 0 the ordinary ones; a VM fits
    only a cell whose cores are `width` threads wide, for that is what its guest was told."""

    cores: int
    memory_mib: int
    page_kib: int = 0
    width: int = 1


@dataclass(frozen=True, slots=True)
class Bin:
    """A cell: what is free in it, by page size for memory, and how many movable VMs of each shape it holds.

    `width` is None for a cell of cores of several widths: nothing moves there, and it is never opened.
    """

    cell: int
    cores_free: int
    memory_free_mib: Mapping[int, int]
    width: int | None
    residents: Mapping[Shape, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Goal:
    """So much is to be free in the cells together."""

    cells: frozenset[int]
    cores: int
    memory_mib: int
    page_kib: int = 0


@dataclass(frozen=True, slots=True)
class Bounds:
    """The most that a retune may move."""

    moves: int
    memory_mib: int


@dataclass(frozen=True, slots=True)
class ShapeMove:
    """One VM of this shape goes from one cell to another."""

    shape: Shape
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Found:
    """A sequence that reaches the goal. `cheapest` is false if the search was cut short before that was certain."""

    moves: tuple[ShapeMove, ...]
    moved_mib: int
    cheapest: bool


def cheapest_moves(bins: Sequence[Bin], goal: Goal, bounds: Bounds, expansions: int = EXPANSIONS) -> Found | None:
    """None if no sequence within the bounds reaches the goal, or none was found in time."""
    search = _Search(bins, goal, bounds)
    found, ended = search.run(1, expansions)
    if not ended:
        found, _ = search.run(HASTE, expansions)
    if found is None:
        return None
    return Found(found, sum(move.shape.memory_mib for move in found), cheapest=ended)


# How many VMs of each shape are in each cell: by position of the cell, then of the shape.
_Arrangement = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class _Reached:
    """An arrangement, what it cost to get there, and how."""

    cost_mib: int
    moves: int
    arrangement: _Arrangement
    came_by: tuple[_Reached, ShapeMove] | None = None

    def path(self) -> tuple[ShapeMove, ...]:
        path: list[ShapeMove] = []
        here = self
        while here.came_by is not None:
            here, move = here.came_by
            path.append(move)
        return tuple(reversed(path))


class _Search:
    def __init__(self, bins: Sequence[Bin], goal: Goal, bounds: Bounds) -> None:
        self._bins = tuple(bins)
        self._goal = goal
        self._bounds = bounds
        self._shapes = tuple(sorted({shape for bin_ in bins for shape in bin_.residents}))
        self._target = [position for position, bin_ in enumerate(self._bins) if bin_.cell in goal.cells]
        self._start: _Arrangement = tuple(
            tuple(bin_.residents.get(shape, 0) for shape in self._shapes) for bin_ in self._bins
        )

        # What a cell would have free without its movable VMs, and what each shape takes: looked up for every step.
        self._cores_of = tuple(shape.cores for shape in self._shapes)
        self._mib_of = {
            page_kib: tuple(shape.memory_mib * (shape.page_kib == page_kib) for shape in self._shapes)
            for page_kib in {goal.page_kib, *(shape.page_kib for shape in self._shapes)}
        }
        held = tuple(zip(self._bins, self._start, strict=True))
        self._empty_cores = [bin_.cores_free + _total(counts, self._cores_of) for bin_, counts in held]
        self._empty_mib = {
            page_kib: [bin_.memory_free_mib.get(page_kib, 0) + _total(counts, sizes) for bin_, counts in held]
            for page_kib, sizes in self._mib_of.items()
        }
        indexes = range(len(self._shapes))
        self._lightest = sorted(indexes, key=lambda i: self._shapes[i].memory_mib / self._shapes[i].cores)
        self._widest = sorted(indexes, key=lambda i: -self._cores_of[i])
        self._largest = sorted(indexes, key=lambda i: -self._mib_of[goal.page_kib][i])

    def run(self, haste: int, expansions: int) -> tuple[tuple[ShapeMove, ...] | None, bool]:
        """The moves, and whether the search came to its own end."""
        start = _Reached(0, 0, self._start)
        at_least = self.at_least(start.arrangement)
        if at_least is None or not self.room_in_all():
            return None, True
        best: dict[_Arrangement, list[tuple[int, int]]] = {start.arrangement: [(0, 0)]}
        # The order of arrival breaks ties, so that equal inputs give equal plans.
        queue: list[tuple[int, int, int, _Reached]] = [(haste * at_least[0], 0, 0, start)]
        arrivals = 0
        while queue:
            *_, here = heapq.heappop(queue)
            if self._reached(here.arrangement):
                return here.path(), True
            if not expansions:
                return None, False
            expansions -= 1
            for there in self._steps(here):
                # Most arrangements are come to many times: what is known of them is asked before what has to be found.
                if _dominated(best.setdefault(there.arrangement, []), there):
                    continue
                left = self.at_least(there.arrangement)
                if left is None or there.cost_mib + left[0] > self._bounds.memory_mib:
                    continue
                if there.moves + left[1] > self._bounds.moves:
                    continue
                arrivals += 1
                heapq.heappush(queue, (there.cost_mib + haste * left[0], there.moves, arrivals, there))
        return None, True

    def _steps(self, here: _Reached) -> Iterator[_Reached]:
        if here.moves >= self._bounds.moves:
            return
        for source, target, index in self._possible(here.arrangement):
            shape = self._shapes[index]
            move = ShapeMove(shape, self._bins[source].cell, self._bins[target].cell)
            arrangement = _moved(here.arrangement, source, target, index)
            yield _Reached(here.cost_mib + shape.memory_mib, here.moves + 1, arrangement, (here, move))

    def _possible(self, arrangement: _Arrangement) -> Iterator[tuple[int, int, int]]:
        for target, bin_ in enumerate(self._bins):
            for index, shape in enumerate(self._shapes):
                if bin_.width == shape.width and self._has_room(arrangement, target, shape):
                    for source, counts in enumerate(arrangement):
                        if source != target and counts[index]:
                            yield source, target, index

    def _has_room(self, arrangement: _Arrangement, position: int, shape: Shape) -> bool:
        return (
            self._cores_free(arrangement, position) >= shape.cores
            and self._memory_free_mib(arrangement, position, shape.page_kib) >= shape.memory_mib
        )

    def _reached(self, arrangement: _Arrangement) -> bool:
        cores, memory_mib = self._lacking(arrangement)
        return cores <= 0 and memory_mib <= 0

    def at_least(self, arrangement: _Arrangement) -> tuple[int, int] | None:
        """Lower bounds on the MiB and the moves still to come; None if all of the target cells would not be enough.

        The missing memory must be moved itself. The missing cores are freed for the least memory by fractions of VMs,
        those with the least memory on a core first; and in the fewest moves by the largest VMs.
        """
        cores, memory_mib = self._lacking(arrangement)
        there = [sum(counts) for counts in zip(*(arrangement[position] for position in self._target), strict=True)]
        sizes_mib = self._mib_of[self._goal.page_kib]
        if memory_mib > _total(there, sizes_mib):
            return None
        weight_mib, cores_left = 0.0, cores
        for index in self._lightest:
            if cores_left <= 0:
                break
            freed = min(cores_left, self._cores_of[index] * there[index])
            weight_mib += self._shapes[index].memory_mib * freed / self._cores_of[index]
            cores_left -= freed
        if cores_left > 0:
            return None
        moves = max(
            _fewest(cores, there, self._cores_of, self._widest), _fewest(memory_mib, there, sizes_mib, self._largest)
        )
        return max(int(weight_mib), memory_mib, 0), moves

    def room_in_all(self) -> bool:
        """Whether the cells together have free what is to be free in some: moves only shift it.

        Those of the same width, that is, for no VM moves to others. Without this all arrangements of a full host would
        be tried before it is given up.
        """
        goal, widths = self._goal, {self._bins[position].width for position in self._target}
        cores = memory_mib = 0
        for position, bin_ in enumerate(self._bins):
            if bin_.width not in widths:
                continue
            free_mib = bin_.memory_free_mib.get(goal.page_kib, 0)
            cores += bin_.cores_free
            # Where more is taken than there is, nobody else has less for it.
            memory_mib += free_mib if position in self._target else max(0, free_mib)
        return cores >= goal.cores and memory_mib >= goal.memory_mib

    def _lacking(self, arrangement: _Arrangement) -> tuple[int, int]:
        goal = self._goal
        cores = sum(self._cores_free(arrangement, position) for position in self._target)
        memory = sum(self._memory_free_mib(arrangement, position, goal.page_kib) for position in self._target)
        return goal.cores - cores, goal.memory_mib - memory

    def _cores_free(self, arrangement: _Arrangement, position: int) -> int:
        return self._empty_cores[position] - _total(arrangement[position], self._cores_of)

    def _memory_free_mib(self, arrangement: _Arrangement, position: int, page_kib: int) -> int:
        return self._empty_mib[page_kib][position] - _total(arrangement[position], self._mib_of[page_kib])


def _total(counts: Sequence[int], sizes: Sequence[int]) -> int:
    total: int = sum(map(mul, counts, sizes))
    return total


def _fewest(lacking: int, there: Sequence[int], sizes: Sequence[int], largest_first: Sequence[int]) -> int:
    """How many of these, of each size so many, make up for what is lacking; all of them if they don't."""
    fewest = 0
    for index in largest_first:
        if lacking <= 0 or not sizes[index]:
            break
        used = min(there[index], -(-lacking // sizes[index]))
        lacking -= used * sizes[index]
        fewest += used
    return fewest


def _moved(arrangement: _Arrangement, source: int, target: int, index: int) -> _Arrangement:
    there = list(arrangement)
    for position, change in ((source, -1), (target, 1)):
        counts = there[position]
        there[position] = (*counts[:index], counts[index] + change, *counts[index + 1 :])
    return tuple(there)


def _dominated(known: list[tuple[int, int]], there: _Reached) -> bool:
    """Whether the arrangement was reached before for no more memory *and* no more moves; else it is noted.

    Cost alone would not do: a way that costs more memory but fewer moves may be the only one within the bounds.
    """
    now = (there.cost_mib, there.moves)
    if any(cost <= now[0] and moves <= now[1] for cost, moves in known):
        return True
    known.append(now)
    return False
