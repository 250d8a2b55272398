# SPDX-License-Identifier: Apache-2.0
"""Addresses as people look them up: which VM has which. They are granted and released by `store/ipdb.py`."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_network

from sqlalchemy import Connection, select

from ppec_contract.api import AddressView, Page
from ppec_orchestrator.ipdb.ranges import from_hex
from ppec_orchestrator.store.paging import Slice, page_of
from ppec_orchestrator.store.tables import address, prefix, vm, vrf


@dataclass(frozen=True, slots=True)
class AddressFilter:
    """Which addresses to list; None means any. Free IPv6 addresses have no rows and are never listed."""

    vrf: str | None = None
    prefix_id: int | None = None
    vm: str | None = None
    free: bool | None = None


def page_of_addresses(conn: Connection, wanted: Slice, chosen: AddressFilter) -> Page[AddressView]:
    statement = (
        select(
            address.c.id,
            address.c.address_hex,
            address.c.vm_id,
            prefix.c.cidr,
            prefix.c.family,
            vrf.c.name.label("vrf"),
            vm.c.name.label("vm"),
        )
        .join(prefix, prefix.c.id == address.c.prefix_id)
        .join(vrf, vrf.c.id == prefix.c.vrf_id)
        .outerjoin(vm, vm.c.id == address.c.vm_id)
        .order_by(address.c.id)
        .limit(wanted.limit + 1)
    )
    if wanted.after is not None:
        statement = statement.where(address.c.id > wanted.after)
    for column, value in ((vrf.c.name, chosen.vrf), (prefix.c.id, chosen.prefix_id), (vm.c.name, chosen.vm)):
        if value is not None:
            statement = statement.where(column == value)
    if chosen.free is not None:
        statement = statement.where(address.c.vm_id.is_(None) if chosen.free else address.c.vm_id.is_not(None))
    rows = conn.execute(statement).all()
    return page_of(
        rows,
        wanted,
        lambda row: AddressView(
            address=from_hex(row.address_hex, row.family),
            prefix=ip_network(row.cidr),
            vrf=row.vrf,
            vm=row.vm,
            vm_id=row.vm_id,
        ),
        lambda row: int(row.id),
    )
