# SPDX-License-Identifier: Apache-2.0
"""Addresses as people look them up: which VM has which. They are granted and released by `store/ipdb.py`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from ipaddress import ip_network
from typing import Any

from sqlalchemy import Connection, Row, or_, select

from ppec_contract.api import Page
from ppec_contract.api_ipdb import AddressState, AddressView
from ppec_orchestrator.ipdb.ranges import from_hex
from ppec_orchestrator.store.external_addresses import is_free
from ppec_orchestrator.store.paging import Slice, page_of
from ppec_orchestrator.store.prefixes import vrf_named
from ppec_orchestrator.store.tables import address, address_hold, prefix, vm, vrf


@dataclass(frozen=True, slots=True)
class AddressFilter:
    """Which addresses to list; None means any. Free IPv6 addresses have no rows and are never listed.

    `free` is what may be granted to anybody; not free is all the rest.
    """

    vrf: str | None = None
    prefix_id: int | None = None
    vm: str | None = None
    free: bool | None = None


def page_of_addresses(conn: Connection, wanted: Slice, chosen: AddressFilter, now: datetime) -> Page[AddressView]:
    """Raises `vrf.not_found`."""
    if chosen.vrf is not None:
        vrf_named(conn, chosen.vrf)
    statement = (
        select(
            address,
            prefix.c.cidr,
            prefix.c.family,
            vrf.c.name.label("vrf"),
            vm.c.name.label("vm"),
            address_hold.c.kind,
            address_hold.c.reserved_for,
        )
        .join(prefix, prefix.c.id == address.c.prefix_id)
        .join(vrf, vrf.c.id == prefix.c.vrf_id)
        .outerjoin(vm, vm.c.id == address.c.vm_id)
        .outerjoin(address_hold, address_hold.c.id == address.c.hold_id)
        # What is on its way back to NetBox is not ours any more, and not counted either.
        .where(address.c.going_back.is_(False))
        .order_by(address.c.id)
        .limit(wanted.limit + 1)
    )
    if wanted.after is not None:
        statement = statement.where(address.c.id > wanted.after)
    for column, value in ((vrf.c.name, chosen.vrf), (prefix.c.id, chosen.prefix_id), (vm.c.name, chosen.vm)):
        if value is not None:
            statement = statement.where(column == value)
    if chosen.free is True:
        statement = statement.where(is_free(now))
    elif chosen.free is False:
        resting = address.c.free_from > now
        statement = statement.where(or_(address.c.vm_id.is_not(None), address.c.hold_id.is_not(None), resting))
    rows = conn.execute(statement).all()
    return page_of(rows, wanted, lambda row: _view(row, now), lambda row: int(row.id))


def _view(row: Row[Any], now: datetime) -> AddressView:
    at_rest = row.vm_id is None and row.free_from is not None and row.free_from > now
    return AddressView(
        address=from_hex(row.address_hex, row.family),
        prefix=ip_network(row.cidr),
        vrf=row.vrf,
        vm=row.vm,
        vm_id=row.vm_id,
        state=_state(row, at_rest=at_rest),
        until=row.free_from if at_rest else None,
        reserved_for=row.reserved_for,
    )


def _state(row: Row[Any], *, at_rest: bool) -> AddressState:
    if row.vm_id is not None:
        return AddressState.USED if row.vm is not None else AddressState.KEPT
    if row.kind is not None:
        return AddressState(row.kind)
    return AddressState.QUARANTINED if at_rest else AddressState.FREE
