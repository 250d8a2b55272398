# SPDX-License-Identifier: Apache-2.0
"""Hosts as the API shows them: where they stand, what they reported, and what is free on them by the record.

They are made as the JSON of `HostView`, without the model: see `vm_views.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from pydantic_core import from_json, to_json
from sqlalchemy import ColumnElement, Connection, Select, Text, cast, func, literal_column, select

from ppec_contract.api_hosts import HostLiveness, HostView
from ppec_contract.host import CellReport, HealthLevel
from ppec_orchestrator.store import host_lists
from ppec_orchestrator.store.catalogue import not_found
from ppec_orchestrator.store.host_lists import HostFilter
from ppec_orchestrator.store.json_text import quoted
from ppec_orchestrator.store.paging import Documents, Slice
from ppec_orchestrator.store.tables import allocation, cluster, datacentre, host, host_cell, host_pool, rack, vrf

# Of a host's row: name, enrolled_at and last_seen_at in, liveness and the true last_seen_at out.
Judge = Callable[[str, datetime | None, datetime | None], tuple[HostLiveness, datetime | None]]

# What of a report is shown of one host alone.
_DETAILS = ("cpu", "drives", "file_systems", "nics", "drift")
# What a cell tells besides, which is made of the record.
_MADE_OF_CELLS = ("nvme_drives", "nvme_drives_free")
# What is made for every host; what remains of a `HostView` is of a report.
_MADE = (
    "name", "rack", "cluster", "datacentre", "vrf", "address", "port", "liveness", "draining", "labels", "cells",
    "disk_mib", "disk_free_mib", "vm_count", "last_seen_at", "health_level",
)  # fmt: skip
# What lists say of a host whose report doesn't say it: because it is told of one alone, or is not known yet.
_SILENT = {
    name: field.get_default(call_default_factory=True)
    for name, field in HostView.model_fields.items()
    if name not in _MADE
}
_SILENT_CELL = to_json(
    {
        name: field.default
        for name, field in CellReport.model_fields.items()
        if not field.is_required() and name not in _MADE_OF_CELLS
    }
).decode()[1:]


def get_host(conn: Connection, name: str, judge: Judge) -> HostView:
    """With its pools, and what its last report says of its parts and of drift, as the report's own JSON is."""
    row = conn.execute(select(host.c.id, host.c.report, host.c.health).where(host.c.name == name)).one_or_none()
    if row is None:
        raise not_found("host", "host", name)
    report = row.report or {}
    told = {part: report[part] for part in _DETAILS if report.get(part)}
    listed = conn.execute(_rows(select(host.c.id).where(host.c.id == row.id))).one()
    document = from_json(_document(listed, judge)[1]) | {"pools": _pools(conn, row.id)}
    try:
        return HostView.model_validate_json(to_json(document | told | {"health": row.health or ()}))
    except ValueError:
        # Stored before reports had bounds; the host's next one replaces it.
        return HostView.model_validate_json(to_json(document))


def _pools(conn: Connection, host_id: int) -> list[dict[str, Any]]:
    """Sizes as reported; what is free is by the record."""
    pools = select(host_pool).where(host_pool.c.host_id == host_id).order_by(host_pool.c.name)
    return [
        {"name": row.name, "size_mib": row.size_mib, "free_mib": max(row.size_mib - row.used_mib, 0)}
        for row in conn.execute(pools)
    ]


def page(conn: Connection, wanted: Slice, chosen: HostFilter, judge: Judge) -> Documents:
    """In one statement. A host that was heard only now, and so is not as `chosen` wants it any more, is left out: a
    page may be short."""
    rows = conn.execute(_rows(host_lists.keys(wanted, chosen))).all()
    shown = rows[: wanted.limit]
    hosts = (_document(row, judge) for row in shown)
    fitting = [text.encode() for liveness, text in hosts if chosen.liveness in (None, liveness)]
    return Documents(fitting, shown[-1].name if len(rows) > wanted.limit else None)


def _cells_text() -> ColumnElement[str]:
    """A host's cells as one text, their numbers apart by spaces and themselves by commas: of its row, because rows of
    their own would cost as much again."""
    numbers = (
        host_cell.c.cell, host_cell.c.socket, host_cell.c.threads_per_core, host_cell.c.cores,
        host_cell.c.cores_reserved, host_cell.c.cores_used, host_cell.c.memory_mib, host_cell.c.memory_reserved_mib,
        host_cell.c.memory_used_mib, host_cell.c.nvme, host_cell.c.nvme_used,
    )  # fmt: skip
    text: ColumnElement[str] = cast(numbers[0], Text)
    for number in numbers[1:]:
        text = text + literal_column("' '") + cast(number, Text)
    cells = select(func.aggregate_strings(text, ",")).where(host_cell.c.host_id == host.c.id)
    return cells.scalar_subquery()


