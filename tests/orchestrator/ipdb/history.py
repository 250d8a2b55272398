# SPDX-License-Identifier: Apache-2.0
"""Checks a history of addresses: what the clients are sure of, what the database wrote down, and how it ended.

Each check gives the faults it finds, in words; a correct allocator gives none.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_address
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID

from sqlalchemy import func, select

from ppec_orchestrator.ipdb.ranges import from_hex
from ppec_orchestrator.store import ipdb, tables
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.serving import range_of
from ppec_orchestrator.store.utilisation import utilisation_of


@dataclass(frozen=True, slots=True)
class Ownership:
    """A VM surely had the address from `begin` to `end` (None: to the end of the history)."""

    address: str
    vm: str
    begin: int
    end: int | None


def lines_of(logs: Iterable[Path]) -> list[dict[str, Any]]:
    """All lines in the order of time. A process that is killed may leave half a line at the end of its log, which the
    next one of its slot goes on with."""
    found = []
    for log in logs:
        for text in log.read_text().splitlines():
            try:
                found.append(json.loads(text))
            except ValueError:
                continue
    return sorted(found, key=lambda line: line["at"])


def ownerships(lines: Iterable[dict[str, Any]]) -> list[Ownership]:
    open_ones: dict[str, dict[str, Any]] = {}
    found = []
    for line in lines:
        if line["what"] == "granted":
            # Told a second time by who adopts it.
            open_ones.setdefault(line["vm"], line)
        elif begun := open_ones.pop(line["vm"], None):
            found += [Ownership(one, line["vm"], begun["at"], line["at"]) for one in begun["addresses"]]
    found += [Ownership(one, vm, line["at"], None) for vm, line in open_ones.items() for one in line["addresses"]]
    return found


def duplicates(found: Iterable[Ownership]) -> Iterator[str]:
    """Two VMs that surely had one address at the same time."""
    by_address: dict[str, list[Ownership]] = defaultdict(list)
    for one in found:
        by_address[one.address].append(one)
    for mine in by_address.values():
        mine.sort(key=lambda one: one.begin)
        for before, after in pairwise(mine):
            if before.end is None or before.end > after.begin:
                yield f"{after.address} was granted to {after.vm} while {before.vm} had it"


def lost(found: Iterable[Ownership], lines: Iterable[dict[str, Any]], database: Database) -> Iterator[str]:
    """What was committed and never asked back, and isn't there."""
    asked_back = {line["vm"] for line in lines if line["what"] == "releasing"}
    mine: dict[UUID, set[str]] = defaultdict(set)
    for one in found:
        if one.vm not in asked_back:
            mine[UUID(one.vm)].add(one.address)
    with database.read() as conn:
        there = ipdb.addresses_of(conn, mine)
    for vm_id, wanted in mine.items():
        has = {f"{one.prefix_id} {one.address.ip}" for one in there.get(vm_id, ())}
        if has != wanted:
            yield f"{vm_id} was told {sorted(wanted)} and has {sorted(has)}"


def written_history(database: Database) -> Iterator[str]:
    """Grants and releases of each address alternate, for the same VM, out of quarantine, not while it was excluded;
    and the last of them is how things are."""
    with database.read() as conn:
        events = conn.execute(select(tables.address_event).order_by(tables.address_event.c.id)).all()
        quarantine_s = dict(conn.execute(select(tables.prefix.c.id, tables.prefix.c.quarantine_s)).all())
        rows = conn.execute(select(tables.address).where(tables.address.c.vm_id.is_not(None))).all()
    holder: dict[tuple[int, str], UUID] = {}
    released: dict[tuple[int, str], Any] = {}
    excluded: set[tuple[int, str]] = set()
    for event in events:
        key = event.prefix_id, event.address_hex
        if event.action == "excluded":
            excluded.add(key)
        elif event.action == "opened":
            excluded.discard(key)
        elif event.action == "granted":
            if key in holder:
                yield f"event {event.id}: {key} was granted to {event.vm_id} while {holder[key]} had it"
            if key in excluded:
                yield f"event {event.id}: {key} was granted while it was excluded"
            rest = timedelta(seconds=quarantine_s[event.prefix_id])
            if key in released and event.at < released[key] + rest:
                yield f"event {event.id}: {key} was granted before its quarantine was over"
            holder[key] = event.vm_id
        elif event.action == "released":
            if holder.pop(key, None) != event.vm_id:
                yield f"event {event.id}: {key} was released by {event.vm_id}, which did not have it"
            released[key] = event.at
    if {(row.prefix_id, row.address_hex): row.vm_id for row in rows} != holder:
        yield "the addresses' holders are not those of the history"


def leaks(database: Database) -> Iterator[str]:
    """Addresses without a VM, and VMs without an address of each family that serves them."""
    with database.read() as conn:
        held = conn.execute(
            select(tables.address.c.vm_id, tables.prefix.c.family)
            .join(tables.prefix, tables.prefix.c.id == tables.address.c.prefix_id)
            .where(tables.address.c.vm_id.is_not(None))
        ).all()
        there = set(conn.execute(select(tables.vm.c.id)).scalars())
    families: dict[UUID, Counter[int]] = defaultdict(Counter)
    for row in held:
        families[row.vm_id][row.family] += 1
    for vm_id in families.keys() - there:
        yield f"addresses are held by {vm_id}, which does not exist"
    for vm_id in there:
        if not families[vm_id][4] or not families[vm_id][6]:
            yield f"{vm_id} has no address of some family: {dict(families[vm_id])}"


def counters(database: Database) -> Iterator[str]:
    """The counts add up to what there is, and no row is lost or out of range."""
    now = ipdb.utc_now()
    with database.read() as conn:
        for prefix in conn.execute(select(tables.prefix)).all():
            usable, use = range_of(prefix), utilisation_of(conn, [prefix], now)[prefix.id]
            mine = tables.address.c.prefix_id == prefix.id
            texts = conn.execute(select(tables.address.c.address_hex).where(mine)).scalars().all()
            used = select(func.count()).where(mine, tables.address.c.vm_id.is_not(None))
            if conn.execute(used).scalar_one() != use.used:
                yield f"{prefix.cidr}: {use.used} are counted as used"
            if use.free < 0 or use.total != usable.size - use.excluded:
                yield f"{prefix.cidr}: {use} does not add up"
            if prefix.family == 4 and len(texts) != usable.size:
                yield f"{prefix.cidr}: {len(texts)} rows for {usable.size} addresses"
            outside = [text for text in texts if ip_address(str(from_hex(text, prefix.family))) not in usable]
            if outside:
                yield f"{prefix.cidr}: {outside} are none of its addresses"


def faults(lines: list[dict[str, Any]], database: Database) -> list[str]:
    found = ownerships(lines)
    return [
        *duplicates(found),
        *lost(found, lines, database),
        *written_history(database),
        *leaks(database),
        *counters(database),
    ]
