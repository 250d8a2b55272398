# SPDX-License-Identifier: Apache-2.0
"""Turns a plan into allocations and addresses, and gives them back.

A plan is made on a snapshot; between snapshot and commit others may have taken the room. So every host is re-checked
in the transaction that commits: each update carries the condition that the room is still there. That condition
replaces a plain comparison of generations, which would turn away plans that still fit; the generation is bumped all
the same, for readers that want to know whether anything changed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import Connection, delete, func, insert, select, update

from ppec_contract.api_ipdb import NetworkWanted
from ppec_contract.errors import PpecError
from ppec_orchestrator.placement.demand import CELL_RESOURCES, CellResource
from ppec_orchestrator.placement.request import Placement
from ppec_orchestrator.store import ipdb
from ppec_orchestrator.store.cells import used_column, whole_column
from ppec_orchestrator.store.serving import GrantedAddress
from ppec_orchestrator.store.tables import allocation, allocation_cell, host, host_cell


class LostRaceError(PpecError):
    """Another request took the room first; nothing of this one must be committed. Plan again on a new snapshot."""

    def __init__(self, hosts: Sequence[str]) -> None:
        names = ", ".join(hosts[:5]) + (" …" if len(hosts) > 5 else "")
        super().__init__(
            "placement.conflict",
            f"the room planned on {names} was taken by another request before this one committed",
            hint="Try again; the next plan starts from the fleet as it is then.",
            subject="plan",
            details={"hosts": list(hosts)},
        )


@dataclass(frozen=True, slots=True)
class _Share:
    """What a plan takes of one host."""

    host_id: int
    host: str
    disk_mib: int
    cells: Mapping[int, Mapping[CellResource, int]]


def reserve(
    conn: Connection,
    placements: Sequence[Placement],
    networks: Sequence[NetworkWanted] = ipdb.ANY_NETWORK,
    *,
    now: datetime | None = None,
) -> dict[UUID, tuple[GrantedAddress, ...]]:
    """Commits the placements' room and addresses within the caller's write transaction; their `vm` rows must exist.
    `networks` says which addresses each of them gets, `now` (default: now) which are out of quarantine.

    Returns each VM's addresses. Raises LostRaceError when any host can't take its share any more, and whatever
    `ipdb.grant` raises; after either, the caller's transaction must be rolled back.
    """
    if not placements:
        return {}
    shares = _shares(placements)
    # By id: two transactions that take hosts in the same order can't wait for each other.
    lost = [share.host for share in sorted(shares, key=lambda s: s.host_id) if not _take(conn, share)]
    if lost:
        raise LostRaceError(lost)
    conn.execute(
        insert(allocation),
        [{"vm_id": p.vm_id, "host_id": p.host_id, "disk_mib": p.disk_mib} for p in placements],
    )
    conn.execute(
        insert(allocation_cell),
        [{"vm_id": p.vm_id, "cell": cell} | p.per_cell for p in placements for cell in p.cells],
    )
    granted: dict[UUID, tuple[GrantedAddress, ...]] = {}
    by_host: dict[int, list[UUID]] = defaultdict(list)
    for p in placements:
        by_host[p.host_id].append(p.vm_id)
    for host_id, vm_ids in sorted(by_host.items()):
        granted.update(ipdb.grant(conn, host_id, vm_ids, networks, now=now))
    return granted


def release(conn: Connection, vm_ids: Iterable[UUID], *, now: datetime | None = None) -> int:
    """Gives back what the VMs hold, addresses included; returns how many of them held anything."""
    ids = list(vm_ids)
    ipdb.release(conn, ids, now=now)
    held = conn.execute(
        select(allocation.c.vm_id, allocation.c.host_id, allocation.c.disk_mib).where(allocation.c.vm_id.in_(ids))
    ).all()
    if not held:
        return 0
    # Before the shares are read: a retune moves them from cell to cell, and a resize changes them.
    lock_hosts(conn, {row.host_id for row in held})
    taken = conn.execute(
        select(
            allocation.c.host_id,
            allocation_cell.c.cell,
            *(func.sum(allocation_cell.c[resource]).label(resource) for resource in CELL_RESOURCES),
        )
        .join(allocation, allocation.c.vm_id == allocation_cell.c.vm_id)
        .where(allocation_cell.c.vm_id.in_(ids))
        .group_by(allocation.c.host_id, allocation_cell.c.cell)
    ).all()
    disk_mib: dict[int, int] = defaultdict(int)
    for row in held:
        disk_mib[row.host_id] += row.disk_mib
    for host_id, mib in sorted(disk_mib.items()):
        conn.execute(
            update(host)
            .where(host.c.id == host_id)
            .values(disk_used_mib=host.c.disk_used_mib - mib, generation=host.c.generation + 1)
        )
    for part in sorted(taken, key=lambda r: (r.host_id, r.cell)):
        conn.execute(
            update(host_cell)
            .where(host_cell.c.host_id == part.host_id, host_cell.c.cell == part.cell)
            .values({used_column(each): used_column(each) - int(part._mapping[each]) for each in CELL_RESOURCES})
        )
    conn.execute(delete(allocation_cell).where(allocation_cell.c.vm_id.in_(ids)))
    conn.execute(delete(allocation).where(allocation.c.vm_id.in_(ids)))
    return len(held)


def lock_hosts(conn: Connection, host_ids: Collection[int]) -> None:
    """Takes turns with whoever else changes what these hosts' VMs hold, until the transaction ends."""
    # By id: see `reserve`.
    conn.execute(
        select(host.c.id).where(host.c.id.in_(list(host_ids))).order_by(host.c.id).with_for_update(key_share=True)
    ).all()


def _shares(placements: Sequence[Placement]) -> list[_Share]:
    by_host: dict[int, list[Placement]] = defaultdict(list)
    for p in placements:
        by_host[p.host_id].append(p)
    shares = []
    for host_id, mine in by_host.items():
        cells: dict[int, Counter[CellResource]] = defaultdict(Counter)
        for p in mine:
            for cell in p.cells:
                cells[cell].update(p.per_cell)
        shares.append(_Share(host_id, mine[0].host, sum(p.disk_mib for p in mine), cells))
    return shares


def _take(conn: Connection, share: _Share) -> bool:
    taken = conn.execute(
        update(host)
        .where(
            host.c.id == share.host_id,
            host.c.draining.is_(False),
            host.c.disk_used_mib + share.disk_mib <= host.c.disk_mib,
        )
        .values(disk_used_mib=host.c.disk_used_mib + share.disk_mib, generation=host.c.generation + 1)
    )
    if taken.rowcount != 1:
        return False
    for cell, amounts in sorted(share.cells.items()):
        wanted = {resource: amount for resource, amount in amounts.items() if amount}
        taken = conn.execute(
            update(host_cell)
            .where(
                host_cell.c.host_id == share.host_id,
                host_cell.c.cell == cell,
                *(used_column(each) + amount <= whole_column(each) for each, amount in wanted.items()),
            )
            .values({used_column(each): used_column(each) + amount for each, amount in wanted.items()})
        )
        if taken.rowcount != 1:
            return False
    return True
