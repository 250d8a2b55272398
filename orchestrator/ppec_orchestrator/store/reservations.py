# SPDX-License-Identifier: Apache-2.0
"""Turns a plan into allocations and addresses, and gives them back.

A plan is made on a snapshot; between snapshot and commit others may have taken the room. So every host is looked at
again in the transaction that commits, under a lock that whoever changes what the host holds takes too: the room must
still be there. That replaces a plain comparison of generations, which would turn away plans that still fit. A plan with
rules about neighbours relies on more than room: its `Terms` name the hosts that must be of the generation they were.

A plan may have VMs move within a host first. The record follows them when the host has moved them (`seats.py`); until
then a cell may hold more than it has, which keeps everybody else off.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from sqlalchemy import BindParameter, Connection, Row, bindparam, delete, func, select, update
from sqlalchemy.exc import SQLAlchemyError

from ppec_contract.api_placement import NPlusOne
from ppec_contract.errors import PpecError
from ppec_orchestrator.placement.demand import CELL_RESOURCES, CellResource
from ppec_orchestrator.placement.plan import Move, Placement
from ppec_orchestrator.placement.request import SpareRule
from ppec_orchestrator.store import ipdb, seats
from ppec_orchestrator.store.cells import used_column, whole_column
from ppec_orchestrator.store.changes import ChangeMark
from ppec_orchestrator.store.clock import Clock, utc_now
from ppec_orchestrator.store.faults import is_held, store_error
from ppec_orchestrator.store.rows import insert_rows
from ppec_orchestrator.store.tables import allocation, allocation_cell, cluster, host, host_cell, host_pool, rack

AnyRow = Row[*tuple[Any, ...]]


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


class HostsHeldError(LostRaceError):
    """Somebody else's transaction kept rows of these hosts for longer than is waited for; `why` is for the caller who
    can do without none of them."""

    def __init__(self, hosts: Sequence[str], why: PpecError) -> None:
        super().__init__(hosts)
        self.why = why


@dataclass(frozen=True, slots=True)
class Terms:
    """On what a plan may be committed besides room: the generations of hosts it relies on, by id. Without `wait`, what
    another transaction is just changing counts as lost, unless generations are relied on. `marks` are those of the
    plan's hosts: on the same ones there still is the room, and it need not be looked at. `moves` are made on its hosts
    before: the room is looked at as it will be then, and the VMs must be where they were. `spare` are the rules about
    N+1 that the plan's hosts, by id, had of their clusters: under another one it was not made."""

    generations: Mapping[int, int] = field(default_factory=dict)
    marks: Mapping[int, int] = field(default_factory=dict)
    wait: bool = True
    moves: Sequence[Move] = ()
    spare: Mapping[int, SpareRule] = field(default_factory=dict)


ROOM = Terms()


@dataclass(frozen=True, slots=True)
class _Share:
    """What a plan takes of one host: of its own disk, of its pools by name, of its cells by number."""

    host_id: int
    host: str
    disk_mib: int
    pools: Mapping[str, int]
    cells: Mapping[int, Mapping[CellResource, int]]


def reserve(
    conn: Connection,
    placements: Sequence[Placement],
    terms: Terms = ROOM,
    *,
    networks: ipdb.Networks = ipdb.ALL_ANY,
    now: Clock = utc_now,
) -> dict[int, int]:
    """Commits the placements' room and addresses within the caller's write transaction; their `vm` rows must exist.
    `networks` say which addresses each of them gets, `now` which are out of quarantine.

    Returns the new marks of the hosts that had those of the terms, by id: of them nothing changed but this. Raises
    LostRaceError when any host can't take its share any more, HostsHeldError when that can't be seen for somebody who
    holds its row, and whatever `ipdb.grant` raises; after any, the caller's transaction must be rolled back.
    """
    if not placements:
        return {}
    shares = _shares(placements)
    hosts = _locked(conn, shares, terms)
    if lost := _lost(conn, shares, hosts, terms):
        raise LostRaceError(lost)
    mark = next(iter(hosts.values())).mark
    _take(conn, shares, mark)
    insert_rows(
        conn,
        allocation,
        [{"vm_id": p.vm_id, "host_id": p.host_id, "disk_mib": p.disk_mib, "pool": p.pool or None} for p in placements],
    )
    insert_rows(
        conn,
        allocation_cell,
        [{"vm_id": p.vm_id, "cell": cell} | p.per_cell for p in placements for cell in p.cells],
    )
    ipdb.grant(conn, {p.vm_id: p.host_id for p in placements}, networks, wait=terms.wait, now=now)
    return {share.host_id: mark for share in shares if hosts[share.host_id].changed == terms.marks.get(share.host_id)}


