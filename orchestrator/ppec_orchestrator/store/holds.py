# SPDX-License-Identifier: Apache-2.0
"""Holds: addresses of a prefix that are not given out by themselves, because they are reserved or excluded."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, bindparam, delete, func, insert, select, update

from ppec_contract.api import Page
from ppec_contract.api_ipdb import AddressAction, HoldCreate, HoldKind, HoldView
from ppec_contract.errors import PpecError
from ppec_orchestrator.ipdb.ranges import AddressRange, from_hex, to_hex
from ppec_orchestrator.store import address_events
from ppec_orchestrator.store.catalogue import not_found
from ppec_orchestrator.store.clock import Clock
from ppec_orchestrator.store.paging import Slice, page_of
from ppec_orchestrator.store.serving import range_of
from ppec_orchestrator.store.tables import address, address_hold, prefix, vm

# Made once: of an import of many holds, putting them together would take longer than carrying them out.
_LOCKED = select(prefix).where(prefix.c.id == bindparam("which")).with_for_update()
_OVERLAPPING = (
    select(address_hold, prefix.c.family)
    .join(prefix, prefix.c.id == address_hold.c.prefix_id)
    .where(
        address_hold.c.prefix_id == bindparam("which"),
        address_hold.c.first_hex <= bindparam("high"),
        address_hold.c.last_hex >= bindparam("low"),
    )
    .limit(1)
)
_INSERTED = insert(address_hold).returning(address_hold)
_HELD_BACK = (
    update(address)
    .where(
        address.c.prefix_id == bindparam("which"), address.c.address_hex.between(bindparam("low"), bindparam("high"))
    )
    .values(hold_id=bindparam("hold"))
)


def create_hold(conn: Connection, prefix_id: int, wanted: HoldCreate, caller: str, now: Clock) -> HoldView:
    """`now` is asked when nobody has to be waited for any more, as in grants (`ipdb.grant`).

    Raises `prefix.not_found`, `prefix.invalid`, `hold.overlaps`, and `address.in_use` for what can't be excluded
    because VMs have it. What is reserved while a VM has it stays the VM's until that is deleted."""
    # IPv6 grants have the lock too; IPv4 grants under way have their rows', for which the update below waits.
    found = conn.execute(_LOCKED, {"which": prefix_id}).one_or_none()
    if found is None:
        raise not_found("prefix", "prefix", str(prefix_id))
    if found.netbox_id is not None:
        raise _invalid(range_of(found), "NetBox keeps its addresses: reserve them there")
    first_hex, last_hex = held_edges(range_of(found), wanted)
    _check_overlap(conn, prefix_id, wanted, first_hex, last_hex)
    row = {
        "prefix_id": prefix_id,
        "kind": wanted.kind.value,
        "first_hex": first_hex,
        "last_hex": last_hex,
        "reserved_for": wanted.reserved_for,
        "note": wanted.note,
        "created_at": now(),
        "created_by": caller[:128],
    }
    hold = conn.execute(_INSERTED, row).one()
    conn.execute(_HELD_BACK, {"which": prefix_id, "low": first_hex, "high": last_hex, "hold": hold.id})
    if wanted.kind is HoldKind.EXCLUDED:
        _check_unused(conn, hold, wanted)
    action = AddressAction.EXCLUDED if wanted.kind is HoldKind.EXCLUDED else AddressAction.RESERVED
    address_events.of_hold(conn, action, hold, now(), caller)
    return _view(hold, found.family)


def held_edges(usable: AddressRange, wanted: HoldCreate) -> tuple[str, str]:
    """The first and last address that it holds back, in the database's form: of what it names, what the prefix gives
    out. Raises `prefix.invalid` if that is none."""
    last = wanted.last or wanted.first
    for one in (wanted.first, last):
        if one not in usable.network:
            raise _invalid(usable, f"{one} is {_given_out(usable)}")
    if int(wanted.first) > int(last):
        raise _invalid(usable, f"{wanted.first} comes after {last}")
    held = usable.clamped((int(wanted.first), int(last)))
    if held is not None:
        return to_hex(held[0]), to_hex(held[1])
    if wanted.first == last:
        role = usable.role_of(last)
        raise _invalid(usable, f"{last} is {f'its {role}' if role else _given_out(usable)}")
    raise _invalid(usable, f"none of {wanted.first} to {last} is one of those that it gives out")


