# SPDX-License-Identifier: Apache-2.0
"""Addresses that a request asks for by number: granted as they are, or refused with who has them and until when."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Connection, Row, bindparam, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from ppec_contract.api_ipdb import HoldKind, NetworkWanted
from ppec_contract.errors import PpecError
from ppec_orchestrator.ipdb.ranges import Address, to_hex
from ppec_orchestrator.store import address_events
from ppec_orchestrator.store.clock import Clock
from ppec_orchestrator.store.external_addresses import is_free
from ppec_orchestrator.store.faults import is_unique_violation
from ppec_orchestrator.store.serving import GrantedAddress, ServingPrefix, range_of, serving_prefix
from ppec_orchestrator.store.tables import address, address_hold, prefix, vm

_BY_NUMBER = frozenset({"address.in_use", "address.not_usable", "address.quarantined", "address.reserved"})


@dataclass(frozen=True, slots=True)
class Claim:
    """Somebody wants just this address of this prefix. None for `vm_id` and `name`: a VM that is not made yet."""

    one: ServingPrefix
    wanted: Address
    vm_id: UUID | None
    name: str | None
    now: datetime

    @property
    def address_hex(self) -> str:
        return to_hex(int(self.wanted))


@dataclass(frozen=True, slots=True)
class Fixed:
    """A VM wants an address by number, for the network of that place in its request; `serving` serve its host."""

    vm_id: UUID
    wanted: NetworkWanted
    position: int
    serving: Sequence[ServingPrefix]


def take_free(conn: Connection, several: Sequence[Fixed], *, now: Clock) -> set[tuple[UUID, int]]:
    """Takes those of them that have a row which is anybody's, in a few statements for all; which, by VM and position.
    The others `take_fixed` takes, or refuses."""
    claims: list[tuple[ServingPrefix, Fixed]] = []
    for one in several:
        with suppress(PpecError):
            claims.append((containing(one.serving, one.wanted), one))
    # As for `take_fixed`.
    rows = conn.execute(_LOCKED, {"ids": sorted({giver.prefix_id for giver, _ in claims})})
    ranges = {row.id: range_of(row) for row in rows}
    taking = [
        {"which": giver.prefix_id, "number": to_hex(int(wanted)), "owner": one.vm_id, "place": one.position}
        for giver, one in claims
        if (wanted := one.wanted.address) is not None and wanted in ranges.get(giver.prefix_id, ())
    ]
    if taking:
        at = now()
        conn.execute(_TAKE_FREE, [{**each, "now": at} for each in taking])
    owners = [one.vm_id for one in several]
    took = select(address.c.vm_id, address.c.position).where(address.c.vm_id.in_(owners))
    return {(row.vm_id, row.position) for row in conn.execute(took)}


_LOCKED = (
    select(prefix)
    .where(prefix.c.id.in_(bindparam("ids", expanding=True)))
    .order_by(prefix.c.id)
    .with_for_update(key_share=True)
)
_TAKE_FREE = (
    update(address)
    .where(
        address.c.prefix_id == bindparam("which"),
        address.c.address_hex == bindparam("number"),
        is_free(bindparam("now", type_=address.c.free_from.type)),
    )
    .values(vm_id=bindparam("owner"), position=bindparam("place"), free_from=None, last_vm_id=None)
)


def take_fixed(
    conn: Connection,
    serving: Sequence[ServingPrefix],
    vm_id: UUID,
    wanted: NetworkWanted,
    position: int,
    *,
    now: Clock,
) -> GrantedAddress:
    """Raises `address.not_usable` when it is outside of what serves the host, `address.in_use`, `address.reserved` or
    `address.quarantined`."""
    assert wanted.address is not None
    name = conn.execute(select(vm.c.name).where(vm.c.id == vm_id)).scalar()
    one = containing(serving, wanted)
    # IPv6 has a lock instead of rows; taking it for both keeps who holds addresses back out.
    locked = select(prefix).where(prefix.c.id == one.prefix_id).with_for_update(key_share=True)
    one = _still_giving(conn.execute(locked).one_or_none(), one, wanted.address)
    claim = Claim(one, wanted.address, vm_id, name, now())
    taken = _take_row(conn, claim, position)
    if not taken and not one.has_rows:
        taken = _insert_row(conn, claim, position)
    if not taken:
        raise why_not(conn, claim) or _in_use(claim, "another request")
    return one.granted(claim.address_hex, position)


def refuses_an_address(refused: PpecError) -> bool:
    """Whether a VM can't have an address that it asks for by number."""
    return refused.code in _BY_NUMBER