_VMS = select(func.count()).select_from(allocation).where(allocation.c.host_id == host.c.id).scalar_subquery()
_COLUMNS: tuple[ColumnElement[Any], ...] = (
    host.c.name,
    rack.c.name,
    cluster.c.name,
    datacentre.c.name,
    vrf.c.name,
    host.c.address,
    host.c.port,
    host.c.draining,
    host.c.enrolled_at,
    host.c.last_seen_at,
    cast(host.c.labels, Text),
    cast(host.c.facts, Text),
    cast(host.c.health, Text),
    host.c.disk_mib,
    host.c.disk_used_mib,
    _cells_text(),
    _VMS,
)


def _rows(keys: Select[Any]) -> Select[Any]:
    """Of the hosts whose `id` is among the keys, by name."""
    wanted = keys.subquery()
    return (
        select(*_COLUMNS)
        .select_from(wanted)
        .join(host, host.c.id == wanted.c.id)
        .join(rack, rack.c.id == host.c.rack_id)
        .join(cluster, cluster.c.id == rack.c.cluster_id)
        .join(datacentre, datacentre.c.id == cluster.c.datacentre_id)
        .join(vrf, vrf.c.id == host.c.vrf_id)
        .order_by(host.c.name)
    )


def _document(row: Sequence[Any], judge: Judge) -> tuple[HostLiveness, str]:
    """How it is, and its JSON."""
    (
        name, rack_name, cluster_name, datacentre_name, vrf_name, address, port, draining, enrolled_at, stored_at,
        labels, facts, health, disk_mib, disk_used_mib, cells, vm_count,
    ) = row  # fmt: skip
    liveness, last_seen_at = judge(name, enrolled_at, stored_at)
    return liveness, (
        f'{{"name":{quoted(name)},"rack":{quoted(rack_name)},"cluster":{quoted(cluster_name)},'
        f'"datacentre":{quoted(datacentre_name)},"vrf":{quoted(vrf_name)},"address":{quoted(address)},"port":{port},'
        f'"liveness":"{liveness.value}","draining":{"true" if draining else "false"},"labels":{labels},'
        f'"cells":[{_cells(cells) if cells else ""}],"disk_mib":{disk_mib},'
        f'"disk_free_mib":{max(disk_mib - disk_used_mib, 0)},"vm_count":{vm_count},'
        f'"last_seen_at":{to_json(last_seen_at).decode()},"health_level":{_worst(health)},{_reported(facts)}}}'
    )


# Most hosts have one of few systems, and nothing wrong: what is told of that is made once, not for each of them.
@lru_cache(maxsize=256)
def _reported(facts: str | None) -> str:
    """The members of a host's document that its report tells, or nothing does."""
    return to_json(_SILENT | (from_json(facts or "null") or {})).decode()[1:-1]


@lru_cache(maxsize=256)
def _worst(health: str | None) -> str:
    findings: Iterable[Mapping[str, str]] = from_json(health or "null") or ()
    said = {finding["level"] for finding in findings}
    return next((f'"{level.value}"' for level in reversed(tuple(HealthLevel)) if level.value in said), "null")


def _cells(text: str) -> str:
    """Sizes as reported; what is free is by the record, which is what placement goes by."""
    cells = sorted([int(number) for number in cell.split()] for cell in text.split(","))
    return ",".join(
        f'{{"cell":{cell},"socket":{socket},"threads_per_core":{threads},"cores":{cores + reserved},'
        f'"cores_reserved":{reserved},"cores_free":{max(cores - used, 0)},"memory_mib":{memory + memory_reserved},'
        f'"memory_reserved_mib":{memory_reserved},"memory_free_mib":{max(memory - memory_used, 0)},'
        f'"nvme_drives":{drives},"nvme_drives_free":{max(drives - drives_used, 0)},{_SILENT_CELL}'
        for (
            cell,
            socket,
            threads,
            cores,
            reserved,
            used,
            memory,
            memory_reserved,
            memory_used,
            drives,
            drives_used,
        ) in cells
    )
