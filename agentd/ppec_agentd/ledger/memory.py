# SPDX-License-Identifier: Apache-2.0
"""Memory of each cell: ordinary pages, and huge pages of each size. No lock of its own: the details' lock guards it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ppec_agentd.ledger.claims import ORDINARY_PAGE, memory_amount, no_capacity
from ppec_agentd.numa.shares import even_shares
from ppec_agentd.topology import Cell, Topology


class CellMemory:
    """How much of each cell's memory VMs may hold, and how much they do, by the size of page (0: ordinary).

    Huge pages are set aside at boot: what they take is gone from ordinary memory, used or not. The host's own reserve
    is ordinary memory.
    """

    def __init__(self, topology: Topology, reserved_per_cell_mib: int) -> None:
        self._reserved = {cell.cell: _reserved(cell, reserved_per_cell_mib) for cell in topology.cells}
        self._whole: dict[tuple[int, int], int] = {}
        for cell in topology.cells:
            self._whole[cell.cell, ORDINARY_PAGE] = cell.memory_mib - self._reserved[cell.cell]
            for pages in cell.huge_pages:
                self._whole[cell.cell, pages.size_kib] = pages.count * pages.size_kib // 1024
        self._held = dict.fromkeys(self._whole, 0)

    def whole(self) -> dict[str, int]:
        """The amounts of the whole host."""
        amounts: dict[str, int] = {}
        for (_, page_kib), memory_mib in self._whole.items():
            resource, amount = memory_amount(memory_mib, page_kib)
            amounts[resource] = amounts.get(resource, 0) + amount
        return amounts

    def reserved_mib(self, cell: int) -> int:
        """What ordinary memory of the cell never has: the host's own part and all huge pages."""
        return self._reserved[cell]

    def free_mib(self, cell: int, page_kib: int = ORDINARY_PAGE) -> int:
        """Below zero if more was found there than VMs may hold."""
        return self._whole.get((cell, page_kib), 0) - self._held.get((cell, page_kib), 0)

    def take(self, memory_by_cell_mib: Mapping[int, int], page_kib: int) -> None:
        for cell, memory_mib in memory_by_cell_mib.items():
            self._held[cell, page_kib] = self._held.get((cell, page_kib), 0) + memory_mib

    def give(self, memory_by_cell_mib: Mapping[int, int], page_kib: int) -> None:
        self.take({cell: -memory_mib for cell, memory_mib in memory_by_cell_mib.items()}, page_kib)

    def split(self, subject: str, memory_mib: int, cells: Sequence[int], page_kib: int) -> dict[int, int]:
        """So much memory over these cells, evenly as far as there is room. Raises `host.no_capacity`."""
        free = self._free(cells, page_kib)
        if memory_mib > sum(free.values()):
            raise self._short(subject, memory_mib, sum(free.values()), (tuple(cells), page_kib))
        return even_shares(memory_mib, free, max(1, page_kib // 1024))

    def resplit(self, subject: str, memory_mib: int, held: Mapping[int, int], page_kib: int) -> dict[int, int]:
        """Another amount over the cells that hold `held` of it: more is added evenly, less is left evenly."""
        unit, more = max(1, page_kib // 1024), memory_mib - sum(held.values())
        if more <= 0:
            return even_shares(memory_mib, held, unit)
        free = self._free(held, page_kib)
        if more > sum(free.values()):
            there = sum(held.values()) + sum(free.values())
            raise self._short(subject, memory_mib, there, (tuple(held), page_kib))
        shares = even_shares(more, free, unit)
        return {cell: held[cell] + shares[cell] for cell in held}

    def forced(self, memory_mib: int, cells: Sequence[int], page_kib: int) -> dict[int, int]:
        """As `split`, for memory that is held already: what finds no room counts on the first cell."""
        shares = even_shares(memory_mib, self._free(cells, page_kib), max(1, page_kib // 1024))
        shares[cells[0]] += memory_mib - sum(shares.values())
        return shares

    def _free(self, cells: Sequence[int] | Mapping[int, int], page_kib: int) -> dict[int, int]:
        return {cell: max(0, self.free_mib(cell, page_kib)) for cell in cells}

    def _short(self, subject: str, wanted_mib: int, free_mib: int, where: tuple[tuple[int, ...], int]) -> Exception:
        cells, page_kib = where
        resource, wanted = memory_amount(wanted_mib, page_kib)
        # Free pages are whole ones: memory_amount rounds up, and what is free is a multiple already.
        return no_capacity(subject, resource, wanted, memory_amount(free_mib, page_kib)[1], cells)


def _reserved(cell: Cell, reserved_per_cell_mib: int) -> int:
    return min(cell.memory_mib, reserved_per_cell_mib + cell.huge_pages_mib)
