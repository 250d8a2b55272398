# SPDX-License-Identifier: Apache-2.0
"""One host's free room in plain numbers, and the seats in it that a VM could have.

For searches that try one host after the other, where arrays of the whole fleet would be slower. What a shape takes of a
cell is `fitting.py`'s word here too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from ppec_orchestrator.placement.demand import CELL_RESOURCES
from ppec_orchestrator.placement.fitting import Fitting
from ppec_orchestrator.placement.fleet import Fleet, HostState
from ppec_orchestrator.placement.request import Shape
from ppec_orchestrator.placement.workspace import Workspace

# Pairs of a resource (its place in `CELL_RESOURCES`) and how much of it: CPUs first, then memory.
Part = tuple[tuple[int, int], ...]
_Kind = tuple[tuple[int, int, int], ...]
_INDEX = {resource: index for index, resource in enumerate(CELL_RESOURCES)}
# Of the ways to spread one VM over many cells, no more than this many are looked at.
MOST_SPREADS = 256


@dataclass(frozen=True, slots=True)
class HostSeat:
    """The columns of a VM's cells, and what it takes of each of them."""

    columns: tuple[int, ...]
    part: Part


class Room:
    """What is free on one host: by resource (in the order of `CELL_RESOURCES`) and column; disk by pool."""

    __slots__ = ("disk_mib", "free")

    def __init__(self, workspace: Workspace, row: int) -> None:
        self.free: list[list[int]] = [workspace.free[each][row].tolist() for each in CELL_RESOURCES]
        self.disk_mib = {"": int(workspace.disk_free_mib[row])}
        for pool in workspace.fleet.hosts[row].pools:
            self.disk_mib[pool] = int(workspace.disk(pool)[row])

    def holds(self, column: int, part: Part) -> bool:
        for index, amount in part:  # noqa: SIM110 - a generator takes three times as long, and this is asked most
            if self.free[index][column] < amount:
                return False
        return True

    def use(self, seat: HostSeat, shape: Shape, sign: int = 1) -> None:
        """Takes the seat, or (with -1) leaves it. What is overdrawn shows as less than nothing."""
        for index, amount in seat.part:
            free = self.free[index]
            for column in seat.columns:
                free[column] -= sign * amount
        self.disk_mib[shape.pool] -= sign * shape.disk_mib

    def move(self, source: int, target: int, part: Part) -> None:
        """A VM changes cells."""
        for index, amount in part:
            free = self.free[index]
            free[source] += amount
            free[target] -= amount

    def overdrawn(self) -> bool:
        return any(min(free) < 0 for free in self.free) or min(self.disk_mib.values()) < 0

    def key(self) -> tuple[tuple[int, ...], ...]:
        return (*map(tuple, self.free), tuple(self.disk_mib.values()))


@dataclass(frozen=True, slots=True)
class Need:
    """What a shape, spread over so many `parts`, takes of each column that it can use, by the threads of its cores:
    all cells of one VM have cores of one width."""

    parts: int
    by_width: tuple[tuple[tuple[int, Part], ...], ...]


class Seating:
    """The seats of one shape on every host of a fleet. Hosts with cells of one kind need the same."""

    def __init__(self, fleet: Fleet, shape: Shape) -> None:
        self.shape = shape
        self.fitting = Fitting(fleet, shape)
        self._fleet = fleet
        self._by_row: dict[int, tuple[Need, ...]] = {}
        self._by_kind: dict[_Kind, tuple[Need, ...]] = {}

    def needs(self, row: int) -> tuple[Need, ...]:
        """By the number of parts, fewest first."""
        found = self._by_row.get(row)
        if found is None:
            kind = tuple((c.socket, c.threads_per_core, c.shared_cpus) for c in self._fleet.hosts[row].cells)
            if kind not in self._by_kind:
                self._by_kind[kind] = self._work_out(row)
            found = self._by_row[row] = self._by_kind[kind]
        return found

    def part(self, row: int, column: int) -> Part | None:
        """What a VM in this one cell takes of it; None where it could never sit."""
        return next((part for cells in self.needs(row)[0].by_width for at, part in cells if at == column), None)

    def best(self, room: Room, row: int) -> HostSeat | None:
        """The fewest cells, and of those the tightest."""
        return next(self.seats(room, row), None)

    def seats(self, room: Room, row: int) -> Iterator[HostSeat]:
        """All seats, the fewest cells first, then the tightest: cells that have the same left are one choice."""
        if room.disk_mib.get(self.shape.pool, 0) < self.shape.disk_mib:
            return
        for need in self.needs(row):
            for cells in need.by_width:
                yield from self._of_width(room, row, need.parts, cells)

    def _of_width(self, room: Room, row: int, parts: int, cells: Sequence[tuple[int, Part]]) -> Iterator[HostSeat]:
        can = [(column, part) for column, part in cells if room.holds(column, part)]
        if len(can) < parts:
            return
        if len(can) > 1:
            (cpu, _), (memory, _), *_ = can[0][1]
            can.sort(key=lambda cell: (room.free[cpu][cell[0]], room.free[memory][cell[0]], cell[0]))
        if parts == 1 and len(can) == 1:
            yield HostSeat((can[0][0],), can[0][1])
            return
        seen = set()
        for tried, chosen in enumerate(combinations(can, parts)):
            if tried >= MOST_SPREADS:
                return
            columns = tuple(column for column, _ in chosen)
            alike = tuple(sorted(self._left(room, row, column) for column in columns))
            if alike not in seen:
                seen.add(alike)
                yield HostSeat(columns if parts == 1 else tuple(sorted(columns)), chosen[0][1])

    def _left(self, room: Room, row: int, column: int) -> tuple[int, ...]:
        cell = self._fleet.hosts[row].cells[column]
        return (cell.socket, cell.threads_per_core, cell.shared_cpus, *(free[column] for free in room.free))

    def _work_out(self, row: int) -> tuple[Need, ...]:
        host = self._fleet.hosts[row]
        found = []
        for parts in range(1, min(self.fitting.most, max(1, len(host.cells))) + 1):
            by_width: dict[int, list[tuple[int, Part]]] = {}
            for column, cell in enumerate(host.cells):
                if self.fitting.ever(row, column, parts):
                    amounts = self.fitting.part(row, column, parts).by_resource
                    pairs = tuple((_INDEX[resource], amounts[resource]) for resource in self.fitting.resources)
                    by_width.setdefault(cell.threads_per_core, []).append((column, pairs))
            found.append(Need(parts, tuple(tuple(cells) for _, cells in sorted(by_width.items()))))
        return tuple(found)


def columns_of(host: HostState, cells: Sequence[int]) -> tuple[int, ...]:
    """Where these cells stand in the host's row; those that it doesn't have are left out."""
    return tuple(column for column, cell in enumerate(host.cells) if cell.cell in cells)
