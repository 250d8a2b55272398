# SPDX-License-Identifier: Apache-2.0
"""Whom to leave out of VMs that are too many for the cells there are, so that those who stay are worth the most.

Each cell is a knapsack, and filled as well as can be by itself; what they compete for are the VMs. So each kind of VM
has a price: a cell takes one only for what it is worth beyond that. Cells are filled one after the other, again and
again; a kind that was gone before the last cell gets dearer, one that is left over cheaper. Prices soon have a cell
with much memory take the VMs that need it, though others fill its CPUs as well, and leave these to cells with little.
Then a few cells at a time are emptied and filled anew, and stay so if nothing was lost.

The literature calls it a multiple knapsack problem; the prices are Lagrange multipliers that are found by ascent, the
emptying and filling is a large neighbourhood search. Bounded, and not exact: how good it is, the benchmark says beside
a mixed-integer program (decision 0030).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from operator import add, le, mul, sub

import numpy as np

from ppec_orchestrator.placement.filling import Amounts, Cells, Counts

# Of more ways to begin the filling of a cell only the most promising are gone on with.
_MOST_BEGUN = 1000
# Of many more they are looked at before all of a kind are begun.
_MOST_AT_ONCE = 16 * _MOST_BEGUN
# How often all cells are filled one after the other to find the prices, by what part of its worth one changes in the
# first round and in the last, and the most it can be. Those of the last rounds swing about where they should be.
_ROUNDS, _LAST_ROUNDS = 20, 10
_FIRST_STEP, _LAST_STEP = 0.12, 0.02
_DEAREST = 0.9
_MOST_SHOWN = 150
# Cells that are emptied at once, and how far off prices are taken then, so that the same ones are not filled the same.
_EMPTIED, _DOUBT = (2, 3, 4), 0.1
# And how often that is tried in vain; the last gain came after 500 at most, on fleets that were measured.
_PATIENCE = 1000


@dataclass(frozen=True, slots=True)
class _Filled:
    """Of each cell how many VMs of each kind, what of each kind is left over, what of each host's pools, and what those
    placed are worth."""

    fillings: list[Counts]
    left: Counts
    disk: list[Amounts]
    worth: int


class Knapsacks:
    """`counts` are the VMs of each kind, `worths` what one of them is worth. Steps are VMs of one kind put into one
    cell, to see."""

    def __init__(self, cells: Cells, counts: Sequence[int], worths: Sequence[int], most_steps: int) -> None:
        self.steps_left = most_steps
        self._counts, self._worths = tuple(counts), tuple(worths)
        self._room: list[list[int]] = cells.room.tolist()
        self._host: list[int] = cells.host.tolist()
        self._disk: list[Amounts] = [tuple(row) for row in cells.disk.tolist()]
        self._disk_needs: list[list[int]] = cells.disk_needs.tolist()
        self._needs: list[list[Amounts]] = [
            [(*need, *disk) for need, disk in zip(of_cell, self._disk_needs, strict=True)]
            for of_cell in cells.needs.tolist()
        ]
        # The same each time: a plan made twice is the same.
        self._dice = random.Random(0)  # noqa: S311 - nothing is kept secret by it
        fitting = cells.fitting()
        # The largest first: what is left is for the small ones.
        self._kinds = sorted(range(len(counts)), key=lambda kind: int(fitting[:, kind].sum()))
        sizes = cells.room @ (1 / np.maximum(cells.room.sum(axis=0), 1))
        self._smallest_first: list[int] = np.argsort(sizes, kind="stable").tolist()
        self._most = _most_worth(cells, worths)
        none = (0,) * len(self._counts)
        self._empty = self._best = _Filled([none] * len(self._room), self._counts, self._disk, 0)

    def run(self) -> list[tuple[int, int]]:
        """A cell and a kind for each of the VMs that stay, in no order."""
        prices = self._prices()
        best = max(self._best, self._filled(self._empty, self._smallest_first, prices), key=_worth_of)
        best = self._some_anew(best, prices)
        return [
            (cell, kind)
            for cell, filling in enumerate(best.fillings)
            for kind, count in enumerate(filling)
            for _ in range(count)
        ]

    # --- all cells ---------------------------------------------------------------------------------------------------

    def _prices(self) -> list[float]:
        """The mean of the last rounds'."""
        prices = [0.0] * len(self._counts)
        last: list[list[float]] = []
        # Of many cells some show as well what is scarce, if they have no more than their share of the VMs.
        parts = -(-len(self._room) // _MOST_SHOWN)
        empty = replace(self._empty, left=tuple(-(-count // parts) for count in self._counts))
        # Half of the steps are for what the prices are for.
        enough = self.steps_left // 2
        for number in range(_ROUNDS):
            found = self._filled(empty, self._smallest_first[::parts], prices, steps_kept=enough)
            if parts == 1:
                self._best = max(self._best, found, key=_worth_of)
            last = [*last, prices][-_LAST_ROUNDS:]
            if self.steps_left <= enough or self._is_over(self._best):
                break
            step = _FIRST_STEP + (_LAST_STEP - _FIRST_STEP) * number / _ROUNDS
            prices = [
                min(_DEAREST * worth, max(0.0, price + step * worth * _demand(left, count)))
                for price, left, count, worth in zip(prices, found.left, empty.left, self._worths, strict=True)
            ]
        return [sum(of_kind) / len(last) for of_kind in zip(*last, strict=True)]

    def _is_over(self, best: _Filled) -> bool:
        return self.steps_left <= 0 or best.worth >= self._most or not any(best.left)

    def _some_anew(self, best: _Filled, prices: Sequence[float]) -> _Filled:
        """The prices are a little off each time, so that the same cells are not filled the same."""
        cells, in_vain = range(len(self._room)), 0
        while in_vain < _PATIENCE and not self._is_over(best):
            some = self._dice.sample(cells, min(len(cells), self._dice.choice(_EMPTIED)))
            doubted = [price * self._dice.uniform(1 - _DOUBT, 1 + _DOUBT) for price in prices]
            other = self._filled(self._emptied(best, some), some, doubted)
            in_vain = 0 if other.worth > best.worth else in_vain + 1
            # Of two that are worth the same: the one that leaves what others can use.
            if (other.worth, _cost(prices, other.left)) >= (best.worth, _cost(prices, best.left)):
                best = other
        return best

    def _emptied(self, filled: _Filled, cells: Iterable[int]) -> _Filled:
        fillings, left, disk, worth = list(filled.fillings), filled.left, list(filled.disk), filled.worth
        for cell in cells:
            counts = fillings[cell]
            left = tuple(map(add, left, counts))
            worth -= _worth(self._worths, counts)
            disk[self._host[cell]] = tuple(map(add, disk[self._host[cell]], self._disk_of(counts)))
            fillings[cell] = (0,) * len(counts)
        return _Filled(fillings, left, disk, worth)

    def _filled(
        self, filled: _Filled, cells: Iterable[int], prices: Sequence[float], *, steps_kept: int = 0
    ) -> _Filled:
        """With these cells, which were empty, filled in this order, as far as there are steps."""
        fillings, left, disk, worth = list(filled.fillings), filled.left, list(filled.disk), filled.worth
        values = [worth - price for worth, price in zip(self._worths, prices, strict=True)]
        for cell in cells:
            if self.steps_left <= steps_kept:
                break
            host = self._host[cell]
            counts = self._best_filling(cell, left, disk[host], values)
            fillings[cell], left = counts, tuple(map(sub, left, counts))
            disk[host] = tuple(map(sub, disk[host], self._disk_of(counts)))
            worth += _worth(self._worths, counts)
        return _Filled(fillings, left, disk, worth)

    def _disk_of(self, counts: Counts) -> Amounts:
        return tuple(sum(map(mul, counts, pool)) for pool in zip(*self._disk_needs, strict=True))

    # --- one cell ----------------------------------------------------------------------------------------------------

    def _best_filling(self, cell: int, left: Counts, disk: Amounts, values: Sequence[float]) -> Counts:
        """The filling of the highest value, by dynamic programming: of all that leave the same, one is gone on with."""
        room = (*self._room[cell], *disk)
        needs = self._needs[cell]
        fit = [kind for kind in self._kinds if left[kind] and all(map(le, needs[kind], room))]
        begun: dict[Amounts, tuple[float, Counts]] = {room: (0.0, ())}
        for kind in fit:
            further: dict[Amounts, tuple[float, Counts]] = {}
            need, value = needs[kind], values[kind]
            for still, (so_far, chosen) in begun.items():
                count, rest = 0, still
                while True:
                    self.steps_left -= 1
                    known = further.get(rest)
                    total = so_far + count * value
                    if known is None or known[0] < total:
                        further[rest] = total, (*chosen, count)
                    count += 1
                    if count > left[kind] or not all(map(le, need, rest)):
                        break
                    rest = tuple(map(sub, rest, need))
                if len(further) > _MOST_AT_ONCE:
                    further = _most_promising(further, room)
            begun = further if len(further) <= _MOST_BEGUN else _most_promising(further, room)
        # Of the same value: what leaves the least.
        best = min(begun.items(), key=lambda each: (-each[1][0], each[0]))[1][1]
        of_kind = dict(zip(fit, best, strict=True))
        return tuple(of_kind.get(kind, 0) for kind in range(len(left)))


def _most_promising(begun: dict[Amounts, tuple[float, Counts]], room: Amounts) -> dict[Amounts, tuple[float, Counts]]:
    """Those that have got the most for what they used."""

    def promise(each: tuple[Amounts, tuple[float, Counts]]) -> float:
        rest, (value, _) = each
        used = max((1 - amount / whole for amount, whole in zip(rest, room, strict=True) if whole), default=0.0)
        return -value / used if used else 0.0

    return dict(sorted(begun.items(), key=promise)[:_MOST_BEGUN])


def _demand(left: int, count: int) -> float:
    """How a kind's price changes, in steps: by one upwards if it was gone, downwards by up to one if it was left."""
    return 1.0 if left == 0 else -min(1.0, 4 * left / count)


def _most_worth(cells: Cells, worths: Sequence[int]) -> float:
    """What is there is worth no more than if all of some resource of each cell went to the kind of VM that is worth the
    most for what it takes of it."""
    with np.errstate(divide="ignore"):
        rates = (np.array(worths, dtype=np.float64)[None, :, None] / cells.needs).max(axis=1)
    with np.errstate(invalid="ignore"):
        # Nothing of a resource, for VMs that need none of it, bounds nothing.
        bounds = np.nan_to_num(cells.room * rates, nan=np.inf, posinf=np.inf)
    return float(bounds.min(axis=1).sum())


def _worth(worths: Sequence[int], counts: Counts) -> int:
    return sum(map(mul, worths, counts))


def _worth_of(filled: _Filled) -> int:
    return filled.worth


def _cost(prices: Sequence[float], left: Counts) -> float:
    return sum(price * count for price, count in zip(prices, left, strict=True))
