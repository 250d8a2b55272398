# SPDX-License-Identifier: Apache-2.0
"""Where the VMs of a request may go, as far as it is said by place: what is named is there, and no VM is to be in two
places."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, Select, select

from ppec_contract.api_placement import VmItem
from ppec_contract.api_vms import VmsCreate
from ppec_contract.errors import PpecError
from ppec_orchestrator.store.catalogue import not_found
from ppec_orchestrator.store.places import Place
from ppec_orchestrator.store.tables import cluster, datacentre, host, rack, vrf

# What lies in what, from the narrowest on, and what each is called.
_WITHIN = {"rack": "rack", "cluster": "cluster", "datacentre": "data centre", "region": "region", "vrf": "VRF"}
_RACKS = (
    select(
        rack.c.name.label("rack"),
        cluster.c.name.label("cluster"),
        datacentre.c.name.label("datacentre"),
        datacentre.c.region,
    )
    .join(cluster, cluster.c.id == rack.c.cluster_id)
    .join(datacentre, datacentre.c.id == cluster.c.datacentre_id)
)
_HOSTS = (
    _RACKS.add_columns(host.c.name.label("host"), vrf.c.name.label("vrf"))
    .join(host, host.c.rack_id == rack.c.id)
    .join(vrf, vrf.c.id == host.c.vrf_id)
)


def place_of(asked: VmsCreate, architecture: str, item: VmItem | None = None) -> Place:
    """What an item leaves out is the request's."""
    own = item or asked
    return Place(
        architecture,
        asked.region,
        asked.datacentre,
        asked.cluster,
        own.rack or asked.rack,
        vrf=asked.vrf,
        host=own.host or asked.host,
    )


def check_places(conn: Connection, asked: VmsCreate) -> None:
    """Raises `….not_found`, and `request.invalid` for an item that would have to be in two places."""
    for table, word, name in (
        (datacentre, "data centre", asked.datacentre),
        (cluster, "cluster", asked.cluster),
        (rack, "rack", asked.rack),
        (host, "host", asked.host),
        (vrf, "VRF", asked.vrf),
    ):
        if name is not None and conn.execute(select(table.c.id).where(table.c.name == name)).first() is None:
            raise not_found(table.name, word, name)
    in_region = select(datacentre.c.id).where(datacentre.c.region == asked.region)
    if asked.region is not None and conn.execute(in_region).first() is None:
        raise not_found("datacentre", "data centre in region", asked.region)
    _check_items(conn, asked)


def _check_items(conn: Connection, asked: VmsCreate) -> None:
    own = [item for item in asked.items if item.rack or item.host]
    if not own:
        return
    racks = _found(conn, _RACKS, "rack", {item.rack or asked.rack for item in own})
    hosts = _found(conn, _HOSTS, "host", {item.host or asked.host for item in own})
    for item in own:
        place = place_of(asked, "", item)
        for word, known, name in (("rack", racks, place.rack), ("host", hosts, place.host)):
            if name is not None and name not in known:
                raise not_found(word, word, name)
        where = hosts[place.host] if place.host else racks[place.rack or ""]
        _refuse_two_places(item, place, where)


def _found(conn: Connection, query: Select[Any], kind: str, names: set[str | None]) -> Mapping[str, Mapping[str, str]]:
    column = {"rack": rack, "host": host}[kind].c.name
    rows = conn.execute(query.where(column.in_([name for name in names if name is not None])))
    return {row._mapping[kind]: dict(row._mapping) for row in rows}


def _refuse_two_places(item: VmItem, place: Place, where: Mapping[str, str]) -> None:
    """`where` its host is, or if it may choose, its rack."""
    narrowest = "host" if place.host else "rack"
    for kind, word in _WITHIN.items():
        wanted = getattr(place, kind)
        if wanted is not None and where.get(kind, wanted) != wanted:
            raise PpecError(
                "request.invalid",
                f"item {item.name} is wanted on {narrowest} {where[narrowest]}, which is in {word} {where[kind]}, and "
                f"in {word} {wanted}",
                hint=f"Name a {narrowest} of {word} {wanted}, or leave out one of the two.",
                subject=f"item {item.name}",
                details={"item": item.name, "wanted": {kind: wanted}, "found": {kind: where[kind]}},
            )
