# SPDX-License-Identifier: Apache-2.0
"""Where the addresses of prefixes are: counted from the rows, never kept as figures that could go wrong."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Connection, Row, func, select

from ppec_contract.api_ipdb import MAX_COUNT, FreeRun, HoldKind, PrefixFree
from ppec_orchestrator.ipdb.free import largest_networks
from ppec_orchestrator.ipdb.ranges import AddressRange, Run, from_hex, to_hex
from ppec_orchestrator.store.external_addresses import free_rows
from ppec_orchestrator.store.serving import held_runs, range_of
from ppec_orchestrator.store.tables import address, address_hold, prefix

_MOST_RUNS, _MOST_NETWORKS = 256, 64


@dataclass(frozen=True, slots=True)
class Utilisation:
    """Counts of addresses, exact however large. `reserved` and `quarantined` are those that no VM has; `excluded` are
    not in `total`. `next_free_at` is when the next one leaves quarantine."""

    total: int
    used: int
    reserved: int
    quarantined: int
    excluded: int
    next_free_at: datetime | None = None

    @property
    def free(self) -> int:
        return self.total - self.used - self.reserved - self.quarantined


def in_quarantine(now: datetime) -> ColumnElement[bool]:
    """Of `address` rows: released, not held back, not on its way back to NetBox, and not yet free for others."""
    return (
        (address.c.free_from > now)
        & address.c.vm_id.is_(None)
        & address.c.hold_id.is_(None)
        & address.c.going_back.is_(False)
    )


def utilisation_of(conn: Connection, rows: Collection[Row[Any]], now: datetime) -> dict[int, Utilisation]:
    """Of these `prefix` rows, by id."""
    ids = [row.id for row in rows]
    used = _counts(conn, address.c.prefix_id, address.c.vm_id.is_not(None) & address.c.prefix_id.in_(ids))
    quarantined: dict[int, tuple[int, datetime]] = {
        row.prefix_id: (row.resting, row.soonest)
        for row in conn.execute(
            select(
                address.c.prefix_id,
                func.count().label("resting"),
                func.min(address.c.free_from, type_=address.c.free_from.type).label("soonest"),
            )
            .where(in_quarantine(now), address.c.prefix_id.in_(ids))
            .group_by(address.c.prefix_id)
        )
    }
    holds: dict[int, list[Row[Any]]] = defaultdict(list)
    for hold in conn.execute(select(address_hold).where(address_hold.c.prefix_id.in_(ids))):
        holds[hold.prefix_id].append(hold)
    used_held = _counts(conn, address.c.hold_id, address.c.hold_id.is_not(None) & address.c.vm_id.is_not(None))
    outside = [row.id for row in rows if row.netbox_id is not None]
    acquired = _counts(conn, address.c.prefix_id, address.c.prefix_id.in_(outside) & address.c.going_back.is_(False))
    found = {}
    for row in rows:
        usable = range_of(row)
        # Of a prefix that NetBox keeps only what was acquired from there is ours.
        size = usable.size if row.netbox_id is None else acquired.get(row.id, 0)
        held: Counter[str] = Counter()
        for hold in holds[row.id]:
            run = (int(hold.first_hex, 16), int(hold.last_hex, 16))
            held[hold.kind] += usable.count(run) - used_held.get(hold.id, 0)
        resting, soonest = quarantined.get(row.id, (0, None))
        excluded = held[HoldKind.EXCLUDED.value]
        found[row.id] = Utilisation(
            size - excluded, used.get(row.id, 0), held[HoldKind.RESERVED.value], resting, excluded, soonest
        )
    return found


def _counts(conn: Connection, by: ColumnElement[Any], condition: ColumnElement[bool]) -> dict[int, int]:
    return dict(conn.execute(select(by, func.count()).where(condition).group_by(by)).all())


def free_counts(conn: Connection, now: datetime) -> dict[int, int]:
    """Free addresses of every prefix; capped at 2**53, which only IPv6 reaches."""
    rows = conn.execute(select(prefix)).all()
    return {prefix_id: min(one.free, MAX_COUNT) for prefix_id, one in utilisation_of(conn, rows, now).items()}


def held_counts(conn: Connection, vm_ids: Collection[UUID]) -> dict[int, int]:
    """How many addresses these VMs have, per prefix that has given them any."""
    return _counts(conn, address.c.prefix_id, address.c.vm_id.in_(list(vm_ids)))


def free_space(conn: Connection, row: Row[Any], now: datetime) -> PrefixFree:
    """The free addresses of a `prefix` row, as runs and as networks."""
    usable = range_of(row, held_runs(conn, [row.id]).get(row.id, ()))
    outside = row.netbox_id is not None
    runs = _runs_of(conn, row.id, now) if outside else list(usable.runs(_taken(conn, row.id, now)))
    shown = runs[: _MOST_RUNS + 1]
    largest = largest_networks(runs, usable.family, _MOST_NETWORKS + 1)
    free = utilisation_of(conn, [row], now)[row.id].free
    return PrefixFree(
        prefix_id=row.id,
        addresses_free=min(free, MAX_COUNT),
        runs=tuple(_run(usable, run) for run in shown[:_MOST_RUNS]),
        networks=tuple(largest[:_MOST_NETWORKS]),
        more=len(shown) > _MOST_RUNS or len(largest) > _MOST_NETWORKS,
    )


def _taken(conn: Connection, prefix_id: int, now: datetime) -> Iterator[int]:
    rows = conn.execute(
        select(address.c.address_hex).where(
            address.c.prefix_id == prefix_id, address.c.vm_id.is_not(None) | in_quarantine(now)
        )
    ).scalars()
    return (int(text, 16) for text in rows)


def _runs_of(conn: Connection, prefix_id: int, now: datetime) -> list[Run]:
    """Of free rows, those that follow one another."""
    texts = conn.execute(
        select(address.c.address_hex).where(free_rows(prefix_id, now)).order_by(address.c.address_hex)
    ).scalars()
    found: list[Run] = []
    for number in (int(text, 16) for text in texts):
        if found and found[-1][1] == number - 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found


def _run(usable: AddressRange, run: Run) -> FreeRun:
    first, last = (from_hex(to_hex(number), usable.family) for number in run)
    return FreeRun(first=first, last=last, count=min(run[1] - run[0] + 1, MAX_COUNT))