def of_one_vm(refused: PpecError, name: str) -> PpecError:
    """Of several VMs that are asked for together: whose address it is that was refused."""
    return PpecError(
        refused.code,
        f"vm {name}: {refused.message}",
        hint=refused.hint,
        subject=refused.subject,
        details=refused.details | {"wanted_for": name},
    )


def _still_giving(row: Row[Any] | None, known: ServingPrefix, wanted: Address) -> ServingPrefix:
    """The prefix as its row, which is locked, has it now: it may have been changed or deleted since it was read."""
    if row is None:
        raise _not_usable(wanted, f"prefix {known.range.network} was deleted")
    one = serving_prefix(row)
    if wanted not in one.range:
        raise never_given(one, wanted)
    return one


def containing(serving: Sequence[ServingPrefix], wanted: NetworkWanted) -> ServingPrefix:
    """The prefix that the address is one of; raises `address.not_usable`."""
    assert wanted.address is not None
    alike = [one for one in serving if wanted.prefix in (None, one.range.network)]
    for one in alike:
        if wanted.address in one.range:
            return one
    around = next((one for one in alike if wanted.address in one.range.network), None)
    if around is not None:
        raise never_given(around, wanted.address)
    known = ", ".join(str(one.range.network) for one in alike[:5]) or "none"
    raise _not_usable(wanted.address, f"it is in none of the prefixes that could serve the VM ({known})")


def never_given(around: ServingPrefix, wanted: Address) -> PpecError:
    """Of an address that is in the prefix and none of those that it gives out."""
    usable = around.range
    role = usable.role_of(wanted)
    if role is not None:
        return _not_usable(wanted, f"it is the {role} of prefix {usable.network}")
    return _not_usable(wanted, f"prefix {usable.network} gives out {usable.first} to {usable.last}")


def _not_usable(wanted: Address, why: str) -> PpecError:
    return PpecError(
        "address.not_usable",
        f"address {wanted} can't be given to a VM: {why}",
        hint="Ask for one that `ppec ipdb prefix free` shows.",
        subject=f"address {wanted}",
    )


def _open_to(claim: Claim) -> ColumnElement[bool]:
    """Of the `address` row: nobody has it, and this VM may."""
    return (
        address.c.vm_id.is_(None)
        & or_(address.c.free_from.is_(None), address.c.free_from <= claim.now, _was_its_own(claim))
        & or_(address.c.hold_id.is_(None), _reserved_for_it(claim))
        & address.c.going_back.is_(False)
    )


def _reserved_for_it(claim: Claim) -> ColumnElement[bool]:
    """Of the `address` row: it is held back for a VM of this name."""
    holds = select(address_hold.c.id).where(
        address_hold.c.prefix_id == claim.one.prefix_id,
        address_hold.c.kind == HoldKind.RESERVED.value,
        address_hold.c.reserved_for.is_not(None),
        address_hold.c.reserved_for == claim.name,
    )
    return address.c.hold_id.in_(holds)


def _was_its_own(claim: Claim) -> ColumnElement[bool]:
    """Of an `address` row that rests: this VM had it last, or one of its name for which it is reserved, as when that is
    built anew. Packets that still come for the last one are then meant for nobody else."""
    built_anew = _reserved_for_it(claim) & (address_events.last_name() == claim.name)
    return or_(address.c.last_vm_id == claim.vm_id, built_anew)


