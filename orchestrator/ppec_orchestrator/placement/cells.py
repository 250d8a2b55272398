# SPDX-License-Identifier: Apache-2.0
"""What is free of each cell while plans are made, and the same in packed form (`packed.py`): both are changed here
alone, and so say the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ppec_orchestrator.placement.demand import CELL_RESOURCES, CellResource
from ppec_orchestrator.placement.fitting import Fitting
from ppec_orchestrator.placement.fleet import Fleet, IntArray
from ppec_orchestrator.placement.items import ints
from ppec_orchestrator.placement.packed import CPU_SHIFT, GUARDS, Packed, pack

_Pair = tuple[CellResource, CellResource]


class CellRoom:
    """`free` by resource, shape (hosts, cells). A cell that shrank under its VMs has less than nothing free, which the
    packed form can't say: there it has nothing."""

    def __init__(self, fleet: Fleet) -> None:
        self.free: dict[CellResource, IntArray] = {each: fleet.free(each).copy() for each in CELL_RESOURCES}
        self._width = fleet.width
        self._items = {resource: ints(free) for resource, free in self.free.items()}
        self._packed: dict[_Pair, Packed] = {}
        self._packed_items: dict[_Pair, memoryview[int]] = {}
        # The items of what is free of CPUs and memory, and of the two packed.
        self._pairs: list[tuple[memoryview[int], memoryview[int], memoryview[int]]] = []

    def packed(self, fitting: Fitting) -> Packed:
        """What is free of the fitting's CPUs and memory, per cell."""
        pair = (fitting.cpu, fitting.memory)
        if pair not in self._packed:
            cpus, memory = (np.maximum(self.free[each], 0) for each in pair)
            self._packed[pair] = pack(cpus, memory) | GUARDS
            self._packed_items[pair] = ints(self._packed[pair])
            self._pairs.append((self._items[pair[0]], self._items[pair[1]], self._packed_items[pair]))
        return self._packed[pair]

    def packed_items(self, fitting: Fitting) -> memoryview[int]:
        """The same, item by item."""
        pair = (fitting.cpu, fitting.memory)
        if pair not in self._packed_items:
            self.packed(fitting)
        return self._packed_items[pair]

    def add(self, row: int, columns: Sequence[int], amounts: Mapping[CellResource, int], sign: int) -> None:
        """So much more in each of these cells of one host, or (with -1) less."""
        free = self._items
        for column in columns:
            cell = row * self._width + column
            for resource, amount in amounts.items():
                free[resource][cell] += sign * amount
            for cpus, memory, packed in self._pairs:
                packed[cell] = (max(cpus[cell], 0) << CPU_SHIFT) + max(memory[cell], 0) | GUARDS

    def replace(self, rows: IntArray, fleet: Fleet) -> None:
        """The hosts in `rows` are as the fleet has them."""
        for resource, free in self.free.items():
            free[rows] = fleet.free(resource)[rows]
        for pair, packed in self._packed.items():
            cpus, memory = (np.maximum(self.free[each][rows], 0) for each in pair)
            packed[rows] = pack(cpus, memory) | GUARDS
