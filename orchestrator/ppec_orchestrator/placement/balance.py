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
from functools import cached_property
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from ppec_orchestrator.placement.demand import CPU, MEMORY, CellResource
from ppec_orchestrator.placement.fleet import Fleet, IntArray, Rows, at
from ppec_orchestrator.placement.items import floats, ints

Floats = NDArray[np.float64]
# In the order of the rows of `Balance.figures`: memory free, disk free, CPUs used, VMs.
WEIGHTS = (1.0, 1.0, 1.0, 4.0 + 1 / 320)
_WEIGHTS_DOWN = np.array(WEIGHTS).reshape(4, 1)
Change = tuple[float, float, float, float]
_ALL = slice(None)


@dataclass(frozen=True, eq=False)
class Spread:
    """Variances and doubled means of the four figures at one moment."""

    variance: Change
    twice_mean: Change


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
        # For `scores_after`: of ten thousand hosts, arrays of its own would take three times as long as what it works
        # out, as the allocator has so large ones from the system each time, and gives them back.
        self._scratch: Floats = np.empty((3, *figures.shape))
        self._sum = [float(each) for each in self.figures.sum(axis=1)]
        self._squares = [float(each) for each in (self.figures**2).sum(axis=1)]
        self.mark()

    def mark(self) -> None:
        """`restore` comes back to here."""
        self._marked: dict[int, list[float]] = {}
        self._sums_marked = (list(self._sum), list(self._squares))

    def restore(self) -> None:
        """To the last digit, which moving back would not: a plan leaves no trace in the next one's scores."""
        for row, figures in self._marked.items():
            self.figures[:, row] = figures
        self._sum, self._squares = self._sums_marked
        self.mark()

    def take(self, row: int, memory_mib: int, disk_mib: int, cpus: int, vms: int) -> None:
        """So much more of one host is taken, by so many VMs; or less, below zero."""
        memory, disk, used, count = self._items
        whole_memory_mib, whole_disk_mib, whole_cpus = self._size_items
        if row not in self._marked:
            self._marked[row] = [memory[row], disk[row], used[row], count[row]]
        # Item by item, without arrays or a loop: either would take longer than what is worked out.
        self._changed(0, memory, row, -memory_mib / whole_memory_mib[row])
        self._changed(1, disk, row, -disk_mib / whole_disk_mib[row])
        self._changed(2, used, row, cpus / whole_cpus[row])
        self._changed(3, count, row, vms)

    def _changed(self, figure: int, items: memoryview[float], row: int, by: float) -> None:
        was = items[row]
        now = items[row] = was + by
        self._sum[figure] += by
        self._squares[figure] += now * now - was * was

    def replace(self, rows: IntArray, fleet: Fleet) -> None:
        """The hosts in `rows` have other VMs, and other room, now; they are of the same size."""
        before, after = self.figures[:, rows], self._read(fleet, rows) - self._mean
        self.figures[:, rows] = after
        for figure, (more, squares) in enumerate(
            zip((after - before).sum(axis=1), (after**2 - before**2).sum(axis=1), strict=True)
        ):
            self._sum[figure] += float(more)
            self._squares[figure] += float(squares)

    def score(self) -> float:
        """The fleet's score; lower is more even."""
        variances = [q / self.hosts - (s / self.hosts) ** 2 for s, q in zip(self._sum, self._squares, strict=True)]
        return sum(weight * sqrt(max(v, 0.0)) for weight, v in zip(WEIGHTS, variances, strict=True))

    def spread(self) -> Spread:
        means = [total / self.hosts for total in self._sum]
        a, b, c, d = (squares / self.hosts - mean**2 for squares, mean in zip(self._squares, means, strict=True))
        e, f, g, h = (2.0 * mean for mean in means)
        return Spread((a, b, c, d), (e, f, g, h))

    def changes_of(self, weight: Weight, rows: Rows, out: Floats | None = None) -> Floats:
        """What a VM of this weight changes in the figures of each host; shape (4, hosts)."""
        cpus, sizes = at(weight.cpus, rows), self._sizes if rows is None else self._sizes.take(rows, axis=1)
        changes = np.empty((4, len(cpus))) if out is None else out
        changes[0] = -weight.memory_mib
        changes[1] = -weight.disk_mib
        changes[2] = cpus
        changes[:3] /= sizes
        changes[3] = 1.0
        return changes

    def scores_after(self, weight: Weight, rows: Rows, spread: Spread) -> Floats:
        """The fleet's score if each of the hosts, alone, took the VM. `spread` may be of an earlier moment.

        With a host's figure x changed by d, the sum S grows by d and the sum of squares by (2x + d)d, so the variance
        changes by (d/n)(2x + d(1 - 1/n) - 2S/n).
        """
        figures = self.figures if rows is None else self.figures.take(rows, axis=1)
        parts, changes, rest = (each[:, : figures.shape[1]] for each in self._scratch)
        variance, twice_mean = (np.array(each).reshape(4, 1) for each in (spread.variance, spread.twice_mean))
        self.changes_of(weight, rows, changes)
        np.multiply(figures, 2.0, out=parts)
        parts += np.multiply(changes, 1.0 - 1.0 / self.hosts, out=rest)
        parts -= twice_mean
        changes /= self.hosts
        parts *= changes
        parts += variance
        np.maximum(parts, 0.0, out=parts)
        np.sqrt(parts, out=parts)
        parts *= _WEIGHTS_DOWN
        # One after another, as `score_after` adds them up: to the last digit, or equal hosts would not be equal.
        return np.asarray(parts[0] + parts[1] + parts[2] + parts[3], dtype=np.float64)

    def score_after(self, weight: Weight, spread: Spread) -> Callable[[int], float]:
        """Scores one host as `scores_after` does, now and later: of a handful that is several times faster than with
        arrays."""
        less_memory_mib, less_disk_mib, more_cpus = -weight.memory_mib, -weight.disk_mib, weight.cpu_items
        (memory_mib, disk_mib, cpus), hosts, rest = self._size_items, self.hosts, 1.0 - 1.0 / self.hosts
        memory_free, disk_free, cpus_used, vms = self._items
        a, b, c, d = spread.variance
        e, f, g, h = spread.twice_mean
        u, v, w, x = WEIGHTS

        # Without a loop: it would take longer than what is worked out.
        def score(row: int) -> float:
            change = less_memory_mib / memory_mib[row]
            memory = (2.0 * memory_free[row] + change * rest - e) * (change / hosts) + a
            change = less_disk_mib / disk_mib[row]
            disk = (2.0 * disk_free[row] + change * rest - f) * (change / hosts) + b
            change = more_cpus[row] / cpus[row]
            cpu = (2.0 * cpus_used[row] + change * rest - g) * (change / hosts) + c
            vm = (2.0 * vms[row] + rest - h) * (1.0 / hosts) + d
            return (
                (sqrt(memory) * u if memory > 0.0 else 0.0)
                + (sqrt(disk) * v if disk > 0.0 else 0.0)
                + (sqrt(cpu) * w if cpu > 0.0 else 0.0)
                + (sqrt(vm) * x if vm > 0.0 else 0.0)
            )

        return score

    def scores_after_two(self, row: int, changes: Floats, others: IntArray, theirs: Floats) -> Floats:
        """The fleet's score if the host in `row` changed by one of `changes` and with it the host in the same place of
        `others` by one of `theirs`; shapes (n, 4), (n,) and (n, 4)."""
        mine, other = self.figures[:, row], self.figures[:, others].T
        sums = self._sum + changes + theirs
        squares = self._squares + (2.0 * mine + changes) * changes + (2.0 * other + theirs) * theirs
        variances = squares / self.hosts - (sums / self.hosts) ** 2
        return np.asarray(np.sqrt(np.maximum(variances, 0.0)) @ np.array(WEIGHTS), dtype=np.float64)

    def _read(self, fleet: Fleet, rows: slice | IntArray) -> Floats:
        memory, cpus, disk = self.memory_mib[rows], self.cpus[rows], self.disk_mib[rows]
        hosts = fleet.hosts[rows] if isinstance(rows, slice) else [fleet.hosts[row] for row in rows]
        vms = np.array([len(host.vms) for host in hosts], dtype=np.float64)
        cpus_used = 1.0 - _free(fleet, CPU, rows) / cpus
        return np.stack([_free(fleet, MEMORY, rows) / memory, fleet.disk_free_mib[rows] / disk, cpus_used, vms])


@dataclass(frozen=True, eq=False)
class Weight:
    """What a VM takes that counts in the figures: memory, disk, and by host its CPUs."""

    memory_mib: int
    disk_mib: int
    cpus: IntArray

    @cached_property
    def cpu_items(self) -> memoryview[int]:
        return ints(self.cpus)


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
