# SPDX-License-Identifier: Apache-2.0
"""Prefixes: which addresses there are, and whom they serve. Granting and releasing is `store/ipdb.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from ipaddress import ip_network
from itertools import islice
from typing import Any

from sqlalchemy import Connection, Row, Select, Table, bindparam, delete, insert, select
from sqlalchemy.exc import IntegrityError

from ppec_contract.api import Page
from ppec_contract.api_ipdb import MAX_COUNT, PrefixCreate, PrefixFree, PrefixUpdate, PrefixView, VrfFree
from ppec_contract.errors import PpecError
from ppec_orchestrator.ipdb.free import uncovered
from ppec_orchestrator.ipdb.ranges import (
    Network,
    check_gateway,
    check_nameservers,
    check_purpose,
    to_address,
    to_hex,
    usable_range,
)
from ppec_orchestrator.store.catalogue import id_of, not_found
from ppec_orchestrator.store.clock import Clock
from ppec_orchestrator.store.faults import is_unique_violation
from ppec_orchestrator.store.holds import end_holds
from ppec_orchestrator.store.ipdb import insert_ipv4_rows
from ppec_orchestrator.store.paging import Slice, page_of
from ppec_orchestrator.store.prefix_changes import change_prefix
from ppec_orchestrator.store.prefixes_in_use import at_rest, check_unheld, prefix_in_use
from ppec_orchestrator.store.serving import range_of
from ppec_orchestrator.store.tables import address, cluster, datacentre, prefix, rack, vrf
from ppec_orchestrator.store.utilisation import Utilisation, free_space, utilisation_of

_MOST_NETWORKS = 256


def create_prefix(conn: Connection, wanted: PrefixCreate, now: datetime) -> PrefixView:
    """See `insert_prefix`."""
    return get_prefix(conn, insert_prefix(conn, wanted), now)


class Places:
    """Rows by name that prefixes refer to: each is asked for once in a transaction, which keeps it locked."""

    def __init__(self, conn: Connection) -> None:
        self._conn = conn
        self._ids: dict[tuple[str, str], int] = {}
        self._clusters: dict[int, int] = {}
        self._regions: dict[str, bool] = {}

    def id_of(self, table: Table, name: str, *, alone: bool = False) -> int:
        key = table.name, name
        if key not in self._ids:
            self._ids[key] = id_of(self._conn, table, name, alone=alone)
        return self._ids[key]

    def cluster_of(self, rack_id: int) -> int:
        if rack_id not in self._clusters:
            found = self._conn.execute(select(rack.c.cluster_id).where(rack.c.id == rack_id)).scalar_one()
            self._clusters[rack_id] = found
        return self._clusters[rack_id]

    def has_region(self, name: str) -> bool:
        if name not in self._regions:
            within = select(datacentre.c.id).where(datacentre.c.region == name)
            self._regions[name] = self._conn.execute(within).first() is not None
        return self._regions[name]


def insert_prefix(conn: Connection, wanted: PrefixCreate, places: Places | None = None) -> int:
    """Returns its id. Raises `prefix.invalid`, `prefix.overlaps`, or `….not_found` for what it refers to. Whoever
    inserts many in a transaction gives the same `places` each time."""
    places = places or Places(conn)
    check_purpose(wanted.cidr)
    check_gateway(wanted.cidr, wanted.gateway)
    check_nameservers(wanted.cidr, wanted.nameservers)
    usable = usable_range(wanted.cidr, gateway=wanted.gateway, first=wanted.first, last=wanted.last)
    # Alone: of two prefixes created at once in one VRF, the second sees the first.
    vrf_id = places.id_of(vrf, wanted.vrf, alone=True)
    cluster_id = places.id_of(cluster, wanted.cluster) if wanted.cluster is not None else None
    rack_id = places.id_of(rack, wanted.rack) if wanted.rack is not None else None
    if rack_id is not None and places.cluster_of(rack_id) != cluster_id:
        raise _invalid(wanted.cidr, f"rack {wanted.rack} is not in cluster {wanted.cluster}")
    if wanted.region is not None and not places.has_region(wanted.region):
        raise _invalid(wanted.cidr, f"no data centre is in region {wanted.region}")
    _check_overlap(conn, wanted, vrf_id)
    low, high = _edges(wanted.cidr)
    row = {
        "low_hex": low,
        "high_hex": high,
        "vrf_id": vrf_id,
        "cidr": str(wanted.cidr),
        "family": usable.family,
        "gateway": str(wanted.gateway) if wanted.gateway is not None else None,
        "vlan": wanted.vlan,
        "bridge": wanted.bridge,
        "region": wanted.region,
        "cluster_id": cluster_id,
        "rack_id": rack_id,
        "first": str(usable.first),
        "last": str(usable.last),
        "nameservers": [str(server) for server in wanted.nameservers],
        "next_hex": to_hex(int(usable.first)) if usable.family == 6 else None,
        "quarantine_s": wanted.quarantine_s,
        "netbox_id": wanted.netbox_id,
    }
    prefix_id = _insert_row(conn, wanted, row)
    if usable.family == 4 and wanted.netbox_id is None:
        insert_ipv4_rows(conn, prefix_id, usable)
    return prefix_id


def _insert_row(conn: Connection, wanted: PrefixCreate, row: dict[str, Any]) -> int:
    if wanted.netbox_id is None:
        return int(conn.execute(_INSERTED, row).scalar_one())
    try:
        with conn.begin_nested():
            return int(conn.execute(_INSERTED, row).scalar_one())
    except IntegrityError as error:
        # Within its VRF nothing overlaps it: what is there already is the same prefix of NetBox's.
        if not is_unique_violation(error):
            raise
        there = conn.execute(select_prefixes().where(prefix.c.netbox_id == wanted.netbox_id)).one_or_none()
        where = f"as {there.cidr} of VRF {there.vrf}" if there is not None else "by another request"
        why = f"NetBox's prefix {wanted.netbox_id} is registered already, {where}: both would give the same addresses"
        raise _invalid(wanted.cidr, why) from error


def update_prefix(conn: Connection, prefix_id: int, wanted: PrefixUpdate, now: datetime) -> PrefixView:
    """See `change_prefix`."""
    change_prefix(conn, prefix_id, wanted, now)
    return get_prefix(conn, prefix_id, now)


# Made once: of an import of many prefixes, putting the statement together would take longer than carrying it out.
_FIRST_BEHIND = (
    select(prefix.c.cidr, prefix.c.low_hex)
    .where(
        prefix.c.vrf_id == bindparam("vrf_id"),
        prefix.c.family == bindparam("version"),
        prefix.c.high_hex >= bindparam("low"),
    )
    .order_by(prefix.c.high_hex)
    .limit(1)
)
_INSERTED = insert(prefix).returning(prefix.c.id)


def _check_overlap(conn: Connection, wanted: PrefixCreate, vrf_id: int) -> None:
    """Those there don't overlap, so of all that end where this begins or later the first one would."""
    low, high = _edges(wanted.cidr)
    around = {"vrf_id": vrf_id, "version": wanted.cidr.version, "low": low}
    there = conn.execute(_FIRST_BEHIND, around).one_or_none()
    if there is None or there.low_hex > high:
        return
    raise PpecError(
        "prefix.overlaps",
        f"prefix {wanted.cidr} overlaps {there.cidr} of VRF {wanted.vrf}",
        hint="Use another VRF, or a prefix that is free.",
        subject=f"prefix {wanted.cidr}",
    )


