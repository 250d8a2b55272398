# SPDX-License-Identifier: Apache-2.0
"""Prefixes: which addresses there are, and whom they serve. Granting and releasing is `store/ipdb.py`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from ipaddress import ip_network
from itertools import islice
from typing import Any

from sqlalchemy import Connection, Row, Select, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from ppec_contract.api import Page
from ppec_contract.api_ipdb import MAX_COUNT, PrefixCreate, PrefixFree, PrefixUpdate, PrefixView, VrfFree
from ppec_contract.errors import PpecError
from ppec_orchestrator.ipdb.free import uncovered
from ppec_orchestrator.ipdb.ranges import Network, check_purpose, to_address, to_hex, usable_range
from ppec_orchestrator.store.catalogue import id_of, not_found
from ppec_orchestrator.store.faults import is_unique_violation
from ppec_orchestrator.store.ipdb import insert_ipv4_rows
from ppec_orchestrator.store.paging import Slice, page_of
from ppec_orchestrator.store.prefixes_in_use import prefix_in_use
from ppec_orchestrator.store.serving import range_of
from ppec_orchestrator.store.tables import address, cluster, datacentre, prefix, rack, vrf
from ppec_orchestrator.store.utilisation import Utilisation, free_space, utilisation_of

_MOST_NETWORKS = 256


def create_prefix(conn: Connection, wanted: PrefixCreate, now: datetime) -> PrefixView:
    """See `insert_prefix`."""
    return get_prefix(conn, insert_prefix(conn, wanted), now)


def insert_prefix(conn: Connection, wanted: PrefixCreate) -> int:
    """Returns its id. Raises `prefix.invalid`, `prefix.overlaps`, or `….not_found` for what it refers to."""
    check_purpose(wanted.cidr)
    usable = usable_range(wanted.cidr, gateway=wanted.gateway, first=wanted.first, last=wanted.last)
    # Alone: of two prefixes created at once in one VRF, the second sees the first.
    vrf_id = id_of(conn, vrf, wanted.vrf, alone=True)
    cluster_id = id_of(conn, cluster, wanted.cluster) if wanted.cluster is not None else None
    rack_id = id_of(conn, rack, wanted.rack) if wanted.rack is not None else None
    if rack_id is not None:
        _check_rack(conn, wanted, rack_id, cluster_id)
    if wanted.region is not None:
        _check_region(conn, wanted)
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
    try:
        with conn.begin_nested():
            return int(conn.execute(insert(prefix).values(row).returning(prefix.c.id)).scalar_one())
    except IntegrityError as error:
        # Within its VRF nothing overlaps it: what is there already is the same prefix of NetBox's.
        if not is_unique_violation(error):
            raise
        there = conn.execute(select_prefixes().where(prefix.c.netbox_id == wanted.netbox_id)).one_or_none()
        where = f"as {there.cidr} of VRF {there.vrf}" if there is not None else "by another request"
        why = f"NetBox's prefix {wanted.netbox_id} is registered already, {where}: both would give the same addresses"
        raise _invalid(wanted.cidr, why) from error


def update_prefix(conn: Connection, prefix_id: int, wanted: PrefixUpdate, now: datetime) -> PrefixView:
    """Raises `prefix.not_found`."""
    given = wanted.model_dump(mode="json", exclude_unset=True)
    # Of these there is no prefix without one.
    changes = {name: value for name, value in given.items() if value is not None or name == "vlan"}
    if changes:
        conn.execute(update(prefix).where(prefix.c.id == prefix_id).values(changes))
    return get_prefix(conn, prefix_id, now)


def _check_region(conn: Connection, wanted: PrefixCreate) -> None:
    if conn.execute(select(datacentre.c.id).where(datacentre.c.region == wanted.region)).first() is None:
        raise _invalid(wanted.cidr, f"no data centre is in region {wanted.region}")


def _check_rack(conn: Connection, wanted: PrefixCreate, rack_id: int, cluster_id: int | None) -> None:
    if conn.execute(select(rack.c.cluster_id).where(rack.c.id == rack_id)).scalar_one() != cluster_id:
        raise _invalid(wanted.cidr, f"rack {wanted.rack} is not in cluster {wanted.cluster}")


def _check_overlap(conn: Connection, wanted: PrefixCreate, vrf_id: int) -> None:
    """Those there don't overlap, so of all that end where this begins or later the first one would."""
    low, high = _edges(wanted.cidr)
    there = conn.execute(
        select(prefix.c.cidr, prefix.c.low_hex)
        .where(prefix.c.vrf_id == vrf_id, prefix.c.family == wanted.cidr.version, prefix.c.high_hex >= low)
        .order_by(prefix.c.high_hex)
        .limit(1)
    ).one_or_none()
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
    vrf_id = conn.execute(select(vrf.c.id).where(vrf.c.name == name)).scalar()
    if vrf_id is None:
        raise not_found("vrf", "VRF", name)
    cidrs = conn.execute(select(prefix.c.cidr).where(prefix.c.vrf_id == vrf_id)).scalars().all()
    found = list(islice(uncovered(within, map(ip_network, cidrs)), _MOST_NETWORKS + 1))
    return VrfFree(vrf=name, within=within, networks=tuple(found[:_MOST_NETWORKS]), more=len(found) > _MOST_NETWORKS)


def _row(conn: Connection, prefix_id: int) -> Row[Any]:
    row = conn.execute(select_prefixes().where(prefix.c.id == prefix_id)).one_or_none()
    if row is None:
        raise not_found("prefix", "prefix", str(prefix_id))
    return row


def page_of_prefixes(conn: Connection, wanted: Slice, vrf_name: str | None, now: datetime) -> Page[PrefixView]:
    statement = select_prefixes().order_by(prefix.c.id).limit(wanted.limit + 1)
    if wanted.after is not None:
        statement = statement.where(prefix.c.id > wanted.after)
    if vrf_name is not None:
        statement = statement.where(vrf.c.name == vrf_name)
    views = views_of(conn, conn.execute(statement).all(), now)
    return page_of(views, wanted, lambda view: view, lambda view: view.prefix_id)


def delete_prefix(conn: Connection, prefix_id: int, *, forget_acquired: bool = False) -> None:
    """Raises `prefix.not_found`, or `resource.in_use` while a VM has one of its addresses.

    With `forget_acquired`, what NetBox gave goes as well: there is no NetBox any more to give it back to.
    """
    # The lock keeps new IPv6 grants out; the delete waits for IPv4 grants under way, and leaves what they took.
    locked = select(prefix.c.id).where(prefix.c.id == prefix_id).with_for_update()
    if conn.execute(locked).one_or_none() is None:
        raise not_found("prefix", "prefix", str(prefix_id))
    unused = delete(address).where(address.c.prefix_id == prefix_id, address.c.vm_id.is_(None))
    if not forget_acquired:
        # Those from NetBox are given back first: nobody would know of them any more.
        unused = unused.where(address.c.external_id.is_(None))
    conn.execute(unused)
    if conn.execute(select(address.c.id).where(address.c.prefix_id == prefix_id).limit(1)).first() is not None:
        raise prefix_in_use(conn, prefix_id)
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