def _take_row(conn: Connection, claim: Claim, position: int) -> bool:
    taken = conn.execute(
        update(address)
        .where(
            address.c.prefix_id == claim.one.prefix_id,
            address.c.address_hex == claim.address_hex,
            _open_to(claim),
        )
        .values(vm_id=claim.vm_id, position=position, free_from=None, last_vm_id=None)
    )
    return taken.rowcount == 1


def _insert_row(conn: Connection, claim: Claim, position: int) -> bool:
    hold = _hold(conn, claim)
    if hold is not None and (claim.name is None or hold.reserved_for != claim.name):
        return False
    row = {
        "prefix_id": claim.one.prefix_id,
        "address_hex": claim.address_hex,
        "vm_id": claim.vm_id,
        "position": position,
        "hold_id": hold.id if hold is not None else None,
    }
    try:
        with conn.begin_nested():
            conn.execute(insert(address).values(row))
    except IntegrityError as error:
        if not is_unique_violation(error):
            raise
        return False
    return True


def _hold(conn: Connection, claim: Claim) -> Row[Any] | None:
    return conn.execute(
        select(address_hold).where(
            address_hold.c.prefix_id == claim.one.prefix_id,
            address_hold.c.first_hex <= claim.address_hex,
            address_hold.c.last_hex >= claim.address_hex,
        )
    ).one_or_none()


def why_not(conn: Connection, claim: Claim) -> PpecError | None:
    """Why the VM can't have the address; None when it can, as far as this transaction sees."""
    row = conn.execute(
        select(address, vm.c.name.label("vm"), _was_its_own(claim).label("was_its_own"))
        .outerjoin(vm, vm.c.id == address.c.vm_id)
        .where(address.c.prefix_id == claim.one.prefix_id, address.c.address_hex == claim.address_hex)
    ).one_or_none()
    if row is not None and row.vm_id is not None:
        latest = row.vm or address_events.latest_vm(conn, claim.one.prefix_id, claim.address_hex)
        return _in_use(claim, f"VM {latest}" if row.vm else f"what may be left of VM {latest} on a host")
    hold = _hold(conn, claim)
    if hold is not None and (claim.name is None or hold.reserved_for != claim.name):
        return _held(claim, hold)
    if row is not None and row.free_from is not None and row.free_from > claim.now and not row.was_its_own:
        latest = address_events.latest_vm(conn, claim.one.prefix_id, claim.address_hex)
        return PpecError(
            "address.quarantined",
            f"address {claim.wanted} was VM {latest}'s and is in quarantine until {row.free_from:%Y-%m-%d %H:%M:%SZ}",
            hint="Ask again then, or for another address.",
            subject=f"address {claim.wanted}",
            details={"until": row.free_from.isoformat(), "vm": latest, "prefix": str(claim.one.range.network)},
        )
    return None


def _in_use(claim: Claim, whose: str) -> PpecError:
    return PpecError(
        "address.in_use",
        f"address {claim.wanted} of prefix {claim.one.range.network} is in use by {whose}",
        hint="Ask for another address.",
        subject=f"address {claim.wanted}",
        details={"by": whose, "prefix": str(claim.one.range.network)},
    )


def _held(claim: Claim, hold: Row[Any]) -> PpecError:
    whose = f" for VM {hold.reserved_for}" if hold.reserved_for else ""
    note = f" ({hold.note})" if hold.note else ""
    return PpecError(
        "address.reserved",
        f"address {claim.wanted} of prefix {claim.one.range.network} is {hold.kind}{whose}{note}, by {hold.created_by}",
        hint="Ask for another address, or have the hold deleted.",
        subject=f"address {claim.wanted}",
        details={"kind": hold.kind, "hold_id": hold.id, "reserved_for": hold.reserved_for, "by": hold.created_by},
    )