def _edges(network: Network) -> tuple[str, str]:
    return to_hex(int(network.network_address)), to_hex(int(network.broadcast_address))


def _invalid(cidr: Network, why: str) -> PpecError:
    return PpecError("prefix.invalid", f"prefix {cidr}: {why}", subject=f"prefix {cidr}")


def get_prefix(conn: Connection, prefix_id: int, now: datetime) -> PrefixView:
    return views_of(conn, [_row(conn, prefix_id)], now)[0]


def free_in_prefix(conn: Connection, prefix_id: int, now: datetime) -> PrefixFree:
    """Raises `prefix.not_found`."""
    return free_space(conn, _row(conn, prefix_id), now)


def free_in_vrf(conn: Connection, name: str, within: Network) -> VrfFree:
    """Where another prefix would fit. Raises `vrf.not_found`."""
    vrf_id = vrf_named(conn, name)
    cidrs = conn.execute(select(prefix.c.cidr).where(prefix.c.vrf_id == vrf_id)).scalars().all()
    found = list(islice(uncovered(within, map(ip_network, cidrs)), _MOST_NETWORKS + 1))
    return VrfFree(vrf=name, within=within, networks=tuple(found[:_MOST_NETWORKS]), more=len(found) > _MOST_NETWORKS)


def vrf_named(conn: Connection, name: str) -> int:
    """Its id. Raises `vrf.not_found`."""
    found = conn.execute(select(vrf.c.id).where(vrf.c.name == name)).scalar()
    if found is None:
        raise not_found("vrf", "VRF", name)
    return int(found)


def _row(conn: Connection, prefix_id: int) -> Row[Any]:
    row = conn.execute(select_prefixes().where(prefix.c.id == prefix_id)).one_or_none()
    if row is None:
        raise not_found("prefix", "prefix", str(prefix_id))
    return row


