# SPDX-License-Identifier: Apache-2.0
"""VMs of a few kinds put into cells so that none is left over, by filling one cell after the other, the largest first.

A cell is left only when no other of the VMs fits it any more: one that still does is as well off there as anywhere. And
what is left unused adds up, while the cells to come must hold the VMs to come: where nearly all there is is needed, few
fillings are possible. Just these batches are the hardest for a search that goes from VM to VM.

The literature calls it bin completion. Of the dominance between fillings only the simplest kind is used: one that
another VM could be added to is not tried.

Depth first; bounded, and exact where the bound isn't reached and no host could run out of disk first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import ge, gt, le, mul, sub

import numpy as np

from ppec_orchestrator.placement.balance import Floats
from ppec_orchestrator.placement.fleet import BoolArray, IntArray

# Fillings of one cell that are compared before the one that leaves the least unused is tried.
_COMPARED = 100

# By kind how many; and how much by resource of a cell, then by pool of its host.
Counts = tuple[int, ...]
Amounts = tuple[int, ...]
_ENDLESS = int(np.iinfo(np.int64).max)
_MORE_THAN_ANY = int(np.iinfo(np.int32).max)


@dataclass(frozen=True, slots=True)
class Cells:
    """What there is, and what one VM of each kind takes of it. Shapes: `room` (cells, resources); `needs` (cells,
    kinds, resources), more than there is where a VM of the kind can't be; `host` (cells,), the rows of `disk` (hosts,
    pools); `disk_needs` (kinds, pools)."""

    room: IntArray
    needs: IntArray
    host: IntArray
    disk: IntArray
    disk_needs: IntArray

    def fitting(self) -> IntArray:
        """How many VMs of each kind, and no other, every cell has room for; shape (cells, kinds)."""
        times = np.where(self.needs > 0, self.room[:, None, :] // np.maximum(self.needs, 1), _ENDLESS)
        return times.min(axis=2)  # type: ignore[no-any-return]

    def in_order(self, cells: IntArray, kinds: IntArray) -> Cells:
        return Cells(
            self.room[cells], self.needs[cells][:, kinds], self.host[cells], self.disk.copy(), self.disk_needs[kinds]
        )

    def disk_is_ample(self, counts: IntArray, fitting: IntArray) -> bool:
        """Whether no host can run out of disk, whichever of the VMs it has: cells are full before."""
        most = np.zeros(len(self.disk), dtype=np.int64)
        np.add.at(most, self.host, fitting.max(axis=1, initial=0))
        largest = self.disk_needs.max(axis=0, initial=0)
        enough: BoolArray = (most[:, None] * largest <= self.disk) | (counts @ self.disk_needs <= self.disk)
        return bool(enough.all())


class Filling:
    """One search for so many VMs of each kind, in at most so many steps: looks at one kind in one cell. `exhausted`
    says afterwards that there is no way at all, not just that none was found."""

    def __init__(self, cells: Cells, counts: Sequence[int], most_steps: int) -> None:
        wanted, fitting = np.array(counts, dtype=np.int64), cells.fitting()
        self.exhausted = bool((wanted > fitting.sum(axis=0)).any())
        self.steps_left = 0 if self.exhausted else most_steps
        self._exact = cells.disk_is_ample(wanted, fitting)
        least = np.where(fitting[:, :, None] > 0, cells.needs, _MORE_THAN_ANY).min(axis=0, initial=_MORE_THAN_ANY)
        total = cells.room.sum(axis=0)
        # The less of a resource is left over when all have their place, the more it counts.
        scarcity: Floats = 1 / np.maximum(total - wanted @ least, np.maximum(total / 100, 1))
        self._order, self._kinds = _largest_first(cells.room @ scarcity), _largest_first(least @ scarcity)
        self._cells = cells.in_order(self._order, self._kinds)
        self._weights: list[float] = scarcity.tolist()
        self._counts: Counts = tuple(wanted[self._kinds].tolist())
        self._least: list[list[int]] = least[self._kinds].tolist()
        # Of the cells from each on: all room, and how many VMs of a kind alone have room.
        self._rest = _from_each_on(self._cells.room)
        self._most = _from_each_on(fitting[self._order][:, self._kinds])
        self._dead: set[tuple[int, Counts]] = set()

    def run(self) -> list[tuple[int, int]] | None:
        """A cell and a kind for each of the VMs, in no order; None where that is not found."""
        path = [_Step(self._counts, self._fillings(0, self._counts))]
        while path and self.steps_left > 0:
            step = path[-1]
            self._put(step, len(path) - 1, next(step.fillings, None))
            if step.filling is None:
                self._dead.add((len(path) - 1, step.counts))
                path.pop()
                continue
            left = tuple([count - gone for count, gone in zip(step.counts, step.filling, strict=True)])
            if not any(left):
                return self._named([each.filling or () for each in path])
            path.append(_Step(left, self._fillings(len(path), left)))
        self.exhausted = self.exhausted or (self._exact and self.steps_left > 0)
        return None

    def _put(self, step: _Step, depth: int, filling: Counts | None) -> None:
        """In place of what the cell was filled with before."""
        for counts, sign in ((step.filling, 1), (filling, -1)):
            if counts is not None:
                self._cells.disk[self._cells.host[depth]] += sign * (np.array(counts) @ self._cells.disk_needs)
        step.filling = filling

    def _named(self, path: Sequence[Counts]) -> list[tuple[int, int]]:
        return [
            (int(cell), int(kind))
            for cell, counts in zip(self._order, path, strict=False)
            for kind, count in zip(self._kinds, counts, strict=True)
            for _ in range(count)
        ]

    # --- one cell ----------------------------------------------------------------------------------------------------

    def _fillings(self, depth: int, counts: Counts) -> Iterator[Counts]:
        """Of this cell, so many VMs being left: those that leave little unused first."""
        needed = [sum(map(mul, counts, each)) for each in zip(*self._least, strict=True)]
        spare = [rest - need for rest, need in zip(self._rest[depth], needed, strict=True)]
        if min(spare) < 0 or (depth, counts) in self._dead or any(map(gt, counts, self._most[depth])):
            return
        cells, host = self._cells, self._cells.host[depth]
        room = (*cells.room[depth].tolist(), *cells.disk[host].tolist())
        needs = np.concatenate([cells.needs[depth], cells.disk_needs], axis=1).tolist()
        # Disks are not among what the cells to come must suffice for.
        spare += [_ENDLESS] * cells.disk.shape[1]
        found = self._full(_Cell(needs, counts, spare, _from_each_kind_on(needs, counts, room)), 0, room, ())
        while some := list(islice(found, _COMPARED)):
            some.sort(key=self._unused)
            yield from [filling for filling, _ in some]

    def _unused(self, filled: tuple[Counts, Amounts]) -> float:
        return float(sum(map(mul, filled[1], self._weights)))

    def _full(self, cell: _Cell, kind: int, left: Amounts, chosen: Counts) -> Iterator[tuple[Counts, Amounts]]:
        """With these numbers of the kinds before, and what they leave: all fillings that no VM could be added to, as
        many of the larger kinds as possible first; and what these leave."""
        if kind == len(cell.counts):
            if not any(
                count < most and all(map(ge, left, need))
                for count, most, need in zip(chosen, cell.counts, cell.needs, strict=True)
            ):
                yield chosen, left
            return
        need, later = cell.needs[kind], cell.later[kind + 1]
        most = min([cell.counts[kind], *(amount // each for amount, each in zip(left, need, strict=True) if each)])
        for count in range(most, -1, -1):
            self.steps_left -= 1
            after = tuple([amount - count * each for amount, each in zip(left, need, strict=True)])
            unused = list(map(sub, after, later))
            # Of fewer, even more.
            if self.steps_left <= 0 or any(map(gt, unused, cell.spare)):
                return
            if count < most and all(map(ge, unused, need)):
                return
            yield from self._full(cell, kind + 1, after, (*chosen, count))


@dataclass(slots=True)
class _Step:
    """How many VMs of each kind are left for this cell and those after it, and what it is filled with for now."""

    counts: Counts
    fillings: Iterator[Counts]
    filling: Counts | None = None


@dataclass(frozen=True, slots=True)
class _Cell:
    """What a VM of each kind takes of it, how many there are, how much may stay unused, and what all VMs of the kinds
    from each on could take."""

    needs: list[list[int]]
    counts: Counts
    spare: list[int]
    later: list[list[int]]


def _largest_first(sizes: Floats) -> IntArray:
    order: IntArray = np.argsort(-sizes, kind="stable")
    return order


def _from_each_on(table: IntArray) -> list[list[int]]:
    """The sums of the rows from each on; of none, at the end."""
    sums = np.cumsum(table[::-1], axis=0)[::-1]
    return [*sums.tolist(), [0] * table.shape[1]]


def _from_each_kind_on(needs: Sequence[Sequence[int]], counts: Counts, room: Amounts) -> list[list[int]]:
    sums = [[0] * len(room)]
    for need, count in zip(reversed(needs), reversed(counts), strict=True):
        fits = all(map(le, need, room))
        sums.append([total + count * each * fits for total, each in zip(sums[-1], need, strict=True)])
    return sums[::-1]
