# SPDX-License-Identifier: Apache-2.0
"""How evenly a fleet is used: Ganeti's cluster score, kept incrementally.

The score is a weighted sum of standard deviations over hosts (htools 3.0, `Ganeti.HTools.Cluster.Metrics`): of the
share of memory that is free, of disk that is free, of CPUs that are used, and of the number of VMs, which stands for
the four loads (CPU, memory, disk, network) that Ganeti counts as one a VM, and for its spindles. Its terms about
mirrored disks are zero here. Of each figure only n, the sum and the sum of squares are kept, so one placement costs the
same in a fleet of ten thousand hosts as in one of ten."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from ppec_orchestrator.placement.demand import CellResource
from ppec_orchestrator.placement.fleet import Fleet, IntArray, Rows

Floats = NDArray[np.float64]
# In the order of the rows of `Balance.figures`: memory free, disk free, CPUs used, VMs.
WEIGHTS = (1.0, 1.0, 1.0, 4.0 + 1 / 320)
Change = tuple[float, float, float, float]
_WEIGHT_ROW = np.array(WEIGHTS)
_ALL = slice(None)
# What counts as memory (in MiB) and as CPU, and how much of it one unit is.
MEMORY: Mapping[CellResource, int] = {"memory_mib": 1, "pages_2m": 2, "pages_1g": 1024}
CPU: Mapping[CellResource, int] = {"cores": 1, "shared_vcpus": 1}


@dataclass(frozen=True, slots=True)
class Spread:
    """Sums and variances of the four figures at one moment; shape (4, 1)."""

    total: Floats
    variance: Floats


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
        self._sum = [float(each) for each in self.figures.sum(axis=1)]
        self._squares = [float(each) for each in (self.figures**2).sum(axis=1)]

    def move(self, row: int, change: Change) -> None:
        """The host's four figures change by this much."""
        before = self.figures[:, row].tolist()
        after = [was + by for was, by in zip(before, change, strict=True)]
        self.figures[:, row] = after
        for figure in range(4):
            self._sum[figure] += change[figure]
            self._squares[figure] += after[figure] * after[figure] - before[figure] * before[figure]

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
        total = np.array(self._sum).reshape(4, 1)
        return Spread(total, np.array(self._squares).reshape(4, 1) / self.hosts - (total / self.hosts) ** 2)

    def change_of(self, row: int, memory_mib: int, disk_mib: int, cpus: int, vms: int) -> Change:
        """What VMs that take this of one host change in its figures."""
        return (
            -memory_mib / float(self.memory_mib[row]),
            -disk_mib / float(self.disk_mib[row]),
            cpus / float(self.cpus[row]),
            float(vms),
        )

    def changes(self, memory_mib: int, disk_mib: int, cpus: IntArray) -> Changes:
        """What one VM changes in the figures of each host; `cpus` by host."""
        by = np.stack(
            [-memory_mib / self.memory_mib, -disk_mib / self.disk_mib, cpus / self.cpus, np.ones(len(self.cpus))]
        )
        return Changes(by / self.hosts, by * (1.0 - 1.0 / self.hosts))

    def scores_after(self, changes: Changes, rows: Rows, spread: Spread) -> Floats:
        """The fleet's score if each of the hosts, alone, took the VM. `spread` may be of an earlier moment.

        With a host's figure x changed by d, the sum S grows by d and the sum of squares by (2x + d)d, so the variance
        changes by (d/n)(2x + d(1 - 1/n) - 2S/n).
        """
        figures, rest, of_n = (
            each if rows is None else each.take(rows, axis=1) for each in (self.figures, changes.rest, changes.of_n)
        )
        variance = spread.variance + of_n * (2.0 * figures + rest - 2.0 / self.hosts * spread.total)
        deviations = np.sqrt(np.maximum(variance, 0.0))
        return np.asarray(_WEIGHT_ROW.dot(deviations), dtype=np.float64)

    def _read(self, fleet: Fleet, rows: slice | IntArray) -> Floats:
        memory, cpus, disk = self.memory_mib[rows], self.cpus[rows], self.disk_mib[rows]
        hosts = fleet.hosts[rows] if isinstance(rows, slice) else [fleet.hosts[row] for row in rows]
        vms = np.array([len(host.vms) for host in hosts], dtype=np.float64)
        cpus_used = 1.0 - _free(fleet, CPU, rows) / cpus
        return np.stack([_free(fleet, MEMORY, rows) / memory, fleet.disk_free_mib[rows] / disk, cpus_used, vms])


@dataclass(frozen=True, slots=True)
class Changes:
    """What one VM would change in each host's figures, d: as `of_n` d/n and as `rest` d(1 - 1/n); shape (4, hosts)."""

    of_n: Floats
    rest: Floats


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
