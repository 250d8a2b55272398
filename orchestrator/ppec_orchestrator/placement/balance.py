# SPDX-License-Identifier: Apache-2.0
"""How evenly a fleet is used: Ganeti's cluster score, kept incrementally.

The score is a weighted sum of standard deviations over hosts (htools 3.0, `Ganeti.HTools.Cluster.Metrics`): of the
share of memory that is free, of disk that is free, of CPUs that are used, and of the number of VMs, which stands for
the four loads (CPU, memory, disk, network) that Ganeti counts as one a VM, and for its spindles. Its terms about
mirrored disks are zero here. Of each figure only n, the sum and the sum of squares are kept, so one placement costs the
same in a fleet of ten thousand hosts as in one of ten."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from ppec_orchestrator.placement.demand import CPU, MEMORY, CellResource
from ppec_orchestrator.placement.fleet import Fleet, IntArray, Rows, at
from ppec_orchestrator.placement.items import floats, ints

Floats = NDArray[np.float64]
# In the order of the rows of `Balance.figures`: memory free, disk free, CPUs used, VMs.
WEIGHTS = (1.0, 1.0, 1.0, 4.0 + 1 / 320)
# A variance is weighed before its root is drawn.
_SQUARES = np.array(WEIGHTS) ** 2
_ALL = slice(None)


@dataclass(frozen=True, eq=False)
class Spread:
    """Means and weighed variances of the four figures at one moment; shapes (4, 1)."""

    mean: Floats
    variance: Floats


@dataclass(frozen=True, eq=False)
class Weight:
    """What a VM changes in the figures of a host, by kind of host; and what becomes of the weighed variances then: a
    line in the host's figure, of which the spread decides how high it lies. Shapes (4, kinds)."""

    changes: Floats
    slopes: Floats
    bends: Floats


class Lines(dict[int, tuple[float, ...]]):
    """The lines with one spread; shapes (4, kinds). By kind: slope and offset of each of the four in turn."""

    def __init__(self, slopes: Floats, offsets: Floats) -> None:
        super().__init__()
        self.slopes, self.offsets = slopes, offsets

    def __missing__(self, kind: int) -> tuple[float, ...]:
        pairs = np.stack([self.slopes[:, kind], self.offsets[:, kind]], axis=1)
        self[kind] = found = tuple(pairs.reshape(-1).tolist())
        return found


