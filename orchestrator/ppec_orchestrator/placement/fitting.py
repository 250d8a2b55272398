# SPDX-License-Identifier: Apache-2.0
"""Which cells of which hosts can take a VM, of given amounts: of what is free, or of all there is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ppec_orchestrator.placement.demand import (
    cpu_part,
    cpu_resource,
    memory_part,
    memory_resource,
    most_parts,
    usable_cells,
)
from ppec_orchestrator.placement.fleet import BoolArray, Fleet, IntArray
from ppec_orchestrator.placement.request import Shape


@dataclass(frozen=True, eq=False)
class Amounts:
    """Of the two resources the shape takes from cells; shape (hosts, cells), nothing in cells it can't use."""

    cpu: IntArray
    memory: IntArray


class Fitting:
    """Worked out once for a fleet and a shape. `needed[n]` is the CPU part of each cell when the VM spreads over n."""

    def __init__(self, fleet: Fleet, shape: Shape) -> None:
        self._fleet = fleet
        self._shape = shape
        self._usable = usable_cells(fleet, shape)
        self._threads = [int(width) for width in np.unique(fleet.threads_per_core)]
        self.most = most_parts(shape, fleet.threads_per_core.shape[1])
        self.needed = {n: cpu_part(shape, fleet.threads_per_core, n) for n in range(1, self.most + 1)}
        # Spread over more cells than it has cores' worth of vCPUs, a host would leave cells out.
        self._spreads = {n: self.needed[1] >= n for n in self.needed}

    def capacity(self) -> Amounts:
        fleet, shape = self._fleet, self._shape
        return self._masked(fleet.capacity(cpu_resource(shape)), fleet.capacity(memory_resource(shape)))

    def free(self) -> Amounts:
        fleet, shape = self._fleet, self._shape
        return self._masked(fleet.free(cpu_resource(shape)), fleet.free(memory_resource(shape)))

    def parts(self, amounts: Amounts, rows: slice = slice(None)) -> IntArray:
        """Per host: over how many cells the VM would spread, the fewest that can; 0 where it doesn't fit."""
        found: IntArray = np.zeros(len(self._usable[rows]), dtype=np.int64)
        for count in range(1, self.most + 1):
            cells = self.cells(amounts, count, rows)
            if count == 1:
                enough = cells.any(axis=1)
            else:
                threads = self._fleet.threads_per_core[rows]
                alike = [(cells & (threads == width)).sum(axis=1) for width in self._threads]
                enough = np.max(alike, axis=0) >= count
            found = np.where((found == 0) & enough, count, found)
        return found

    def cells(self, amounts: Amounts, parts: int, rows: slice = slice(None)) -> BoolArray:
        """The cells that can give one of so many parts."""
        can: BoolArray = (
            self._usable[rows]
            & self._spreads[parts][rows]
            & (amounts.cpu[rows] >= self.needed[parts][rows])
            & (amounts.memory[rows] >= memory_part(self._shape, parts))
        )
        return can

    def tightest(self, amounts: Amounts, row: int, parts: int) -> list[int]:
        """Best fit: the cells left with the fewest cores, then the least memory, so that whole cells stay open.

        Several are of one socket if any has enough, and always of cores of one width: their parts are equal.
        """
        columns = np.flatnonzero(self.cells(amounts, parts, slice(row, row + 1))[0])
        left = amounts.cpu[row, columns] - self.needed[parts][row, columns]
        ordered = [int(column) for column in columns[np.lexsort((amounts.memory[row, columns], left))]]
        if parts == 1:
            return ordered[:1]
        threads, socket = self._fleet.threads_per_core[row], self._fleet.socket[row]
        groups = [
            [column for column in ordered if threads[column] == threads[first] and (far or socket[column] == near)]
            for far in (False, True)
            for first in ordered
            for near in (socket[first],)
        ]
        return sorted(next(group for group in groups if len(group) >= parts)[:parts])

    def _masked(self, cpu: IntArray, memory: IntArray) -> Amounts:
        return Amounts(np.where(self._usable, cpu, 0), np.where(self._usable, memory, 0))
