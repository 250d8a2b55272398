# SPDX-License-Identifier: Apache-2.0
"""Prefixes: which addresses there are, and whom they serve. Granting and releasing is `store/ipdb.py`."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_network
from typing import Any

from sqlalchemy import Connection, Row, Select, delete, func, insert, select

from ppec_contract.api import Page, PrefixCreate, PrefixView
from ppec_contract.errors import PpecError
from ppec_orchestrator.ipdb.ranges import MAX_COUNT, AddressRange, to_address, to_hex, usable_range
from ppec_orchestrator.store.catalogue import id_of, in_use, not_found
from ppec_orchestrator.store.ipdb import insert_ipv4_rows, range_of
from ppec_orchestrator.store.paging import Slice, page_of
from ppec_orchestrator.store.tables import address, cluster, prefix, rack, vrf


def create_prefix(conn: Connection, wanted: PrefixCreate) -> PrefixView:
    """Raises `prefix.invalid`, `prefix.overlaps`, or `….not_found` for what it refers to."""
    usable = usable_range(wanted.cidr, gateway=wanted.gateway, first=wanted.first, last=wanted.last)
    if any(getattr(server, "scope_id", None) for server in wanted.nameservers):
        raise _invalid(wanted, "a name server names a zone, which only means something on one machine")
    # Alone: of two prefixes created at once in one VRF, the second sees the first.
    vrf_id = id_of(conn, vrf, wanted.vrf, alone=True)
    cluster_id = id_of(conn, cluster, wanted.cluster)
    rack_id = id_of(conn, rack, wanted.rack) if wanted.rack is not None else None
    if rack_id is not None:
        _check_rack(conn, wanted, rack_id, cluster_id)
    _check_overlap(conn, wanted, vrf_id)
    row = {
        "vrf_id": vrf_id,
        "cidr": str(wanted.cidr),
        "family": usable.family,
        "gateway": str(wanted.gateway) if wanted.gateway is not None else None,
        "vlan": wanted.vlan,
        "bridge": wanted.bridge,
        "cluster_id": cluster_id,
        "rack_id": rack_id,
        "first": str(usable.first),
        "last": str(usable.last),
        "nameservers": [str(server) for server in wanted.nameservers],
        "next_hex": to_hex(int(usable.first)) if usable.family == 6 else None,
    }
    prefix_id = conn.execute(insert(prefix).values(row).returning(prefix.c.id)).scalar_one()
    if usable.family == 4:
        insert_ipv4_rows(conn, prefix_id, usable)
    return get_prefix(conn, prefix_id)


def _check_rack(conn: Connection, wanted: PrefixCreate, rack_id: int, cluster_id: int) -> None:
    if conn.execute(select(rack.c.cluster_id).where(rack.c.id == rack_id)).scalar_one() != cluster_id:
        raise _invalid(wanted, f"rack {wanted.rack} is not in cluster {wanted.cluster}")


def _check_overlap(conn: Connection, wanted: PrefixCreate, vrf_id: int) -> None:
    statement = select(prefix.c.cidr).where(prefix.c.vrf_id == vrf_id, prefix.c.family == wanted.cidr.version)
    for cidr in conn.execute(statement).scalars():
        if wanted.cidr.overlaps(ip_network(cidr)):
            raise PpecError(
                "prefix.overlaps",
                f"prefix {wanted.cidr} overlaps {cidr} of VRF {wanted.vrf}",
                hint="Use another VRF, or a prefix that is free.",
                subject=f"prefix {wanted.cidr}",
            )


def _invalid(wanted: PrefixCreate, why: str) -> PpecError:
    return PpecError("prefix.invalid", f"prefix {wanted.cidr}: {why}", subject=f"prefix {wanted.cidr}")


def get_prefix(conn: Connection, prefix_id: int) -> PrefixView:
    row = conn.execute(_select().where(prefix.c.id == prefix_id)).one_or_none()
    if row is None:
        raise not_found("prefix", "prefix", str(prefix_id))
    return _views(conn, [row])[0]


def page_of_prefixes(conn: Connection, wanted: Slice, vrf_name: str | None) -> Page[PrefixView]:
    statement = _select().order_by(prefix.c.id).limit(wanted.limit + 1)
    if wanted.after is not None:
        statement = statement.where(prefix.c.id > wanted.after)
    if vrf_name is not None:
        statement = statement.where(vrf.c.name == vrf_name)
    views = _views(conn, conn.execute(statement).all())
    return page_of(views, wanted, lambda view: view, lambda view: view.prefix_id)


def delete_prefix(conn: Connection, prefix_id: int) -> None:
    """Raises `prefix.not_found`, or `resource.in_use` while a VM has one of its addresses."""
    # The lock keeps new IPv6 grants out; the delete waits for IPv4 grants under way, and leaves what they took.
    locked = select(prefix.c.id).where(prefix.c.id == prefix_id).with_for_update()
    if conn.execute(locked).one_or_none() is None:
        raise not_found("prefix", "prefix", str(prefix_id))
    conn.execute(delete(address).where(address.c.prefix_id == prefix_id, address.c.vm_id.is_(None)))
    left = select(func.count()).select_from(address).where(address.c.prefix_id == prefix_id)
    if conn.execute(left).scalar_one():
        raise in_use("prefix", str(prefix_id))
    conn.execute(delete(prefix).where(prefix.c.id == prefix_id))


def _select() -> Select[Any]:
    return (
        select(prefix, vrf.c.name.label("vrf"), cluster.c.name.label("cluster"), rack.c.name.label("rack"))
        .join(vrf, vrf.c.id == prefix.c.vrf_id)
        .join(cluster, cluster.c.id == prefix.c.cluster_id)
        .outerjoin(rack, rack.c.id == prefix.c.rack_id)
    )


def _views(conn: Connection, rows: Sequence[Row[Any]]) -> list[PrefixView]:
    used = select(address.c.prefix_id, func.count()).where(
        address.c.vm_id.is_not(None), address.c.prefix_id.in_([row.id for row in rows])
    )
    counts: dict[int, int] = dict(conn.execute(used.group_by(address.c.prefix_id)).all())
    return [_view(row, range_of(row), counts.get(row.id, 0)) for row in rows]


def _view(row: Row[Any], usable: AddressRange, used: int) -> PrefixView:
    return PrefixView(
        prefix_id=row.id,
        vrf=row.vrf,
        cidr=usable.network,
        gateway=usable.gateway,
        vlan=row.vlan,
        bridge=row.bridge,
        cluster=row.cluster,
        rack=row.rack,
        first=usable.first,
        last=usable.last,
        nameservers=tuple(server for text in row.nameservers if (server := to_address(text)) is not None),
        addresses_total=min(usable.size, MAX_COUNT),
        addresses_free=min(usable.size - used, MAX_COUNT),
    )
