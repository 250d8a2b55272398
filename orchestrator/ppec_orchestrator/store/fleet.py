# SPDX-License-Identifier: Apache-2.0
"""The live source of the planner's fleet: reads the record (what is decided), not what hosts observe.

The whole fleet, or those of its hosts that changed since the last look (`changes.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import BindParameter, Connection, Row, Select, bindparam, func, or_, select, true

from ppec_contract.api_placement import NPlusOne
from ppec_contract.version import Capability
from ppec_orchestrator.placement.fleet import CellState, Fleet, HostState, PoolState
from ppec_orchestrator.placement.request import SpareRule
from ppec_orchestrator.store.changes import Horizon
from ppec_orchestrator.store.seated import Home, SeatedVms
from ppec_orchestrator.store.tables import (
    cluster,
    datacentre,
    host,
    host_cell,
    host_pool,
    host_removal,
    prefix,
    rack,
    vrf,
)
from ppec_orchestrator.store.utilisation import free_counts

# A create may have several cells of a host opened, by as many retunes.
_OPENS_CELLS = Capability.SEVERAL_RETUNES.value
AnyRow = Row[*tuple[Any, ...]]
# Whom a prefix serves: id, VRF, region or None, cluster or None, rack or None, family.
PrefixRow = tuple[int, int, str | None, int | None, int | None, int]


@dataclass(frozen=True, slots=True)
class Changes:
    """What `changes_since` found: the marks of hosts changed by id, where to look from next time, and how many hosts
    were ever removed."""

    marks: Mapping[int, int]
    horizon: int
    removals: int


def load_fleet(conn: Connection, *, now: datetime, silent_after_s: float) -> Fleet:
    """The whole fleet as it stands in this transaction. A host silent for `silent_after_s` seconds is not live."""
    reader = HostReader(SeatedVms(), prefix_rows(conn))
    return Fleet.build(reader.read(conn, now - timedelta(seconds=silent_after_s)), free_counts(conn, now))


def _changes() -> Select[Any]:
    removals = select(func.count()).select_from(host_removal).scalar_subquery()
    look = select(Horizon().label("horizon"), removals.label("removals")).subquery()
    marked = select(host.c.id, host.c.changed).where(host.c.changed >= bindparam("from")).subquery()
    return select(look, marked).select_from(look).join(marked, true(), isouter=True)


_CHANGES = _changes()


def changes_since(conn: Connection, horizon: int) -> Changes:
    """One statement, whose cost is that of the hosts it finds."""
    found = conn.execute(_CHANGES, {"from": horizon}).all()
    marks = {row.id: row.changed for row in found if row.id is not None}
    return Changes(marks, found[0].horizon, found[0].removals)


def silent_hosts(conn: Connection, alive_since: datetime) -> frozenset[int]:
    """Hosts not heard since then, or never."""
    silent = or_(host.c.enrolled_at.is_(None), host.c.last_seen_at.is_(None), host.c.last_seen_at < alive_since)
    return frozenset(conn.execute(select(host.c.id).where(silent)).scalars())


def prefix_rows(conn: Connection) -> tuple[PrefixRow, ...]:
    columns = (prefix.c.id, prefix.c.vrf_id, prefix.c.region, prefix.c.cluster_id, prefix.c.rack_id, prefix.c.family)
    return tuple(
        (row[0], row[1], row[2], row[3], row[4], row[5]) for row in conn.execute(select(*columns).order_by(columns[0]))
    )


@dataclass(frozen=True, slots=True)
class HostReader:
    """Reads hosts with all that a plan must know of them. `seated` is kept by who reads again and again."""

    seated: SeatedVms
    prefixes: Sequence[PrefixRow]

    def read(self, conn: Connection, alive_since: datetime, ids: Collection[int] | None = None) -> list[HostState]:
        """Those with these ids, or all of them; ids that are no host's are left out."""
        rows = conn.execute(_HOSTS).all() if ids is None else conn.execute(_SOME_HOSTS, {"ids": ids}).all()
        cells, pools = _cells(conn, ids), _pools(conn, ids)
        announced = {row.id: frozenset((row.facts or {}).get("capabilities", ())) for row in rows}
        homes = {row.id: Home(row.architecture, row.vrf_name, _OPENS_CELLS in announced[row.id]) for row in rows}
        vms = self.seated.read(conn, homes, ids)
        serving = _Serving(self.prefixes)
        asked = {row.cluster_id: row.n_plus_one for row in rows}
        rules = {cluster_id: SpareRule.of(NPlusOne(**rule)) for cluster_id, rule in asked.items()}
        return [
            HostState(
                host_id=row.id,
                name=row.name,
                region=row.region,
                datacentre=row.datacentre_name,
                cluster=row.cluster_name,
                rack=row.rack_name,
                vrf=row.vrf_name,
                architecture=row.architecture,
                cells=tuple(cells.get(row.id, ())),
                disk_mib=row.disk_mib,
                disk_free_mib=row.disk_mib - row.disk_used_mib,
                vms=tuple(vms.get(row.id, ())),
                live=row.enrolled_at is not None and row.last_seen_at is not None and row.last_seen_at >= alive_since,
                draining=row.draining,
                prefixes=serving.of(row),
                capabilities=announced[row.id],
                generation=row.generation,
                mark=row.changed,
                labels=row.labels,
                pools=pools.get(row.id, {}),
                spare=rules[row.cluster_id],
            )
            for row in rows
        ]


