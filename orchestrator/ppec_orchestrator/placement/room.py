# SPDX-License-Identifier: Apache-2.0
"""What is left of the fleet while one batch is being placed: copies of the snapshot's free figures, used up row by row.

Everything about a shape is worked out once for all hosts and then, after each placement, again for one row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ppec_orchestrator.placement.addresses import ANY, AddressRoom, Network
from ppec_orchestrator.placement.demand import CellResource, cpu_resource, memory_part, memory_resource
from ppec_orchestrator.placement.fitting import Fitting
from ppec_orchestrator.placement.fleet import BoolArray, Fleet, IntArray
from ppec_orchestrator.placement.request import Reason, Shape


class Room:
    """`fits` is the answer per host; `used` the host's use of what such VMs take (cores or shared vCPUs, memory or huge
    pages, disk) as fractions, shape (hosts, 3)."""

    def __init__(self, fleet: Fleet, shape: Shape, networks: Sequence[Network] = ANY) -> None:
        self.fleet = fleet
        self.shape = shape
        self.fitting = Fitting(fleet, shape)
        self.free = self.fitting.free()
        self.disk_free_mib = fleet.disk_free_mib.copy()
        self.addresses = AddressRoom(fleet, networks)
        self.parts: IntArray = self.fitting.parts(self.free)
        self.addresses_left: BoolArray = np.fromiter(
            (self.addresses.fits(row) for row in range(len(fleet.hosts))), dtype=np.bool_, count=len(fleet.hosts)
        )
        self.fits: BoolArray = (self.parts > 0) & (self.disk_free_mib >= shape.disk_mib) & self.addresses_left
        capacity = self.fitting.capacity()
        # At least one of each: a host without cells or disk still needs a finite score.
        self._total = np.maximum(
            np.stack([capacity.cpu.sum(axis=1), capacity.memory.sum(axis=1), fleet.disk_mib], axis=1), 1
        ).astype(np.float64)
        free = np.stack([self.free.cpu.sum(axis=1), self.free.memory.sum(axis=1), self.disk_free_mib], axis=1)
        self.used = 1.0 - free / self._total

    def best_cells(self, row: int) -> list[int]:
        """The columns of the cells the VM takes on a host that it fits."""
        return self.fitting.tightest(self.free, row, int(self.parts[row]))

    def take(self, row: int, columns: Sequence[int]) -> dict[CellResource, int]:
        """Uses up one VM's share of a host's cells; returns what it took of each."""
        cpu = int(self.fitting.needed[len(columns)][row, columns[0]])
        memory = memory_part(self.shape, len(columns))
        self.free.cpu[row, columns] -= cpu
        self.free.memory[row, columns] -= memory
        self.disk_free_mib[row] -= self.shape.disk_mib
        for each in self.addresses.take(row):
            self._refresh(each)
        return {cpu_resource(self.shape): cpu, memory_resource(self.shape): memory}

    def reason(self, row: int) -> Reason:
        """Why this host has no room, most telling first: too little in all its cells together, or no cells that fit."""
        fewest = min(int(needed[row].min()) * parts for parts, needed in self.fitting.needed.items())
        if int(self.free.cpu[row].sum()) < fewest:
            return Reason.CORES if cpu_resource(self.shape) == "cores" else Reason.SHARED_VCPUS
        if int(self.free.memory[row].sum()) < memory_part(self.shape):
            return Reason.HUGE_PAGES if self.shape.numa.huge_page_kib else Reason.MEMORY
        if not self.parts[row]:
            return Reason.NUMA_PARTS if self.shape.numa.multi_cell else Reason.NUMA_FIT
        if self.disk_free_mib[row] < self.shape.disk_mib:
            return Reason.DISK
        return Reason.ADDRESSES

    def _refresh(self, row: int) -> None:
        self.parts[row] = self.fitting.parts(self.free, slice(row, row + 1))[0]
        self.addresses_left[row] = self.addresses.fits(row)
        self.fits[row] = (
            self.parts[row] > 0
            and bool(self.disk_free_mib[row] >= self.shape.disk_mib)
            and bool(self.addresses_left[row])
        )
        free = (self.free.cpu[row].sum(), self.free.memory[row].sum(), self.disk_free_mib[row])
        self.used[row] = 1.0 - np.array(free) / self._total[row]
