# SPDX-License-Identifier: Apache-2.0
"""Which free cores one VM takes.

Those that leave cells whole, then those that leave the longest runs of free neighbours: neighbouring cores share
caches, and a large VM needs both later.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

from ppec_agentd.numa.pool import CpuPool, seats, seats_of
from ppec_agentd.topology import Cell, Core
from ppec_contract.vm import SmtPolicy

# Up to so many cells of one socket every choice of cells is looked at (256); no machine's socket has more.
_ALL_CHOICES_CELLS = 8


def free_by_socket(pool: CpuPool, cells: Sequence[Cell], smt: SmtPolicy) -> dict[int, dict[int, list[Core]]]:
    """The cores that could be taken, by socket and cell.

    A firmware may spread one cell over several sockets, so the cores' own socket decides and not the cell's.
    """
    by_socket: dict[int, dict[int, list[Core]]] = {}
    for cell in cells:
        for core in pool.free_of(cell):
            if seats(core, smt):
                by_socket.setdefault(core.socket, {}).setdefault(cell.cell, []).append(core)
    return by_socket


def on_one_socket(
    pool: CpuPool, cells: Sequence[Cell], vcpus: int, smt: SmtPolicy, only_socket: int | None = None
) -> list[Core] | int:
    """Cores of one socket, in one cell if any single one can; or the most vCPUs that are free on one socket."""
    by_socket = free_by_socket(pool, cells, smt)
    if only_socket is not None:
        by_socket = {only_socket: by_socket.get(only_socket, {})}
    free = {socket: sum(seats_of(cores, smt) for cores in of.values()) for socket, of in by_socket.items()}
    fitting = [socket for socket in sorted(free) if free[socket] >= vcpus]
    if not fitting:
        return max(free.values(), default=0)
    tightest = min(fitting, key=lambda socket: (free[socket], socket))
    return _across_cells(pool, by_socket[tightest], vcpus, smt)


def in_cell(cell: Cell, free: Sequence[Core], vcpus: int, smt: SmtPolicy) -> list[Core]:
    """Cores of one cell out of `free`, which has enough."""
    return _from_runs(list(_runs(cell.cores, free)), vcpus, smt)


def _across_cells(pool: CpuPool, free: Mapping[int, list[Core]], vcpus: int, smt: SmtPolicy) -> list[Core]:
    width = {number: seats_of(cores, smt) for number, cores in free.items()}
    whole = {number for number in free if pool.is_whole(pool.topology.by_cell[number])}
    chosen: list[Core] = []
    left = vcpus
    for number in _cells_to_use(width, whole, vcpus):
        wanted = min(left, width[number])
        if wanted > 0:
            chosen += in_cell(pool.topology.by_cell[number], free[number], wanted, smt)
            left -= wanted
    return chosen


def _cells_to_use(width: Mapping[int, int], whole: set[int], vcpus: int) -> list[int]:
    """The tightest single cell that fits, a part-used one before a whole one.

    If none fits: the cells that break the fewest whole ones, of these the fewest, of these the tightest; the emptiest
    first.
    """
    fitting = [number for number in width if width[number] >= vcpus]
    if fitting:
        return [min(fitting, key=lambda number: (number in whole, width[number], number))]
    emptiest_first = sorted(width, key=lambda number: (-width[number], number))
    if len(width) > _ALL_CHOICES_CELLS:
        return sorted(emptiest_first, key=lambda number: number in whole)
    choices = (
        choice
        for count in range(2, len(width) + 1)
        for choice in combinations(emptiest_first, count)
        if sum(width[number] for number in choice) >= vcpus
    )
    best = min(
        choices, key=lambda choice: (len(whole & set(choice)), len(choice), sum(width[number] for number in choice))
    )
    return list(best)


def _runs(positions: Sequence[Core], free: Sequence[Core]) -> Iterator[list[Core]]:
    """The maximal runs of free neighbours among a cell's cores."""
    allowed = set(free)
    run: list[Core] = []
    for core in positions:
        if core in allowed:
            run.append(core)
        elif run:
            yield run
            run = []
    if run:
        yield run


def _from_runs(runs: list[list[Core]], vcpus: int, smt: SmtPolicy) -> list[Core]:
    """The shortest run that holds all; if none does, whole runs from the shortest up, so that the longest survive."""
    shortest_first = sorted(runs, key=lambda run: (seats_of(run, smt), run[0].cpus))
    fitting = next((run for run in shortest_first if seats_of(run, smt) >= vcpus), None)
    chosen: list[Core] = []
    left = vcpus
    for core in (core for run in ([fitting] if fitting else shortest_first) for core in run):
        if left <= 0:
            break
        chosen.append(core)
        left -= seats(core, smt)
    return chosen
