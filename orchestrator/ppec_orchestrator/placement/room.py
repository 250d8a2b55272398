# SPDX-License-Identifier: Apache-2.0
"""What is left of the fleet while one batch is being placed: copies of the snapshot's free figures, used up row by row.

Everything about a shape is worked out once for all hosts and then, after each placement, again for one row.
"""

from __future__ import annotations

import numpy as np

from ppec_orchestrator.placement.filters import cores_needed
from ppec_orchestrator.placement.fleet import BoolArray, Fleet, IntArray
from ppec_orchestrator.placement.request import Reason, Shape


class Room:
    """`fits` is the answer per host; `used` the host's use of cores, memory and disk as fractions, shape (hosts, 3)."""

    def __init__(self, fleet: Fleet, shape: Shape) -> None:
        self.fleet = fleet
        self.shape = shape
        self.needed: IntArray = cores_needed(fleet, shape)
        self.cores_free = fleet.cores_free.copy()
        self.memory_free_mib = fleet.memory_free_mib.copy()
        self.disk_free_mib = fleet.disk_free_mib.copy()
        self.addresses = dict(fleet.free_addresses)
        self._hosts_of_prefix = _hosts_of_prefix(fleet)
        self.cell_fits: BoolArray = (self.cores_free >= self.needed) & (self.memory_free_mib >= shape.memory_mib)
        self.addresses_left: BoolArray = np.fromiter(
            (self._has_addresses(row) for row in range(len(fleet.hosts))), dtype=np.bool_, count=len(fleet.hosts)
        )
        self.fits: BoolArray = self.cell_fits.any(axis=1) & (self.disk_free_mib >= shape.disk_mib) & self.addresses_left
        # At least one of each: a host without cells or disk still needs a finite score.
        self._total = np.maximum(
            np.stack([fleet.cores.sum(axis=1), fleet.memory_mib.sum(axis=1), fleet.disk_mib], axis=1), 1
        ).astype(np.float64)
        free = np.stack([self.cores_free.sum(axis=1), self.memory_free_mib.sum(axis=1), self.disk_free_mib], axis=1)
        self.used = 1.0 - free / self._total

    def best_cell(self, row: int) -> int:
        """Best fit: the cell left with the fewest free cores, then the least memory; whole cells stay open."""
        fitting = np.flatnonzero(self.cell_fits[row])
        left = self.cores_free[row, fitting] - self.needed[row, fitting]
        memory = self.memory_free_mib[row, fitting]
        return int(fitting[np.lexsort((memory, left))[0]])

    def take(self, row: int, column: int) -> list[int]:
        """Uses up one VM's share of a host's cell; returns the rows that changed (hosts can share a prefix)."""
        self.cores_free[row, column] -= self.needed[row, column]
        self.memory_free_mib[row, column] -= self.shape.memory_mib
        self.disk_free_mib[row] -= self.shape.disk_mib
        changed = [row]
        for family in self.fleet.hosts[row].prefixes:
            prefix = next((p for p in family if self.addresses.get(p, 1) > 0), None)
            if prefix is None or prefix not in self.addresses:
                continue
            self.addresses[prefix] -= 1
            if self.addresses[prefix] == 0:
                changed.extend(r for r in self._hosts_of_prefix[prefix] if r != row)
        for each in changed:
            self._refresh(each)
        return changed

    def reason(self, row: int) -> Reason:
        """Why this host has no room, most telling first: too little in all its cells together, or no cell that fits."""
        if int(self.cores_free[row].sum()) < int(self.needed[row].min()):
            return Reason.CORES
        if int(self.memory_free_mib[row].sum()) < self.shape.memory_mib:
            return Reason.MEMORY
        if not self.cell_fits[row].any():
            return Reason.NUMA_FIT
        if self.disk_free_mib[row] < self.shape.disk_mib:
            return Reason.DISK
        return Reason.ADDRESSES

    def _refresh(self, row: int) -> None:
        self.cell_fits[row] = (self.cores_free[row] >= self.needed[row]) & (
            self.memory_free_mib[row] >= self.shape.memory_mib
        )
        self.addresses_left[row] = self._has_addresses(row)
        self.fits[row] = (
            bool(self.cell_fits[row].any())
            and bool(self.disk_free_mib[row] >= self.shape.disk_mib)
            and bool(self.addresses_left[row])
        )
        free = (self.cores_free[row].sum(), self.memory_free_mib[row].sum(), self.disk_free_mib[row])
        self.used[row] = 1.0 - np.array(free) / self._total[row]

    def _has_addresses(self, row: int) -> bool:
        families = self.fleet.hosts[row].prefixes
        return bool(families) and all(any(self.addresses.get(p, 1) > 0 for p in family) for family in families)


def _hosts_of_prefix(fleet: Fleet) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for row, host in enumerate(fleet.hosts):
        for family in host.prefixes:
            for prefix in family:
                found.setdefault(prefix, []).append(row)
    return found