_IDS: BindParameter[Any] = bindparam("ids", expanding=True)
# By id: two transactions that take hosts in the same order can't wait for each other.
_ROWS = (
    select(
        host.c.id,
        host.c.draining,
        host.c.disk_mib,
        host.c.disk_used_mib,
        host.c.generation,
        host.c.changed,
        ChangeMark().label("mark"),
    )
    .where(host.c.id.in_(_IDS))
    .order_by(host.c.id)
)
_LOCK = _ROWS.with_for_update(key_share=True)
_LOCK_FREE = _ROWS.with_for_update(key_share=True, skip_locked=True)
_CELLS = select(host_cell).where(host_cell.c.host_id.in_(_IDS))
_RULES = (
    select(host.c.id, cluster.c.n_plus_one)
    .join(rack, rack.c.id == host.c.rack_id)
    .join(cluster, cluster.c.id == rack.c.cluster_id)
    .where(host.c.id.in_(_IDS))
)
_POOLS = select(host_pool).where(host_pool.c.host_id.in_(_IDS))


def lost_hosts(conn: Connection, placements: Sequence[Placement], terms: Terms = ROOM) -> list[str]:
    """The hosts that can't take their share, or (all of them) when a host relied on has changed. The others are locked
    until the transaction ends, so that they still can at its end."""
    shares = _shares(placements)
    return _lost(conn, shares, _locked(conn, shares, terms), terms)


def _locked(conn: Connection, shares: Sequence[_Share], terms: Terms) -> dict[int, AnyRow]:
    wanted = {share.host_id for share in shares} | set(terms.generations)
    # What is relied on for more than room can't be left aside: in a cluster some host is always just reporting.
    waits = terms.wait or bool(terms.generations)
    try:
        rows = conn.execute(_LOCK if waits else _LOCK_FREE, {"ids": sorted(wanted)})
    except SQLAlchemyError as error:
        if not is_held(error):
            raise
        raise HostsHeldError([share.host for share in shares], store_error(error)) from error
    return {row.id: row for row in rows}


def _lost(conn: Connection, shares: Sequence[_Share], hosts: Mapping[int, AnyRow], terms: Terms) -> list[str]:
    if any(host_id not in hosts or hosts[host_id].generation != was for host_id, was in terms.generations.items()):
        return [share.host for share in shares]
    doubtful = [
        share
        for share in shares
        if share.host_id not in hosts or hosts[share.host_id].changed != terms.marks.get(share.host_id)
    ]
    if not doubtful:
        return []
    # Statements of their own: they see what those had committed whom the lock waited for.
    rows = conn.execute(_CELLS, {"ids": [share.host_id for share in doubtful]})
    cells = {(row.host_id, row.cell): row for row in rows}
    names = {share.host for share in doubtful}
    shifts = seats.shifts(conn, [move for move in terms.moves if move.host in names])
    short = _short_of_pools(conn, doubtful) | _ruled_otherwise(conn, doubtful, terms)
    return [
        share.host
        for share in doubtful
        if share.host_id in short or not _fits(share, hosts.get(share.host_id), cells, shifts)
    ]


def _ruled_otherwise(conn: Connection, shares: Sequence[_Share], terms: Terms) -> set[int]:
    """The ids of hosts whose cluster has another rule about N+1 by now."""
    if not terms.spare:
        return set()
    rows = conn.execute(_RULES, {"ids": [share.host_id for share in shares]})
    now = {row.id: SpareRule.of(NPlusOne(**row.n_plus_one)) for row in rows}
    return {host_id for host_id, rule in now.items() if terms.spare.get(host_id, rule) != rule}


def _short_of_pools(conn: Connection, shares: Sequence[_Share]) -> set[int]:
    """The ids of hosts whose pools, as far as they have them, can't take their share."""
    wanting = [share for share in shares if share.pools]
    if not wanting:
        return set()
    rows = conn.execute(_POOLS, {"ids": [share.host_id for share in wanting]})
    free = {(row.host_id, row.name): row.size_mib - row.used_mib for row in rows}
    return {
        share.host_id
        for share in wanting
        for pool, mib in share.pools.items()
        if mib > free.get((share.host_id, pool), 0)
    }


