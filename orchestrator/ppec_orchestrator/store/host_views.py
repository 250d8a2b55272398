# SPDX-License-Identifier: Apache-2.0
"""Hosts as the API shows them: where they stand, what they reported, and what is free on them by the record.

Lists are made as plain dicts of the shape of `HostView`, see `vm_views.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from pydantic_core import to_json
from sqlalchemy import Connection, Row, Select, func, select

from ppec_contract.api import HostLiveness, HostView
from ppec_contract.host import CellReport, HealthLevel
from ppec_orchestrator.store import host_lists
from ppec_orchestrator.store.catalogue import not_found
from ppec_orchestrator.store.host_lists import HostFilter
from ppec_orchestrator.store.paging import Documents, Slice
from ppec_orchestrator.store.tables import allocation, cluster, datacentre, host, host_cell, rack, vrf

Document = dict[str, Any]
# Of a host's row: name, enrolled_at and last_seen_at in, liveness and the true last_seen_at out.
Judge = Callable[[str, datetime | None, datetime | None], tuple[HostLiveness, datetime | None]]

# What of a report is shown of one host alone.
_DETAILS = ("cpu", "drives", "file_systems", "nics", "drift")
# What lists say of every host, because it is told of one alone, or is not known yet.
_SILENT = {
    name: field.get_default(call_default_factory=True)
    for name, field in HostView.model_fields.items()
    if not field.is_required()
}
_SILENT_CELL = {name: field.default for name, field in CellReport.model_fields.items() if not field.is_required()}


def get_host(conn: Connection, name: str, judge: Judge) -> HostView:
    """With what its last report says of its parts and of drift, as the report's own JSON is."""
    row = conn.execute(select(host.c.id, host.c.report, host.c.health).where(host.c.name == name)).one_or_none()
    if row is None:
        raise not_found("host", "host", name)
    report = row.report or {}
    told = {part: report[part] for part in _DETAILS if report.get(part)}
    document = _documents(conn, [row.id], judge)[0]
    try:
        return HostView.model_validate(document | told | {"health": row.health or ()})
    except ValueError:
        # Stored before reports had bounds; the host's next one replaces it.
        return HostView.model_validate(document)


def page(conn: Connection, wanted: Slice, chosen: HostFilter, judge: Judge) -> Documents:
    """A host that was heard only now, and so is not as `chosen` wants it any more, is left out: a page may be short."""
    found = host_lists.keys(conn, wanted, chosen)
    shown = found[: wanted.limit]
    hosts = _documents(conn, [row.id for row in shown], judge)
    fitting = (one for one in hosts if chosen.liveness is None or one["liveness"] == chosen.liveness.value)
    return Documents(list(map(to_json, fitting)), shown[-1].name if len(found) > wanted.limit else None)


def _documents(conn: Connection, host_ids: Sequence[int], judge: Judge) -> list[Document]:
    """These hosts, in this order, in three statements; one that is there no longer is left out."""
    if not host_ids:
        return []
    rows = {row.id: row for row in conn.execute(_ROWS.where(host.c.id.in_(host_ids)))}
    cells = _cells(conn, host_ids)
    count = select(allocation.c.host_id, func.count()).where(allocation.c.host_id.in_(host_ids))
    vms: dict[int, int] = dict(conn.execute(count.group_by(allocation.c.host_id)).all())
    return [
        _document(row, cells.get(host_id, ()), vms.get(host_id, 0), judge)
        for host_id in host_ids
        if (row := rows.get(host_id)) is not None
    ]


_ROWS: Select[Any] = (
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
        host.c.labels,
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


def _document(row: Row[Any], cells: Sequence[Document], vm_count: int, judge: Judge) -> Document:
    liveness, last_seen_at = judge(row.name, row.enrolled_at, row.last_seen_at)
    known = {
        "name": row.name,
        "rack": row.rack,
        "cluster": row.cluster,
        "datacentre": row.datacentre,
        "vrf": row.vrf,
        "address": row.address,
        "port": row.port,
        "liveness": liveness.value,
        "draining": row.draining,
        "labels": row.labels,
        "cells": cells,
        "disk_mib": row.disk_mib,
        "disk_free_mib": max(row.disk_mib - row.disk_used_mib, 0),
        "vm_count": vm_count,
        "last_seen_at": last_seen_at,
        "health_level": _worst(row.health),
    }
    return _SILENT | known | (row.facts or {})


def _worst(health: Sequence[Mapping[str, str]] | None) -> str | None:
    said = {finding["level"] for finding in health or ()}
    return next((level.value for level in reversed(tuple(HealthLevel)) if level.value in said), None)


def _cells(conn: Connection, host_ids: Sequence[int]) -> dict[int, list[Document]]:
    """Each host's cells: sizes as reported, what is free by the record, which is what placement goes by."""
    columns = (
        host_cell.c.host_id, host_cell.c.cell, host_cell.c.socket, host_cell.c.threads_per_core, host_cell.c.cores,
        host_cell.c.cores_reserved, host_cell.c.cores_used, host_cell.c.memory_mib, host_cell.c.memory_reserved_mib,
        host_cell.c.memory_used_mib,
    )  # fmt: skip
    found: dict[int, list[Document]] = defaultdict(list)
    chosen = select(*columns).where(host_cell.c.host_id.in_(host_ids))
    for host_id, cell, socket, threads, cores, reserved, used, memory, memory_reserved, memory_used in conn.execute(
        chosen.order_by(host_cell.c.host_id, host_cell.c.cell)
    ):
        found[host_id].append(
            _SILENT_CELL
            | {
                "cell": cell,
                "socket": socket,
                "threads_per_core": threads,
                "cores": cores + reserved,
                "cores_reserved": reserved,
                "cores_free": max(cores - used, 0),
                "memory_mib": memory + memory_reserved,
                "memory_reserved_mib": memory_reserved,
                "memory_free_mib": max(memory - memory_used, 0),
            }
        )
    return found