def _given_out(usable: AddressRange) -> str:
    return f"not one of the addresses {usable.first} to {usable.last} that it gives out"


def _invalid(usable: AddressRange, why: str) -> PpecError:
    return PpecError(
        "prefix.invalid",
        f"prefix {usable.network}: {why}",
        hint="The gateway and what lies outside first and last is never given out, and needs no hold.",
        subject=f"prefix {usable.network}",
    )


def _check_overlap(conn: Connection, prefix_id: int, wanted: HoldCreate, first_hex: str, last_hex: str) -> None:
    other = conn.execute(_OVERLAPPING, {"which": prefix_id, "low": first_hex, "high": last_hex}).one_or_none()
    if other is None:
        return
    first, last = from_hex(other.first_hex, other.family), from_hex(other.last_hex, other.family)
    raise PpecError(
        "hold.overlaps",
        f"{wanted.first} to {wanted.last or wanted.first} overlaps hold {other.id}, by which {first} to {last} "
        f"are {other.kind}",
        hint="Delete that hold first, or choose other addresses.",
        subject=f"hold {other.id}",
    )


def _check_unused(conn: Connection, hold: Row[Any], wanted: HoldCreate) -> None:
    used = address.c.hold_id == hold.id, address.c.vm_id.is_not(None)
    count = conn.execute(select(func.count()).where(*used)).scalar_one()
    if not count:
        return
    holders = select(vm.c.name).join(address, address.c.vm_id == vm.c.id).where(*used).order_by(vm.c.name).limit(5)
    names = conn.execute(holders).scalars().all()
    raise PpecError(
        "address.in_use",
        f"{count} of the addresses from {wanted.first} on are in use"
        + (f", by VM {', '.join(names)}" if names else " by what may be left of VMs")
        + (" and others" if count > len(names) and names else ""),
        hint="Delete these VMs first, or reserve the addresses: they then stay with their VMs.",
        subject=f"address {wanted.first}",
        details={"count": count, "vms": list(names)},
    )


def delete_hold(conn: Connection, prefix_id: int, hold_id: int, caller: str, now: Clock) -> None:
    """Opens the addresses again. Raises `hold.not_found`."""
    conn.execute(select(prefix.c.id).where(prefix.c.id == prefix_id).with_for_update()).all()
    hold = conn.execute(
        select(address_hold).where(address_hold.c.id == hold_id, address_hold.c.prefix_id == prefix_id)
    ).one_or_none()
    if hold is None:
        raise not_found("hold", "hold", str(hold_id))
    address_events.of_hold(conn, AddressAction.OPENED, hold, now(), caller)
    conn.execute(delete(address_hold).where(address_hold.c.id == hold_id))


def end_holds(conn: Connection, prefix_id: int, caller: str, now: datetime) -> None:
    """All of a prefix, which is locked."""
    mine = address_hold.c.prefix_id == prefix_id
    for hold in conn.execute(select(address_hold).where(mine).order_by(address_hold.c.first_hex)).all():
        address_events.of_hold(conn, AddressAction.OPENED, hold, now, caller)
    conn.execute(delete(address_hold).where(mine))


def page_of_holds(conn: Connection, prefix_id: int, wanted: Slice) -> Page[HoldView]:
    family = conn.execute(select(prefix.c.family).where(prefix.c.id == prefix_id)).scalar()
    if family is None:
        raise not_found("prefix", "prefix", str(prefix_id))
    statement = (
        select(address_hold)
        .where(address_hold.c.prefix_id == prefix_id)
        .order_by(address_hold.c.id)
        .limit(wanted.limit + 1)
    )
    if wanted.after is not None:
        statement = statement.where(address_hold.c.id > wanted.after)
    rows = conn.execute(statement).all()
    return page_of(rows, wanted, lambda row: _view(row, family), lambda row: int(row.id))


def _view(row: Row[Any], family: int) -> HoldView:
    return HoldView(
        hold_id=row.id,
        prefix_id=row.prefix_id,
        kind=HoldKind(row.kind),
        first=from_hex(row.first_hex, family),
        last=from_hex(row.last_hex, family),
        reserved_for=row.reserved_for,
        note=row.note,
        created_at=row.created_at,
        created_by=row.created_by,
    )