_HOSTS = (
    select(
        host.c.id,
        host.c.name,
        host.c.disk_mib,
        host.c.disk_used_mib,
        host.c.enrolled_at,
        host.c.last_seen_at,
        host.c.draining,
        host.c.facts,
        host.c.generation,
        host.c.changed,
        host.c.labels,
        host.c.vrf_id,
        host.c.rack_id,
        rack.c.name.label("rack_name"),
        rack.c.cluster_id,
        cluster.c.name.label("cluster_name"),
        cluster.c.architecture,
        cluster.c.n_plus_one,
        datacentre.c.name.label("datacentre_name"),
        datacentre.c.region,
        vrf.c.name.label("vrf_name"),
    )
    .join(rack, rack.c.id == host.c.rack_id)
    .join(cluster, cluster.c.id == rack.c.cluster_id)
    .join(datacentre, datacentre.c.id == cluster.c.datacentre_id)
    .join(vrf, vrf.c.id == host.c.vrf_id)
)
_IDS: BindParameter[Any] = bindparam("ids", expanding=True)
_SOME_HOSTS = _HOSTS.where(host.c.id.in_(_IDS))
_CELLS = select(host_cell).order_by(host_cell.c.host_id, host_cell.c.cell)
_SOME_CELLS = _CELLS.where(host_cell.c.host_id.in_(_IDS))
_POOLS = select(host_pool).order_by(host_pool.c.host_id, host_pool.c.name)
_SOME_POOLS = _POOLS.where(host_pool.c.host_id.in_(_IDS))


def _cells(conn: Connection, ids: Collection[int] | None) -> Mapping[int, list[CellState]]:
    rows = conn.execute(_CELLS) if ids is None else conn.execute(_SOME_CELLS, {"ids": ids})
    found: dict[int, list[CellState]] = {}
    for row in rows:
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
                nvme=row.nvme,
                nvme_free=row.nvme - row.nvme_used,
                cores_reserved=row.cores_reserved,
                memory_reserved_mib=row.memory_reserved_mib,
            )
        )
    return found


def _pools(conn: Connection, ids: Collection[int] | None) -> Mapping[int, dict[str, PoolState]]:
    rows = conn.execute(_POOLS) if ids is None else conn.execute(_SOME_POOLS, {"ids": ids})
    found: dict[int, dict[str, PoolState]] = {}
    for row in rows:
        found.setdefault(row.host_id, {})[row.name] = PoolState(row.size_mib, row.size_mib - row.used_mib)
    return found


class _Serving:
    """A host's prefixes, a tuple per family, in the order in which they give: see `serving.py`."""

    def __init__(self, prefixes: Sequence[PrefixRow]) -> None:
        # The rack's own first, then the cluster's, then the region's.
        self._prefixes = sorted(prefixes, key=lambda each: (each[4] is None, each[3] is None, each[0]))
        # Hosts of one rack and VRF have the same, and there are few of those.
        self._known: dict[tuple[int, int], tuple[tuple[int, ...], ...]] = {}

    def of(self, row: AnyRow) -> tuple[tuple[int, ...], ...]:
        key = (row.rack_id, row.vrf_id)
        if key not in self._known:
            families: dict[int, list[int]] = {}
            for prefix_id, vrf_id, region, cluster_id, rack_id, family in self._prefixes:
                of_cluster = cluster_id == row.cluster_id and rack_id in (None, row.rack_id)
                if vrf_id == row.vrf_id and (of_cluster or region == row.region):
                    families.setdefault(family, []).append(prefix_id)
            self._known[key] = tuple(tuple(ids) for _, ids in sorted(families.items()))
        return self._known[key]