def page_of_prefixes(conn: Connection, wanted: Slice, vrf_name: str | None, now: datetime) -> Page[PrefixView]:
    """Of one VRF, or of all. Raises `vrf.not_found`."""
    statement = select_prefixes().order_by(prefix.c.id).limit(wanted.limit + 1)
    if wanted.after is not None:
        statement = statement.where(prefix.c.id > wanted.after)
    if vrf_name is not None:
        statement = statement.where(prefix.c.vrf_id == vrf_named(conn, vrf_name))
    views = views_of(conn, conn.execute(statement).all(), now)
    return page_of(views, wanted, lambda view: view, lambda view: view.prefix_id)


@dataclass(frozen=True, slots=True)
class Deletion:
    """How a prefix is deleted, by whom and when: `now` is asked once the prefix is locked. With `force` quarantines of
    its addresses end, and what is held back of it is opened. With `forget_acquired`, what NetBox gave goes as well:
    there is no NetBox any more to give it back to."""

    caller: str
    now: Clock
    force: bool = False
    forget_acquired: bool = False


def check_deletable(conn: Connection, prefix_id: int, now: datetime) -> None:
    """What `delete_prefix` would refuse without `force`; to be asked before anything is given back to NetBox."""
    _row(conn, prefix_id)
    check_unheld(conn, prefix_id, now)


def delete_prefix(conn: Connection, prefix_id: int, how: Deletion) -> None:
    """Raises `prefix.not_found`, or `resource.in_use` while a VM has one of its addresses, one rests or is held."""
    # The lock keeps new IPv6 grants and holds out; the delete waits for IPv4 grants and releases under way, and leaves
    # what they took or laid to rest.
    locked = select(prefix.c.id).where(prefix.c.id == prefix_id).with_for_update()
    if conn.execute(locked).one_or_none() is None:
        raise not_found("prefix", "prefix", str(prefix_id))
    now = how.now()
    unused = delete(address).where(address.c.prefix_id == prefix_id, address.c.vm_id.is_(None))
    if how.force:
        end_holds(conn, prefix_id, how.caller, now)
    else:
        unused = unused.where(~at_rest(now))
        check_unheld(conn, prefix_id, now)
    if not how.forget_acquired:
        # Those from NetBox are given back first: nobody would know of them any more.
        unused = unused.where(address.c.external_id.is_(None))
    conn.execute(unused)
    if conn.execute(select(address.c.id).where(address.c.prefix_id == prefix_id).limit(1)).first() is not None:
        raise prefix_in_use(conn, prefix_id, now)
    conn.execute(delete(prefix).where(prefix.c.id == prefix_id))


def select_prefixes() -> Select[Any]:
    """Rows of `prefix`, with the names of what they refer to."""
    return (
        select(prefix, vrf.c.name.label("vrf"), cluster.c.name.label("cluster"), rack.c.name.label("rack"))
        .join(vrf, vrf.c.id == prefix.c.vrf_id)
        .outerjoin(cluster, cluster.c.id == prefix.c.cluster_id)
        .outerjoin(rack, rack.c.id == prefix.c.rack_id)
    )


def views_of(conn: Connection, rows: Sequence[Row[Any]], now: datetime) -> list[PrefixView]:
    """Of rows of `select_prefixes`."""
    counted = utilisation_of(conn, rows, now)
    return [_view(row, counted[row.id]) for row in rows]


def as_created(row: Row[Any]) -> dict[str, Any]:
    """The fields of `PrefixCreate`."""
    usable = range_of(row)
    return {
        "vrf": row.vrf,
        "cidr": usable.network,
        "gateway": usable.gateway,
        "vlan": row.vlan,
        "bridge": row.bridge,
        "region": row.region,
        "cluster": row.cluster,
        "rack": row.rack,
        "first": usable.first,
        "last": usable.last,
        "nameservers": tuple(server for text in row.nameservers if (server := to_address(text)) is not None),
        "quarantine_s": row.quarantine_s,
        "netbox_id": row.netbox_id,
    }


def _view(row: Row[Any], use: Utilisation) -> PrefixView:
    return PrefixView(
        **as_created(row),
        prefix_id=row.id,
        addresses_total=min(use.total, MAX_COUNT),
        addresses_free=min(use.free, MAX_COUNT),
        addresses_used=use.used,
        addresses_reserved=min(use.reserved, MAX_COUNT),
        addresses_quarantined=use.quarantined,
        addresses_excluded=min(use.excluded, MAX_COUNT),
    )