def _fits(
    share: _Share,
    row: AnyRow | None,
    cells: Mapping[tuple[int, int], AnyRow],
    shifts: Mapping[str, seats.Shares | None],
) -> bool:
    shift = shifts.get(share.host, {})
    if shift is None or row is None or row.draining or row.disk_used_mib + share.disk_mib > row.disk_mib:
        return False
    for number in {*share.cells, *shift}:
        cell = cells.get((share.host_id, number))
        if cell is None:
            return False
        figures = cell._mapping
        for each in CELL_RESOURCES:
            taken = share.cells.get(number, {}).get(each, 0)
            more = taken + shift.get(number, {}).get(each, 0)
            # What moves away may be counted on by another one that was committed meanwhile.
            if (taken or more > 0) and figures[used_column(each).name] + more > figures[whole_column(each).name]:
                return False
    return True


def release(conn: Connection, vm_ids: Iterable[UUID], *, now: Clock = utc_now) -> int:
    """Gives back what the VMs hold, addresses included; returns how many of them held anything."""
    ids = list(vm_ids)
    ipdb.release(conn, ids, now=now)
    held = conn.execute(
        select(allocation.c.vm_id, allocation.c.host_id, allocation.c.disk_mib, allocation.c.pool).where(
            allocation.c.vm_id.in_(ids)
        )
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
    # By pool, None the host's own disk: every host is among these, for its generation.
    disks: dict[int, Counter[str | None]] = defaultdict(Counter)
    for row in held:
        disks[row.host_id][row.pool] += row.disk_mib
    conn.execute(_HOST_TAKES, [{"row": host_id, "disk": -mine[None]} for host_id, mine in sorted(disks.items())])
    _take_of_pools(
        conn, [(host_id, pool, -mib) for host_id, mine in disks.items() for pool, mib in mine.items() if pool]
    )
    if taken:
        amounts = ({f"more_{each}": -int(part._mapping[each]) for each in CELL_RESOURCES} for part in taken)
        conn.execute(
            _CELL_TAKES,
            [{"row": part.host_id, "number": part.cell} | more for part, more in zip(taken, amounts, strict=True)],
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
        disks = Counter[str]()
        for p in mine:
            disks[p.pool] += p.disk_mib
        own_mib = disks.pop("", 0)
        shares.append(_Share(host_id, mine[0].host, own_mib, disks, cells))
    return sorted(shares, key=lambda share: share.host_id)


# One statement of many rows each, whatever the number of hosts and cells.
_HOST_TAKES = (
    update(host)
    .where(host.c.id == bindparam("row"))
    .values(disk_used_mib=host.c.disk_used_mib + bindparam("disk"), generation=host.c.generation + 1)
)
_MARKED_TAKES = _HOST_TAKES.values(changed=bindparam("mark"))
_CELL_TAKES = (
    update(host_cell)
    .where(host_cell.c.host_id == bindparam("row"), host_cell.c.cell == bindparam("number"))
    .values({used_column(each): used_column(each) + bindparam(f"more_{each}") for each in CELL_RESOURCES})
)

_POOL_TAKES = (
    update(host_pool)
    .where(host_pool.c.host_id == bindparam("row"), host_pool.c.name == bindparam("pool"))
    .values(used_mib=host_pool.c.used_mib + bindparam("more"))
)


def _take_of_pools(conn: Connection, takes: Iterable[tuple[int, str, int]]) -> None:
    """Of (host id, pool, MiB)."""
    rows = [{"row": host_id, "pool": pool, "more": mib} for host_id, pool, mib in takes]
    if rows:
        conn.execute(_POOL_TAKES, rows)


def _take(conn: Connection, shares: Sequence[_Share], mark: int) -> None:
    conn.execute(_MARKED_TAKES, [{"row": each.host_id, "disk": each.disk_mib, "mark": mark} for each in shares])
    _take_of_pools(conn, [(each.host_id, pool, mib) for each in shares for pool, mib in each.pools.items()])
    conn.execute(
        _CELL_TAKES,
        [
            {"row": share.host_id, "number": cell} | {f"more_{each}": amounts.get(each, 0) for each in CELL_RESOURCES}
            for share in shares
            for cell, amounts in share.cells.items()
        ],
    )