class Balance:
    """`figures[:, row]` are one host's. Kept around their first mean, where squares lose no digits."""

    def __init__(self, fleet: Fleet) -> None:
        self.hosts = max(len(fleet.hosts), 1)
        self.memory_mib = _whole(fleet, MEMORY, "memory_reserved_mib", _ALL)
        self.cpus = _whole(fleet, CPU, "cores_reserved", _ALL)
        self.disk_mib = np.maximum(fleet.disk_mib, 1).astype(np.float64)
        figures = self._read(fleet, _ALL)
        self._mean = figures.mean(axis=1, keepdims=True) if len(fleet.hosts) else np.zeros((4, 1))
        self.figures: Floats = figures - self._mean
        self._items = [floats(each) for each in self.figures]
        # Of each host what its first three figures are shares of.
        self._sizes: Floats = np.stack([self.memory_mib, self.disk_mib, self.cpus])
        self._size_items = [floats(each) for each in self._sizes]
        self._kinds, self._one_of_kind = _kinds(fleet, self._sizes)
        self._kind_items = ints(self._kinds)
        # Those worked out for the spread of one moment, for as long as somebody has the weight.
        self._lines: WeakKeyDictionary[Weight, Lines] = WeakKeyDictionary()
        self._lines_of: Spread | None = None
        # For `scores_after`: of ten thousand hosts, arrays of its own would take three times as long as what it works
        # out, as the allocator has so large ones from the system each time, and gives them back.
        self._scratch: Floats = np.empty((2, figures.size))
        self._sums: Floats = np.stack([self.figures.sum(axis=1), (self.figures**2).sum(axis=1)])
        # What hosts' figures were when they last had part in the sums, of those that changed since.
        self._summed: dict[int, tuple[float, ...]] = {}
        self.mark()

    def mark(self) -> None:
        """`restore` comes back to here."""
        self._sum_up()
        self._marked: dict[int, tuple[float, ...]] = {}
        self._sums_marked = self._sums.copy()

    def restore(self) -> None:
        """To the last digit, which moving back would not: a plan leaves no trace in the next one's scores."""
        if self._marked:
            self.figures[:, list(self._marked)] = np.array(list(self._marked.values())).T
        self._sums = self._sums_marked
        self._summed.clear()
        self.mark()

    def take(self, row: int, memory_mib: int, disk_mib: int, cpus: int, vms: int) -> None:
        """So much more of one host is taken, by so many VMs; or less, below zero."""
        memory, disk, used, count = self._items
        whole_memory_mib, whole_disk_mib, whole_cpus = self._size_items
        if row not in self._summed:
            self._summed[row] = before = memory[row], disk[row], used[row], count[row]
            self._marked.setdefault(row, before)
        # Item by item, without arrays or a loop: either would take longer than what is worked out.
        memory[row] -= memory_mib / whole_memory_mib[row]
        disk[row] -= disk_mib / whole_disk_mib[row]
        used[row] += cpus / whole_cpus[row]
        count[row] += vms

    def _sum_up(self) -> None:
        """Gives what changed its part in the sums."""
        if self._summed:
            before, rows = np.array(list(self._summed.values())).T, list(self._summed)
            self._summed.clear()
            self._add(before, self.figures[:, rows])

    def _add(self, before: Floats, after: Floats) -> None:
        """To the sums: these figures, shape (4, some hosts), became those."""
        changes = after - before
        self._sums[0] += changes.sum(axis=1)
        changes *= after + before
        self._sums[1] += changes.sum(axis=1)

    def replace(self, rows: IntArray, fleet: Fleet) -> None:
        """The hosts in `rows` have other VMs, and other room, now; they are of the same size."""
        self._sum_up()
        before, after = self.figures[:, rows], self._read(fleet, rows) - self._mean
        self.figures[:, rows] = after
        self._add(before, after)

    def score(self) -> float:
        """The fleet's score; lower is more even."""
        self._sum_up()
        return float(_score(*self._sums / self.hosts))

    def spread(self) -> Spread:
        self._sum_up()
        mean, square = self._sums / self.hosts
        return Spread(mean.reshape(4, 1), ((square - mean * mean) * _SQUARES).reshape(4, 1))

    def weigh(self, memory_mib: int, disk_mib: int, cpus: IntArray) -> Weight:
        """A VM that takes so much; of CPUs by host, alike of one kind.

        With a host's figure x changed by d, the sum S grows by d and the sum of squares by (2x + d)d, so the variance
        changes by (d/n)(2x + d(1 - 1/n) - 2S/n): a line in x.
        """
        rows = self._one_of_kind
        changes = np.ones((4, len(rows)))
        changes[0], changes[1], changes[2] = -memory_mib, -disk_mib, cpus[rows]
        changes[:3] /= self._sizes[:, rows]
        slopes = changes * (2.0 / self.hosts) * _SQUARES.reshape(4, 1)
        return Weight(changes, slopes, changes * slopes * (0.5 - 0.5 / self.hosts))

    def changes_of(self, weight: Weight) -> Floats:
        """What a VM of this weight changes in the figures of each host; shape (4, hosts)."""
        return weight.changes[:, self._kinds]

    def lines(self, weight: Weight, spread: Spread) -> Lines:
        """`spread` may be of an earlier moment."""
        if self._lines_of is not spread:
            self._lines_of = spread
            self._lines.clear()
        found = self._lines.get(weight)
        if found is None:
            offsets = weight.bends - weight.slopes * spread.mean + spread.variance
            found = self._lines[weight] = Lines(weight.slopes, offsets)
        return found

    def scores_after(self, lines: Lines, rows: Rows) -> Floats:
        """The fleet's score if each of the hosts, alone, took the VM."""
        kinds = at(self._kinds, rows)
        parts, offsets = self._scratch[:, : 4 * len(kinds)].reshape(2, 4, len(kinds))
        lines.slopes.take(kinds, axis=1, out=parts, mode="clip")
        lines.offsets.take(kinds, axis=1, out=offsets, mode="clip")
        parts *= self.figures if rows is None else self.figures.take(rows, axis=1)
        parts += offsets
        # Seldom: a variance of nearly nothing that came out below it. To see that there is none is a fifth of the work.
        if parts.size and parts.min() < 0.0:
            np.maximum(parts, 0.0, out=parts)
        np.sqrt(parts, out=parts)
        memory_free, disk_free, cpus_used, vms = parts
        # One after another, as `score_after` adds them up: to the last digit, or equal hosts would not be equal.
        return np.asarray(memory_free + disk_free + cpus_used + vms, dtype=np.float64)

    def score_after(self, lines: Lines) -> Callable[[int], float]:
        """Scores one host as `scores_after` does, now and later: of a handful that is several times faster than with
        arrays."""
        memory_free, disk_free, cpus_used, vms = self._items
        kinds = self._kind_items

        # Without a loop: it would take longer than what is worked out.
        def score(row: int) -> float:
            a, b, c, d, e, f, g, h = lines[kinds[row]]
            try:
                return (
                    sqrt(a * memory_free[row] + b)
                    + sqrt(c * disk_free[row] + d)
                    + sqrt(e * cpus_used[row] + f)
                    + sqrt(g * vms[row] + h)
                )
            except ValueError:
                # A variance of nearly nothing that came out below it.
                return self.scores_after(lines, np.array([row])).item()

        return score

    def scores_after_two(self, row: int, changes: Floats, others: IntArray, theirs: Floats) -> Floats:
        """The fleet's score if the host in `row` changed by one of `changes` and with it the host in the same place of
        `others` by one of `theirs`; shapes (n, 4), (n,) and (n, 4)."""
        self._sum_up()
        mine, other = self.figures[:, row], self.figures[:, others].T
        total, squares = self._sums
        squares = squares + (2.0 * mine + changes) * changes + (2.0 * other + theirs) * theirs
        return _score((total + changes + theirs) / self.hosts, squares / self.hosts)

    def _read(self, fleet: Fleet, rows: slice | IntArray) -> Floats:
        memory, cpus, disk = self.memory_mib[rows], self.cpus[rows], self.disk_mib[rows]
        hosts = fleet.hosts[rows] if isinstance(rows, slice) else [fleet.hosts[row] for row in rows]
        vms = np.array([len(host.vms) for host in hosts], dtype=np.float64)
        cpus_used = 1.0 - _free(fleet, CPU, rows) / cpus
        return np.stack([_free(fleet, MEMORY, rows) / memory, fleet.disk_free_mib[rows] / disk, cpus_used, vms])


