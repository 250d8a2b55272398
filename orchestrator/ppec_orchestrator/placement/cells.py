# SPDX-License-Identifier: Apache-2.0
"""What is free of each cell while plans are made, and the same in packed form (`packed.py`): both are changed here
alone, and so say the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ppec_orchestrator.placement.demand import CELL_RESOURCES, CellResource
from ppec_orchestrator.placement.fitting import Fitting
from ppec_orchestrator.placement.fleet import Fleet, IntArray
from ppec_orchestrator.placement.packed import CPU_SHIFT, GUARDS, Packed, pack

_Pair = tuple[CellResource, CellResource]
# So few cells are faster one by one than with arrays.
_FEW = 16
# Of each resource that a VM takes, how much of a cell.
CellPart = Mapping[CellResource, int]


class CellRoom:
    """`free` by resource, shape (hosts, cells). A cell that shrank under its VMs has less than nothing free, which the
    packed form can't say: there it has nothing."""

    def __init__(self, fleet: Fleet) -> None:
        self.free: dict[CellResource, IntArray] = {each: fleet.free(each).copy() for each in CELL_RESOURCES}
        self._packed: dict[_Pair, Packed] = {}

    def packed(self, fitting: Fitting) -> Packed:
        """What is free of the fitting's CPUs and memory, per cell."""
        pair = (fitting.cpu, fitting.memory)
        if pair not in self._packed:
            cpus, memory = (np.maximum(self.free[each], 0) for each in pair)
            self._packed[pair] = pack(cpus, memory) | GUARDS
        return self._packed[pair]

    def add(self, row: int, columns: Sequence[int], part: CellPart, sign: int) -> None:
        """So much more in each of these cells of one host, or (with -1) less."""
        for column in columns:
            for resource, amount in part.items():
                self.free[resource][row, column] += sign * amount
            for (cpu, memory), packed in self._packed.items():
                cpus, memory_free = self.free[cpu].item(row, column), self.free[memory].item(row, column)
                packed[row, column] = (max(cpus, 0) << CPU_SHIFT) + max(memory_free, 0) | GUARDS

    def add_all(self, rows: Sequence[int], columns: Sequence[int], parts: Sequence[CellPart]) -> None:
        """So much more in each of these cells, of which some may be named twice."""
        if len(rows) <= _FEW:
            for row, column, part in zip(rows, columns, parts, strict=True):
                self.add(row, (column,), part, 1)
            return
        for resource, free in self.free.items():
            amounts = [part.get(resource, 0) for part in parts]
            if any(amounts):
                np.add.at(free, (rows, columns), amounts)
        for pair, packed in self._packed.items():
            cpus, memory = (np.maximum(self.free[each][rows, columns], 0) for each in pair)
            packed[rows, columns] = pack(cpus, memory) | GUARDS

    def replace(self, rows: IntArray, fleet: Fleet) -> None:
        """The hosts in `rows` are as the fleet has them."""
        self._packed.clear()
        for resource, free in self.free.items():
            free[rows] = fleet.free(resource)[rows]
