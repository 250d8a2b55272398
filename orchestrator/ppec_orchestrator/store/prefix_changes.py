# SPDX-License-Identifier: Apache-2.0
"""Changes of a prefix that exists: what VMs to come are told, and which addresses it gives out."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, delete, select, update

from ppec_contract.api_ipdb import PrefixUpdate
from ppec_contract.errors import PpecError
from ppec_orchestrator.ipdb.ranges import (
    AddressRange,
    Run,
    check_gateway,
    check_nameservers,
    from_hex,
    to_hex,
    usable_range,
)
from ppec_orchestrator.store.address_rows import insert_ipv4_runs
from ppec_orchestrator.store.catalogue import not_found
from ppec_orchestrator.store.prefixes_in_use import at_rest, lies_within, use_of
from ppec_orchestrator.store.serving import range_of
from ppec_orchestrator.store.tables import address, address_hold, prefix

_OF_RANGE = ("gateway", "first", "last")
# Of the runs that would go, so many are told.
_TOLD = 3


def change_prefix(conn: Connection, prefix_id: int, wanted: PrefixUpdate, now: datetime) -> None:
    """Raises `prefix.not_found`, `prefix.invalid`, or `resource.in_use` for addresses that it would give out no more
    and that somebody has, that rest or are held back."""
    # Holds, IPv6 grants and grants by number wait for this lock, and read what is left of the prefix once they have it.
    row = conn.execute(select(prefix).where(prefix.c.id == prefix_id).with_for_update()).one_or_none()
    if row is None:
        raise not_found("prefix", "prefix", str(prefix_id))
    given = wanted.model_dump(mode="json", exclude_unset=True, exclude=set(_OF_RANGE))
    # Of these there is no prefix without one.
    changes = {name: value for name, value in given.items() if value is not None or name == "vlan"}
    if wanted.nameservers is not None:
        check_nameservers(range_of(row).network, wanted.nameservers)
    if wanted.model_fields_set & set(_OF_RANGE):
        changes |= _resized(conn, row, wanted, now)
    if changes:
        conn.execute(update(prefix).where(prefix.c.id == prefix_id).values(changes))


def _resized(conn: Connection, row: Row[Any], wanted: PrefixUpdate, now: datetime) -> dict[str, Any]:
    """Adds and removes addresses; returns what changes of the prefix's row."""
    before = range_of(row)
    given = {name: getattr(wanted, name) for name in _OF_RANGE if name in wanted.model_fields_set}
    after = usable_range(before.network, **{name: getattr(before, name) for name in _OF_RANGE} | given)
    if after == before:
        return {}
    if row.netbox_id is not None:
        raise _of_netbox(before)
    if after.gateway != before.gateway:
        check_gateway(before.network, after.gateway)
    if gone := before.beyond(after):
        _remove(conn, row, gone, now)
    if before.family == 4 and (new := after.beyond(before)):
        _add(conn, row.id, new)
    return {
        "gateway": str(after.gateway) if after.gateway is not None else None,
        "first": str(after.first),
        "last": str(after.last),
        "next_hex": _next_hex(row, after),
    }


def _next_hex(row: Row[Any], usable: AddressRange) -> str | None:
    """IPv6 goes on counting where it stands, if that is given out yet."""
    first, last = to_hex(int(usable.first)), to_hex(int(usable.last))
    if usable.family == 4:
        return None
    return row.next_hex if row.next_hex is not None and first <= row.next_hex <= last else first


def _remove(conn: Connection, row: Row[Any], gone: Sequence[Run], now: datetime) -> None:
    mine = (address.c.prefix_id == row.id) & lies_within(gone)
    if use_of(conn, row.id, now, gone):
        raise _in_use(conn, row, gone, now)
    # It waits for IPv4 grants and releases under way, and leaves what they took or laid to rest.
    conn.execute(delete(address).where(mine, address.c.vm_id.is_(None), ~at_rest(now)))
    if conn.execute(select(address.c.id).where(mine).limit(1)).first() is not None:
        raise _in_use(conn, row, gone, now)


def _add(conn: Connection, prefix_id: int, new: Sequence[Run]) -> None:
    insert_ipv4_runs(conn, prefix_id, new)
    # A hold may span what was the gateway.
    held = select(address_hold.c.id).where(
        address_hold.c.prefix_id == prefix_id,
        address_hold.c.first_hex <= address.c.address_hex,
        address_hold.c.last_hex >= address.c.address_hex,
    )
    mine = address.c.prefix_id == prefix_id, lies_within(new)
    conn.execute(update(address).where(*mine).values(hold_id=held.scalar_subquery()))


def _in_use(conn: Connection, row: Row[Any], gone: Sequence[Run], now: datetime) -> PpecError:
    use = use_of(conn, row.id, now, gone)
    runs = [_words(run, row.family) for run in gone[:_TOLD]] + (["…"] if len(gone) > _TOLD else [])
    why = ", and ".join(use.told("these addresses")) or "another request has just taken one of them"
    return PpecError(
        "resource.in_use",
        f"prefix {row.cidr} would no longer give out {', '.join(runs)}: {why}",
        hint="Delete these VMs and holds first, and wait for what rests; or leave these addresses in.",
        subject=f"prefix {row.cidr}",
        details=use.details(),
    )


def _words(run: Run, family: int) -> str:
    first, last = (from_hex(to_hex(number), family) for number in run)
    return str(first) if first == last else f"{first} to {last}"


def _of_netbox(usable: AddressRange) -> PpecError:
    return PpecError(
        "prefix.invalid",
        f"prefix {usable.network}: NetBox keeps its addresses, and was asked about its gateway, first and last when it "
        "was registered: they can't be changed here",
        hint="Delete the prefix, and register it anew as it is to be.",
        subject=f"prefix {usable.network}",
    )
