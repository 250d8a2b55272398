# SPDX-License-Identifier: Apache-2.0
"""Why a prefix can't be deleted or made smaller yet: who has addresses of it, which rest, and which are held back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, func, or_, select

from ppec_contract.errors import PpecError
from ppec_orchestrator.ipdb.ranges import Run, from_hex, to_hex
from ppec_orchestrator.store.tables import address, address_hold, prefix, vm

# Of the VMs that have some, and of the holds, so many are told.
_NAMED = 3


@dataclass(frozen=True, slots=True)
class Use:
    """What some addresses of a prefix are used for. `vms` and `holds` are the first few, in words; `until` is when the
    last one has rested."""

    of_vms: int
    vms: Sequence[str]
    resting: int
    until: datetime | None
    held: int
    holds: Sequence[str]

    def __bool__(self) -> bool:
        return bool(self.of_vms or self.resting or self.held)

    def told(self, which: str = "its addresses") -> list[str]:
        found = []
        if self.of_vms:
            found.append(f"VMs have {self.of_vms} of {which}{_named(self.vms)}")
        if self.resting and self.until is not None:
            rest = "1 address rests" if self.resting == 1 else f"{self.resting} addresses rest"
            found.append(f"{rest} until {self.until:%Y-%m-%d %H:%M:%SZ}")
        if self.held:
            keep = "1 hold keeps" if self.held == 1 else f"{self.held} holds keep"
            found.append(f"{keep} back some of {which}{_named(self.holds)}")
        return found

    def details(self) -> dict[str, Any]:
        until = self.until.isoformat() if self.until is not None else None
        return {"used": self.of_vms, "resting": self.resting, "until": until, "holds": self.held}


def _named(names: Sequence[str]) -> str:
    return f" ({', '.join([*names[:_NAMED], *(['…'] if len(names) > _NAMED else [])])})" if names else ""


def use_of(conn: Connection, prefix_id: int, now: datetime, within: Sequence[Run] | None = None) -> Use:
    """Of the whole prefix, or of what lies `within` these runs."""
    mine, held = address.c.prefix_id == prefix_id, address_hold.c.prefix_id == prefix_id
    if within is not None:
        mine, held = and_(mine, lies_within(within)), and_(held, _overlaps(within))
    of_vms = conn.execute(select(func.count(address.c.vm_id)).where(mine)).scalar_one()
    latest = func.max(address.c.free_from, type_=address.c.free_from.type)
    resting, until = conn.execute(select(func.count(), latest).where(mine, at_rest(now))).one()
    holds = conn.execute(select(func.count()).select_from(address_hold).where(held)).scalar_one()
    return Use(of_vms, _vms(conn, mine) if of_vms else (), resting, until, holds, _holds(conn, held) if holds else ())


def at_rest(now: datetime) -> ColumnElement[bool]:
    """Of an `address` row: nobody has it, and only its last VM may, whether or not it is held back besides."""
    return address.c.vm_id.is_(None) & address.c.free_from.is_not(None) & (address.c.free_from > now)


def lies_within(runs: Sequence[Run]) -> ColumnElement[bool]:
    """Of an `address` row."""
    return or_(*(address.c.address_hex.between(to_hex(low), to_hex(high)) for low, high in runs))


def _overlaps(runs: Sequence[Run]) -> ColumnElement[bool]:
    first, last = address_hold.c.first_hex, address_hold.c.last_hex
    return or_(*((first <= to_hex(high)) & (last >= to_hex(low)) for low, high in runs))


def _vms(conn: Connection, mine: ColumnElement[bool]) -> Sequence[str]:
    theirs = select(vm.c.name).join(address, address.c.vm_id == vm.c.id).where(mine)
    return conn.execute(theirs.distinct().order_by(vm.c.name).limit(_NAMED + 1)).scalars().all()


def _holds(conn: Connection, held: ColumnElement[bool]) -> Sequence[str]:
    query = select(address_hold, prefix.c.family).join(prefix, prefix.c.id == address_hold.c.prefix_id).where(held)
    rows = conn.execute(query.order_by(address_hold.c.first_hex).limit(_NAMED + 1))
    edges = [(row.kind, from_hex(row.first_hex, row.family), from_hex(row.last_hex, row.family)) for row in rows]
    return [f"{kind} {first}" if first == last else f"{kind} {first} to {last}" for kind, first, last in edges]


def check_unheld(conn: Connection, prefix_id: int, now: datetime) -> None:
    """Raises `resource.in_use` if addresses of it rest, or are held back: to delete it would end that."""
    use = use_of(conn, prefix_id, now)
    if use.resting or use.held:
        raise _in_use(prefix_id, use.told(), _what_to_do(use), use.details())


def prefix_in_use(conn: Connection, prefix_id: int, now: datetime | None = None) -> PpecError:
    """Says who has addresses of it, which somebody has. With `now`, also what of it rests then and is held back."""
    mine = address.c.prefix_id == prefix_id
    if now is not None:
        use = use_of(conn, prefix_id, now)
    else:
        of_vms = conn.execute(select(func.count(address.c.vm_id)).where(mine)).scalar_one()
        use = Use(of_vms, _vms(conn, mine), 0, None, 0, ())
    going = mine & address.c.vm_id.is_(None) & address.c.external_id.is_not(None)
    acquired = conn.execute(select(func.count()).select_from(address).where(going)).scalar_one()
    told = [*use.told(), *([f"NetBox has yet to get {acquired} back"] if acquired else [])]
    return _in_use(prefix_id, told, _what_to_do(use) or "Try again once NetBox has them back.", use.details())


def _what_to_do(use: Use) -> str:
    if use.of_vms:
        return "Delete these VMs first."
    if not use:
        return ""
    return (
        "Wait, and delete the holds; or have it deleted all the same, with `?force=true` or "
        "`ppec ipdb prefix delete --force`: its addresses may then be given out elsewhere at once."
    )


def _in_use(prefix_id: int, told: Sequence[str], hint: str, details: dict[str, Any]) -> PpecError:
    whose = " and ".join(told[-2:]) if len(told) < 3 else f"{', '.join(told[:-1])} and {told[-1]}"
    return PpecError(
        "resource.in_use",
        f"prefix {prefix_id} is in use: {whose}",
        hint=hint,
        subject=f"prefix {prefix_id}",
        details=details,
    )