def _score(mean: Floats, square: Floats) -> Floats:
    """From the means of the figures and of their squares; the figures are the last axis."""
    return np.asarray(np.sqrt(np.maximum(square - mean * mean, 0.0)) @ np.array(WEIGHTS), dtype=np.float64)


def _kinds(fleet: Fleet, sizes: Floats) -> tuple[IntArray, IntArray]:
    """The kind of each row, and a row of each kind. Of one kind are hosts of the same size whose cells' cores are as
    wide and whose CPUs to share as many: a VM is the same change to them."""
    numbers: dict[bytes, int] = {}
    table = np.column_stack([sizes.T, fleet.threads_per_core, fleet.shared_cpus])
    of_row = np.array([numbers.setdefault(row.tobytes(), len(numbers)) for row in table], dtype=np.int64)
    return of_row, np.unique(of_row, return_index=True)[1]


def _whole(fleet: Fleet, units: Mapping[CellResource, int], reserved: str, rows: slice) -> Floats:
    """All of it that the machine has, the host's own reserve too; at least one, so that shares are finite."""
    total = np.zeros(len(fleet.hosts[rows]))
    total += fleet.cells[reserved][rows].sum(axis=1)
    for resource, unit in units.items():
        total += fleet.capacity(resource)[rows].sum(axis=1) * unit
    return np.maximum(total, 1.0)


def _free(fleet: Fleet, units: Mapping[CellResource, int], rows: slice | IntArray) -> Floats:
    free = np.zeros(len(fleet.disk_mib[rows]))
    for resource, unit in units.items():
        free += fleet.free(resource)[rows].sum(axis=1) * unit
    return free
