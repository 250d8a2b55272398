# SPDX-License-Identifier: Apache-2.0
"""Hosts: registered by an operator, filled in by their own reports."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime

from sqlalchemy import ARRAY, Connection, any_, bindparam, delete, insert, literal, or_, select, update
from sqlalchemy.exc import IntegrityError

from ppec_contract.api_hosts import HostCreate, HostUpdate, HostView
from ppec_contract.errors import PpecError
from ppec_contract.identity import Identity
from ppec_orchestrator.store.catalogue import id_of, insert_named, not_found
from ppec_orchestrator.store.certificates import withdraw_certificates
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.faults import is_reference_violation
from ppec_orchestrator.store.host_views import Judge, get_host
from ppec_orchestrator.store.labels import insert_host_labels
from ppec_orchestrator.store.search import host_text
from ppec_orchestrator.store.tables import host, host_removal, host_search, rack, vrf

# In a run's inventory a host of this name would be taken for the group, and the run's other hosts be left out.
_GROUPS = frozenset({"all", "ungrouped", "ppec_run"})
# Hosts whose heartbeats are written in one transaction.
FLUSHED_AT_ONCE = 200


def create_host(conn: Connection, wanted: HostCreate, judge: Judge) -> HostView:
    """Raises `request.invalid` for a reserved name, `host.exists`, `rack.not_found`, `vrf.not_found`."""
    if wanted.name in _GROUPS:
        raise PpecError(
            "request.invalid",
            f"name: {wanted.name!r} is reserved: it names a group of hosts in Ansible's inventories",
            hint="Choose another name.",
            subject=f"host {wanted.name}",
        )
    row = {
        "name": wanted.name,
        "rack_id": id_of(conn, rack, wanted.rack),
        "vrf_id": id_of(conn, vrf, wanted.vrf),
        "address": wanted.address,
        "port": wanted.port,
        "labels": dict(wanted.labels),
    }
    host_id = insert_named(conn, host, row, "host")
    insert_host_labels(conn, host_id, wanted.labels)
    text = host_text(wanted.name, wanted.address, wanted.labels)
    conn.execute(insert(host_search).values(name=wanted.name, host_id=host_id, text=text))
    return get_host(conn, wanted.name, judge)


def update_host(conn: Connection, name: str, wanted: HostUpdate, judge: Judge) -> HostView:
    """A host that drains takes no VMs of a host that is lost either: plans that count on it have to know."""
    changed = update(host).where(host.c.name == name, host.c.draining.is_not(wanted.draining))
    conn.execute(changed.values(draining=wanted.draining, generation=host.c.generation + 1))
    return get_host(conn, name, judge)


def delete_host(conn: Connection, name: str) -> None:
    """And its certificates. Raises `host.in_use` while VMs are allocated on it."""
    try:
        gone = conn.execute(delete(host).where(host.c.name == name)).rowcount
    except IntegrityError as error:
        if not is_reference_violation(error):
            raise
        raise PpecError(
            "host.in_use",
            f"host {name!r} still holds VMs",
            hint="Delete its VMs first.",
            subject=f"host {name}",
        ) from error
    if gone != 1:
        raise not_found("host", "host", name)
    conn.execute(insert(host_removal).values(name=name))
    withdraw_certificates(conn, Identity("host", name))


def flush_last_seen(database: Database, seen: Mapping[int, datetime]) -> frozenset[int]:
    """For all hosts heard; never turns a later time, written by another replica, back. So many in a transaction that
    nobody waits long for their rows: who does not wait at all finds no room on them.

    Returns the hosts whose rows somebody holds: they are left aside, or all the others would count as silent for them.
    """
    if not seen:
        return frozenset()
    ids = sorted(seen)
    most = FLUSHED_AT_ONCE if database.dialect == "postgresql" else len(ids)  # SQLite locks no rows.
    chunks = (ids[start : start + most] for start in range(0, len(ids), most))
    return frozenset().union(*(_flush(database, {host_id: seen[host_id] for host_id in chunk}) for chunk in chunks))


def _flush(database: Database, seen: Mapping[int, datetime]) -> frozenset[int]:
    statement = (
        update(host)
        .where(host.c.id == bindparam("row"))
        .where(or_(host.c.last_seen_at.is_(None), host.c.last_seen_at < bindparam("at")))
        # No change that a plan must know of at once: who plans looks for silent hosts besides.
        .values(last_seen_at=bindparam("at"), changed=host.c.changed)
    )
    with database.write() as conn:
        held = _held(conn, seen)
        rows = [{"row": host_id, "at": at} for host_id, at in sorted(seen.items()) if host_id not in held]
        if rows:
            conn.execute(statement, rows)
    return held


def _held(conn: Connection, host_ids: Collection[int]) -> frozenset[int]:
    """Those of these hosts that another transaction has locked; the others are by this one now."""
    if conn.dialect.name != "postgresql":
        return frozenset()  # SQLite locks no rows.
    # One array: as parameters of their own they would be thousands.
    chosen = select(host.c.id).where(host.c.id == any_(literal(sorted(host_ids), ARRAY(host.c.id.type))))
    # In the order of their ids, so that two replicas can't wait for each other.
    locked = chosen.order_by(host.c.id).with_for_update(key_share=True, skip_locked=True)
    free = frozenset(conn.execute(locked).scalars())
    if len(free) == len(host_ids):
        return frozenset()
    # A host may also have been deleted.
    return frozenset(conn.execute(chosen).scalars()) - free
