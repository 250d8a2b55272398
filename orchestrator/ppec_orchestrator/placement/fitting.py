# SPDX-License-Identifier: Apache-2.0
"""Which cells of which hosts can take a VM, of given amounts: of what is free, or of all there is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ppec_orchestrator.placement.demand import (
    CellPart,
    CellResource,
    cpu_part,
    cpu_resource,
    memory_part,
    memory_resource,
    most_parts,
    nvme_part,
    usable_cells,
)
from ppec_orchestrator.placement.fleet import BoolArray, Fleet, IntArray, Rows, at
from ppec_orchestrator.placement.packed import NEVER, Packed, pack
from ppec_orchestrator.placement.request import Shape

Amounts = Mapping[CellResource, IntArray]
# Per row its kind; and a row of each kind.
Kinds = tuple[list[int], list[int]]
# More than any cell has of anything: what a VM "needs" of a cell it can't use.
NEEDS_TOO_MUCH = np.int64(1) << 40


class Fitting:
    """Worked out once for a fleet and a shape; amounts are given with each question.

    `resources` are those that the shape takes of cells, CPUs first, then memory.
    """

    def __init__(self, fleet: Fleet, shape: Shape) -> None:
        self.shape = shape
        self._fleet = fleet
        threads = fleet.threads_per_core
        self._usable = usable_cells(fleet, shape)
        self._threads = [int(width) for width in np.unique(threads)]
        self.most = most_parts(shape, threads.shape[1])
        self.cpu, self.memory = cpu_resource(shape), memory_resource(shape)
        self.resources: tuple[CellResource, ...] = (self.cpu, self.memory, *(("nvme",) if shape.nvme else ()))
        # Spread over more cells than it has cores' worth of vCPUs, a host would leave cells out.
        whole = cpu_part(shape, threads, 1)
        self._needed = {
            parts: np.where(self._usable & (whole >= parts), cpu_part(shape, threads, parts), NEEDS_TOO_MUCH)
            for parts in range(1, self.most + 1)
        }
        self._parts: dict[tuple[int, int], CellPart] = {}
        self.in_one_cell: Packed = np.where(self._usable, pack(whole, memory_part(shape)), NEVER)

    @property
    def size(self) -> int:
        """Of its arrays, in bytes."""
        return sum(each.nbytes for each in (self._usable, self.in_one_cell, *self._needed.values()))

    def part(self, row: int, column: int, parts: int) -> CellPart:
        """What a VM spread over so many cells takes of this one."""
        cpus = self._needed[parts].item(row, column)
        part = self._parts.get((cpus, parts))
        if part is None:
            nvme: dict[CellResource, int] = {"nvme": nvme_part(self.shape, parts)} if self.shape.nvme else {}
            part = CellPart.of({self.cpu: cpus, self.memory: memory_part(self.shape, parts), **nvme})
            self._parts[cpus, parts] = part
        return part

    def needs(self, parts: int) -> dict[CellResource, IntArray | int]:
        """What a VM spread over so many cells takes of each; of CPUs per host and cell, as cores differ in width."""
        wanted: dict[CellResource, IntArray | int] = {
            self.cpu: self._needed[parts],
            self.memory: memory_part(self.shape, parts),
        }
        if self.shape.nvme:
            wanted["nvme"] = nvme_part(self.shape, parts)
        return wanted

    def ever(self, row: int, column: int, parts: int) -> bool:
        """Whether such a cell could be one of so many, were it only large enough."""
        return bool(self._needed[parts][row, column] < NEEDS_TOO_MUCH)

    def fewest(self, rows: Rows) -> IntArray:
        """Of CPUs, in all cells together: less than that fits on no number of cells."""
        least = [at(needed, rows).min(axis=1) * parts for parts, needed in self._needed.items()]
        return np.min(least, axis=0)  # type: ignore[no-any-return]

    def parts(self, amounts: Amounts, rows: Rows) -> IntArray:
        """Per host: over how many cells the VM would spread, the fewest that can; 0 where it doesn't fit."""
        threads = at(self._fleet.threads_per_core, rows)
        found: IntArray = np.zeros(len(threads), dtype=np.int64)
        for count in range(1, self.most + 1):
            cells = self._cells(amounts, count, rows)
            if count == 1:
                enough = cells.any(axis=1)
            else:
                enough = np.max([(cells & (threads == width)).sum(axis=1) for width in self._threads], axis=0) >= count
            found = np.where((found == 0) & enough, count, found)
        return found

    def able(self, amounts: Amounts, row: int, parts: int) -> list[int]:
        """The columns of a host's cells that can give one of so many parts."""
        return [int(column) for column in np.flatnonzero(self._cells(amounts, parts, np.array([row]))[0])]

    def choose(self, amounts: Amounts, row: int, parts: int) -> list[int]:
        """Best fit: the cells left with the fewest cores, then the least memory, so that whole cells stay open.

        Several are of one socket if any has enough, and always of cores of one width: their parts are equal.
        """
        columns = np.array(self.able(amounts, row, parts), dtype=np.int64)
        left = amounts[self.cpu][row, columns] - self._needed[parts][row, columns]
        ordered = [int(column) for column in columns[np.lexsort((amounts[self.memory][row, columns], left))]]
        if parts == 1:
            return ordered[:1]
        return sorted(next(each for each in self._together(row, ordered) if len(each) >= parts)[:parts])

    def _together(self, row: int, ordered: Sequence[int]) -> Iterator[list[int]]:
        """The cells that could be parts of one VM with each of them in turn: first those of its socket, then all."""
        socket = self._fleet.socket[row]
        for first in ordered:
            yield [column for column in self._as_wide(row, ordered, first) if socket[column] == socket[first]]
        for first in ordered:
            yield self._as_wide(row, ordered, first)

    def _as_wide(self, row: int, ordered: Sequence[int], first: int) -> list[int]:
        """The cells whose cores have as many threads."""
        threads = self._fleet.threads_per_core[row]
        return [column for column in ordered if threads[column] == threads[first]]

    def _cells(self, amounts: Amounts, parts: int, rows: Rows) -> BoolArray:
        """The cells that can give one of so many parts."""
        can: BoolArray = (at(amounts[self.cpu], rows) >= at(self._needed[parts], rows)) & (
            at(amounts[self.memory], rows) >= memory_part(self.shape, parts)
        )
        if self.shape.nvme:
            can &= at(amounts["nvme"], rows) >= nvme_part(self.shape, parts)
        return can

    def usable(self, amounts: Amounts, resource: CellResource, rows: Rows) -> IntArray:
        """Per host: of a resource, in all cells that such a VM can use."""
        total: NDArray[np.int64] = (at(amounts[resource], rows) * at(self._usable, rows)).sum(axis=1)
        return total


def cell_kinds(fleet: Fleet) -> Kinds:
    """Of one kind are hosts whose cells' cores are as wide and share as many CPUs: of these, a shape takes the same."""
    numbers: dict[bytes, int] = {}
    table = np.column_stack([fleet.threads_per_core, fleet.shared_cpus])
    of_row = [numbers.setdefault(row.tobytes(), len(numbers)) for row in table]
    return of_row, np.unique(of_row, return_index=True)[1].tolist()
