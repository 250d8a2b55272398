# SPDX-License-Identifier: Apache-2.0
"""Hosts: registered by an operator, filled in by their own reports."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, Select, bindparam, delete, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from ppec_contract.api import HostCreate, HostLiveness, HostUpdate, HostView, Page
from ppec_contract.errors import PpecError
from ppec_contract.host import CellReport, HealthLevel
from ppec_contract.identity import Identity
from ppec_orchestrator.store.catalogue import id_of, insert_named, not_found
from ppec_orchestrator.store.certificates import withdraw_certificates
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.faults import is_reference_violation
from ppec_orchestrator.store.paging import Slice, page_of
from ppec_orchestrator.store.tables import allocation, cluster, datacentre, host, host_cell, host_removal, rack, vrf

# Of a host's row: name, enrolled_at and last_seen_at in, liveness and the true last_seen_at out.
Judge = Callable[[str, datetime | None, datetime | None], tuple[HostLiveness, datetime | None]]

# In a run's inventory a host of this name would be taken for the group, and the run's other hosts be left out.
_GROUPS = frozenset({"all", "ungrouped", "ppec_run"})


# What of a report is shown of one host alone.
_DETAILS = ("cpu", "drives", "file_systems", "nics", "drift")


@dataclass(frozen=True, slots=True)
class HostFilter:
    """Which hosts to list; None means any."""

    cluster: str | None = None
    rack: str | None = None
    vrf: str | None = None


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
    }
    insert_named(conn, host, row, "host")
    return get_host(conn, wanted.name, judge)


def get_host(conn: Connection, name: str, judge: Judge) -> HostView:
    """With what its last report says of its parts and of drift, as the report's own JSON is."""
    row = conn.execute(_select().add_columns(host.c.report).where(host.c.name == name)).one_or_none()
    if row is None:
        raise not_found("host", "host", name)
    report = row.report or {}
    told = {name: report[name] for name in _DETAILS if report.get(name)}
    view = _views(conn, [row], judge)[0]
    try:
        return HostView.model_validate(view.model_dump() | told | {"health": row.health or ()})
    except ValueError:
        # Stored before reports had bounds; the host's next one replaces it.
        return view


def page_of_hosts(conn: Connection, wanted: Slice, chosen: HostFilter, judge: Judge) -> Page[HostView]:
    statement = _select().order_by(host.c.name).limit(wanted.limit + 1)
    if wanted.after is not None:
        statement = statement.where(host.c.name > wanted.after)
    for column, value in ((cluster.c.name, chosen.cluster), (rack.c.name, chosen.rack), (vrf.c.name, chosen.vrf)):
        if value is not None:
            statement = statement.where(column == value)
    views = _views(conn, conn.execute(statement).all(), judge)
    return page_of(views, wanted.limit, lambda view: view, lambda view: view.name)


def update_host(conn: Connection, name: str, wanted: HostUpdate, judge: Judge) -> HostView:
    conn.execute(update(host).where(host.c.name == name).values(draining=wanted.draining))
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


def flush_last_seen(database: Database, seen: Mapping[int, datetime]) -> None:
    """One transaction for all hosts heard; never turns a later time, written by another replica, back."""
    statement = (
        update(host)
        .where(host.c.id == bindparam("row"))
        .where(or_(host.c.last_seen_at.is_(None), host.c.last_seen_at < bindparam("at")))
        # No change that a plan must know of at once: who plans looks for silent hosts besides.
        .values(last_seen_at=bindparam("at"), changed=host.c.changed)
    )
    with database.write() as conn:
        # In the order of their ids, so that two replicas can't wait for each other.
        conn.execute(statement, [{"row": host_id, "at": at} for host_id, at in sorted(seen.items())])


def _select() -> Select[Any]:
    return (
        select(
            host.c.id,
            host.c.name,
            rack.c.name.label("rack"),
            cluster.c.name.label("cluster"),
            datacentre.c.name.label("datacentre"),
            vrf.c.name.label("vrf"),
            host.c.address,
            host.c.port,
            host.c.draining,
            host.c.enrolled_at,
            host.c.last_seen_at,
            host.c.facts,
            host.c.health,
            host.c.disk_mib,
            host.c.disk_used_mib,
        )
        .join(rack, rack.c.id == host.c.rack_id)
        .join(cluster, cluster.c.id == rack.c.cluster_id)
        .join(datacentre, datacentre.c.id == cluster.c.datacentre_id)
        .join(vrf, vrf.c.id == host.c.vrf_id)
    )


def _views(conn: Connection, rows: Sequence[Row[Any]], judge: Judge) -> list[HostView]:
    ids = [row.id for row in rows]
    cells = _cells(conn, ids)
    count = select(allocation.c.host_id, func.count()).where(allocation.c.host_id.in_(ids))
    vms: dict[int, int] = dict(conn.execute(count.group_by(allocation.c.host_id)).all())
    return [_view(row, cells.get(row.id, []), vms.get(row.id, 0), judge) for row in rows]


def _view(row: Row[Any], cells: Iterable[CellReport], vm_count: int, judge: Judge) -> HostView:
    liveness, last_seen_at = judge(row.name, row.enrolled_at, row.last_seen_at)
    return HostView(
        name=row.name,
        rack=row.rack,
        cluster=row.cluster,
        datacentre=row.datacentre,
        vrf=row.vrf,
        address=row.address,
        port=row.port,
        liveness=liveness,
        draining=row.draining,
        cells=tuple(cells),
        disk_mib=row.disk_mib,
        disk_free_mib=max(row.disk_mib - row.disk_used_mib, 0),
        vm_count=vm_count,
        last_seen_at=last_seen_at,
        health_level=_worst(row.health),
        **(row.facts or {}),
    )


def _worst(health: Sequence[Mapping[str, str]] | None) -> HealthLevel | None:
    said = {finding["level"] for finding in health or ()}
    return next((level for level in reversed(tuple(HealthLevel)) if level.value in said), None)


def _cells(conn: Connection, host_ids: Sequence[int]) -> dict[int, list[CellReport]]:
    """Each host's cells: sizes as reported, what is free by the record, which is what placement goes by."""
    found: dict[int, list[CellReport]] = defaultdict(list)
    statement = select(host_cell).where(host_cell.c.host_id.in_(host_ids))
    for row in conn.execute(statement.order_by(host_cell.c.host_id, host_cell.c.cell)):
        found[row.host_id].append(
            CellReport(
                cell=row.cell,
                socket=row.socket,
                threads_per_core=row.threads_per_core,
                cores=row.cores + row.cores_reserved,
                cores_reserved=row.cores_reserved,
                cores_free=max(row.cores - row.cores_used, 0),
                memory_mib=row.memory_mib + row.memory_reserved_mib,
                memory_reserved_mib=row.memory_reserved_mib,
                memory_free_mib=max(row.memory_mib - row.memory_used_mib, 0),
            )
        )
    return found
