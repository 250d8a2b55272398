# SPDX-License-Identifier: Apache-2.0
"""In which NUMA cells of its host a VM sits: what the host says of it, in an answer or a report, is what is recorded.

A plan chooses the cells a VM starts in; from then on only its host moves it, by a retune. Its size and its host remain
what was decided. A host can shift its own VMs between its own cells, and no more.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from uuid import UUID

from sqlalchemy import Connection, delete, insert, select, update

from ppec_orchestrator.placement.demand import CELL_RESOURCES, CellResource
from ppec_orchestrator.placement.plan import Move
from ppec_orchestrator.store.cells import used_column
from ppec_orchestrator.store.tables import allocation, allocation_cell, host, host_cell

# By cell, what a VM (or several) holds there.
Shares = dict[int, Mapping[CellResource, int]]


def follow(conn: Connection, seats: Mapping[UUID, Sequence[int]]) -> None:
    """Moves the VMs' shares to these cells of their hosts, which are locked already, and the cells' sums with them.

    A VM of which the host doesn't say, or that it says is in a cell it never reported, stays where it was. There may be
    more in a cell afterwards than it has: somebody else took the room meanwhile, and the host will refuse them.
    """
    told = {vm_id: tuple(sorted(set(cells))) for vm_id, cells in seats.items() if cells}
    if not told:
        return
    rows = conn.execute(
        select(allocation.c.host_id, allocation_cell)
        .join(allocation, allocation.c.vm_id == allocation_cell.c.vm_id)
        .where(allocation_cell.c.vm_id.in_(list(told)))
    )
    held: dict[UUID, Shares] = defaultdict(dict)
    hosts: dict[UUID, int] = {}
    for row in rows:
        held[row.vm_id][row.cell] = {each: row._mapping[each] for each in CELL_RESOURCES}
        hosts[row.vm_id] = row.host_id
    elsewhere = [vm_id for vm_id, shares in held.items() if tuple(sorted(shares)) != told[vm_id]]
    known = _cells_of(conn, {hosts[vm_id] for vm_id in elsewhere})
    moved = {
        vm_id: shares_over(held[vm_id], told[vm_id]) for vm_id in elsewhere if set(told[vm_id]) <= known[hosts[vm_id]]
    }
    if moved:
        _write(conn, {vm_id: (hosts[vm_id], held[vm_id], shares) for vm_id, shares in moved.items()})


def shifts(conn: Connection, moves: Sequence[Move]) -> dict[str, Shares | None]:
    """By host: of what its cells will hold more, or (below zero) less, once these VMs have moved. None where one of
    them is not where it is to move from."""
    if not moves:
        return {}
    rows = conn.execute(
        select(host.c.name, allocation_cell)
        .join(allocation, allocation.c.vm_id == allocation_cell.c.vm_id)
        .join(host, host.c.id == allocation.c.host_id)
        .where(allocation_cell.c.vm_id.in_([move.vm_id for move in moves]))
    )
    held: dict[tuple[UUID, str], dict[int, Mapping[CellResource, int]]] = defaultdict(dict)
    for row in rows:
        held[row.vm_id, row.name][row.cell] = {each: row._mapping[each] for each in CELL_RESOURCES}
    found: dict[str, Shares | None] = {}
    for move in moves:
        before, so_far = held[move.vm_id, move.host], found.setdefault(move.host, {})
        if so_far is None or tuple(sorted(before)) != tuple(sorted(move.cells_before)):
            found[move.host] = None
            continue
        found[move.host] = _sum(so_far, before, shares_over(before, move.cells_after))
    return found


def _sum(so_far: Shares, before: Shares, after: Shares) -> Shares:
    total = {cell: Counter(share) for cell, share in so_far.items()}
    for cell, share in before.items():
        total.setdefault(cell, Counter()).subtract(share)
    for cell, share in after.items():
        total.setdefault(cell, Counter()).update(share)
    return dict(total)


def shares_over(held: Shares, cells: Sequence[int]) -> Shares:
    """The same amounts in these cells. What stays in a cell is left there; what moves is not divided anew
    unless the number of cells is another."""
    if len(held) == len(cells):
        left = iter(held[cell] for cell in sorted(held) if cell not in cells)
        return {cell: held[cell] if cell in held else next(left) for cell in cells}
    whole = {each: sum(share[each] for share in held.values()) for each in CELL_RESOURCES}
    return {
        cell: {each: _part(whole[each], len(cells), at) for each in CELL_RESOURCES}
        for at, cell in enumerate(sorted(cells))
    }


def _part(whole: int, parts: int, at: int) -> int:
    return whole // parts + (at < whole % parts)


def _cells_of(conn: Connection, host_ids: set[int]) -> dict[int, set[int]]:
    known: dict[int, set[int]] = defaultdict(set)
    if host_ids:
        rows = conn.execute(select(host_cell.c.host_id, host_cell.c.cell).where(host_cell.c.host_id.in_(host_ids)))
        for row in rows:
            known[row.host_id].add(row.cell)
    return known


def _write(conn: Connection, moved: Mapping[UUID, tuple[int, Shares, Shares]]) -> None:
    changes: dict[tuple[int, int], Counter[CellResource]] = defaultdict(Counter)
    for host_id, before, after in moved.values():
        for cell, share in before.items():
            changes[host_id, cell].subtract(share)
        for cell, share in after.items():
            changes[host_id, cell].update(share)
    for host_id in sorted({host_id for host_id, _, _ in moved.values()}):
        conn.execute(update(host).where(host.c.id == host_id).values(generation=host.c.generation + 1))
    for (host_id, cell), more in sorted(changes.items()):
        conn.execute(
            update(host_cell)
            .where(host_cell.c.host_id == host_id, host_cell.c.cell == cell)
            .values({used_column(each): used_column(each) + more[each] for each in CELL_RESOURCES})
        )
    conn.execute(delete(allocation_cell).where(allocation_cell.c.vm_id.in_(list(moved))))
    rows = [
        {"vm_id": vm_id, "cell": cell, **share}
        for vm_id, (_, _, after) in moved.items()
        for cell, share in after.items()
    ]
    conn.execute(insert(allocation_cell), rows)
