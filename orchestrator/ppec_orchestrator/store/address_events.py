# SPDX-License-Identifier: Apache-2.0
"""The history of addresses: a row for whatever befell one, written in the transaction that did it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from ipaddress import ip_network
from typing import Any
from uuid import UUID

from sqlalchemy import Column, ColumnElement, Connection, Row, ScalarSelect, bindparam, func, insert, literal, select

from ppec_contract.api import Page
from ppec_contract.api_ipdb import AddressAction, AddressEventView
from ppec_orchestrator.ipdb.ranges import Address, from_hex, to_hex
from ppec_orchestrator.store.paging import Slice, page_of
from ppec_orchestrator.store.tables import address, address_event, operation, prefix, vm, vrf

_COLUMNS = ("at", "action", "vrf", "prefix_id", "cidr", "address_hex", "vm_id", "vm", "operation_id")


def of_vms(conn: Connection, action: AddressAction, which: ColumnElement[bool], now: datetime) -> None:
    """What befell the `address` rows of which `which` is true, in the name of whoever has them right now.

    A leftover, which is no VM, is called what it was called when its address was kept.
    """
    before = _called(address.c.vm_id)
    rows = (
        select(
            literal(now, address_event.c.at.type),
            literal(action.value),
            vrf.c.name,
            address.c.prefix_id,
            prefix.c.cidr,
            address.c.address_hex,
            address.c.vm_id,
            func.coalesce(vm.c.name, before),
            vm.c.operation_id,
        )
        .join(prefix, prefix.c.id == address.c.prefix_id)
        .join(vrf, vrf.c.id == prefix.c.vrf_id)
        .outerjoin(vm, vm.c.id == address.c.vm_id)
        .where(which)
        .order_by(address.c.id)
    )
    conn.execute(insert(address_event).from_select(_COLUMNS, rows))


def kept(conn: Connection, vm_id: UUID, holder: UUID, now: datetime) -> None:
    """The VM's addresses stay taken in the name of what may be left of it."""
    rows = (
        select(
            literal(now, address_event.c.at.type),
            literal(AddressAction.KEPT.value),
            vrf.c.name,
            address.c.prefix_id,
            prefix.c.cidr,
            address.c.address_hex,
            literal(holder, address_event.c.vm_id.type),
            vm.c.name,
            vm.c.operation_id,
        )
        .join(prefix, prefix.c.id == address.c.prefix_id)
        .join(vrf, vrf.c.id == prefix.c.vrf_id)
        .outerjoin(vm, vm.c.id == address.c.vm_id)
        .where(address.c.vm_id == vm_id)
    )
    conn.execute(insert(address_event).from_select(_COLUMNS, rows))


_OF_HOLD = insert(address_event).from_select(
    ("at", "action", "vrf", "prefix_id", "cidr", "address_hex", "last_hex", "caller", "note"),
    select(
        bindparam("at", type_=address_event.c.at.type),
        bindparam("action", type_=address_event.c.action.type),
        vrf.c.name,
        prefix.c.id,
        prefix.c.cidr,
        bindparam("first", type_=address_event.c.address_hex.type),
        bindparam("last", type_=address_event.c.last_hex.type),
        bindparam("caller", type_=address_event.c.caller.type),
        bindparam("note", type_=address_event.c.note.type),
    )
    .join(vrf, vrf.c.id == prefix.c.vrf_id)
    .where(prefix.c.id == bindparam("which")),
)


def of_hold(conn: Connection, action: AddressAction, hold: Row[Any], now: datetime, caller: str) -> None:
    """`hold` is a row of `address_hold`."""
    told = f"for {hold.reserved_for}: {hold.note}" if hold.reserved_for else hold.note
    row = {
        "at": now,
        "action": action.value,
        "first": hold.first_hex,
        "last": hold.last_hex if hold.last_hex != hold.first_hex else None,
        "caller": caller[:128],
        "note": told[:256],
        "which": hold.prefix_id,
    }
    conn.execute(_OF_HOLD, row)


def _called(vm_id: Column[UUID]) -> ScalarSelect[str | None]:
    """By what name the history knows this VM."""
    known = select(address_event.c.vm).where(address_event.c.vm_id == vm_id)
    return known.order_by(address_event.c.id.desc()).limit(1).scalar_subquery()


def last_name() -> ScalarSelect[str | None]:
    """Of an `address` row that was released: what the VM is called that had it."""
    return _called(address.c.last_vm_id)


def latest_vm(conn: Connection, prefix_id: int, address_hex: str) -> str | None:
    """What the VM is called that had or has this address."""
    return conn.execute(
        select(address_event.c.vm)
        .where(
            address_event.c.address_hex == address_hex,
            address_event.c.prefix_id == prefix_id,
            address_event.c.vm_id.is_not(None),
        )
        .order_by(address_event.c.id.desc())
        .limit(1)
    ).scalar()


@dataclass(frozen=True, slots=True)
class EventFilter:
    """Which lines to list; None means any. An `address` that was held back with others is found by any of them."""

    address: Address | None = None
    vrf: str | None = None
    prefix_id: int | None = None
    vm: str | None = None
    action: AddressAction | None = None


def page_of_events(conn: Connection, wanted: Slice, chosen: EventFilter) -> Page[AddressEventView]:
    """The latest first. Who asked for an operation is known as long as the operation is."""
    statement = (
        select(address_event, func.coalesce(address_event.c.caller, operation.c.created_by).label("who"))
        .outerjoin(operation, operation.c.id == address_event.c.operation_id)
        .order_by(address_event.c.id.desc())
        .limit(wanted.limit + 1)
    )
    if wanted.after is not None:
        statement = statement.where(address_event.c.id < wanted.after)
    if chosen.address is not None:
        text = to_hex(int(chosen.address))
        inside = (address_event.c.address_hex < text) & (address_event.c.last_hex >= text)
        of_ipv6 = address_event.c.cidr.contains(":")
        of_family = of_ipv6 if chosen.address.version == 6 else ~of_ipv6
        statement = statement.where((address_event.c.address_hex == text) | inside, of_family)
    for column, value in (
        (address_event.c.vrf, chosen.vrf),
        (address_event.c.prefix_id, chosen.prefix_id),
        (address_event.c.vm, chosen.vm),
        (address_event.c.action, chosen.action.value if chosen.action else None),
    ):
        if value is not None:
            statement = statement.where(column == value)
    return page_of(conn.execute(statement).all(), wanted, _view, lambda row: int(row.id))


def _view(row: Row[Any]) -> AddressEventView:
    network = ip_network(row.cidr)
    return AddressEventView(
        event_id=row.id,
        at=row.at,
        action=AddressAction(row.action),
        vrf=row.vrf,
        prefix=network,
        address=from_hex(row.address_hex, network.version),
        last=from_hex(row.last_hex, network.version) if row.last_hex else None,
        vm=row.vm,
        vm_id=row.vm_id,
        operation_id=row.operation_id,
        caller=row.who,
        note=row.note,
    )
