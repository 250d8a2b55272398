# SPDX-License-Identifier: Apache-2.0
"""The live source of the planner's fleet: reads the record (what is decided), not what hosts observe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row, func, select

from ppec_orchestrator.placement.fleet import CellState, Fleet, HostState
from ppec_orchestrator.store.tables import allocation, cluster, datacentre, host, host_cell, prefix, rack, vrf
from ppec_orchestrator.store.utilisation import free_counts

AnyRow = Row[*tuple[Any, ...]]


def load_fleet(conn: Connection, *, now: datetime, silent_after_s: float) -> Fleet:
    """The whole fleet as it stands in this transaction. A host silent for `silent_after_s` seconds is not live."""
    cells = _cells(conn)
    per_host = conn.execute(select(allocation.c.host_id, func.count()).group_by(allocation.c.host_id))
    vms: dict[int, int] = dict(iter(per_host))
    prefixes = conn.execute(
        select(prefix.c.id, prefix.c.vrf_id, prefix.c.region, prefix.c.cluster_id, prefix.c.rack_id, prefix.c.family)
    ).all()
    alive_since = now - timedelta(seconds=silent_after_s)
    rows = conn.execute(
        select(
            host,
            rack.c.name.label("rack_name"),
            rack.c.cluster_id,
            cluster.c.name.label("cluster_name"),
            cluster.c.architecture,
            datacentre.c.name.label("datacentre_name"),
            datacentre.c.region,
            vrf.c.name.label("vrf_name"),
        )
        .join(rack, rack.c.id == host.c.rack_id)
        .join(cluster, cluster.c.id == rack.c.cluster_id)
        .join(datacentre, datacentre.c.id == cluster.c.datacentre_id)
        .join(vrf, vrf.c.id == host.c.vrf_id)
    ).all()
    states = [
        HostState(
            host_id=row.id,
            name=row.name,
            datacentre=row.datacentre_name,
            cluster=row.cluster_name,
            rack=row.rack_name,
            vrf=row.vrf_name,
            architecture=row.architecture,
            cells=tuple(cells.get(row.id, ())),
            disk_mib=row.disk_mib,
            disk_free_mib=row.disk_mib - row.disk_used_mib,
            vms=vms.get(row.id, 0),
            live=row.enrolled_at is not None and row.last_seen_at is not None and row.last_seen_at >= alive_since,
            draining=row.draining,
            prefixes=_serving(row, prefixes),
            capabilities=frozenset((row.facts or {}).get("capabilities", ())),
        )
        for row in rows
    ]
    return Fleet.build(states, free_counts(conn, now))


def _cells(conn: Connection) -> Mapping[int, list[CellState]]:
    found: dict[int, list[CellState]] = {}
    for row in conn.execute(select(host_cell).order_by(host_cell.c.host_id, host_cell.c.cell)):
        found.setdefault(row.host_id, []).append(
            CellState(
                cell=row.cell,
                socket=row.socket,
                threads_per_core=row.threads_per_core,
                cores=row.cores,
                cores_free=row.cores - row.cores_used,
                memory_mib=row.memory_mib,
                memory_free_mib=row.memory_mib - row.memory_used_mib,
                shared_cpus=row.shared_cpus,
                shared_vcpus=row.shared_vcpus,
                shared_vcpus_free=row.shared_vcpus - row.shared_vcpus_used,
                pages_2m=row.pages_2m,
                pages_2m_free=row.pages_2m - row.pages_2m_used,
                pages_1g=row.pages_1g,
                pages_1g_free=row.pages_1g - row.pages_1g_used,
            )
        )
    return found


def _serving(row: AnyRow, prefixes: Sequence[AnyRow]) -> tuple[tuple[int, ...], ...]:
    """The host's prefixes, a tuple per family: its VRF's, for its region, cluster or rack; see `serving.py`."""
    families: dict[int, list[int]] = {}
    for p in prefixes:
        of_cluster = p.cluster_id == row.cluster_id and p.rack_id in (None, row.rack_id)
        if p.vrf_id == row.vrf_id and (of_cluster or p.region == row.region):
            families.setdefault(p.family, []).append(p.id)
    return tuple(tuple(sorted(ids)) for _, ids in sorted(families.items()))
