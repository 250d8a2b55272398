# SPDX-License-Identifier: Apache-2.0
"""The rows of addresses that an outside source has given us: what came in, what may go back, what it is to be told."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Connection,
    Executable,
    Row,
    and_,
    delete,
    exists,
    func,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError

from ppec_contract.api_ipdb import NetworkWanted
from ppec_orchestrator.ipdb.provider import Acquired, SourcePrefix
from ppec_orchestrator.ipdb.ranges import Address, Network, to_hex
from ppec_orchestrator.store.faults import is_unique_violation
from ppec_orchestrator.store.prefixes_in_use import at_rest, check_unheld, prefix_in_use
from ppec_orchestrator.store.serving import range_of
from ppec_orchestrator.store.tables import address, address_hold, host, prefix, vm, vrf

_BATCH = 500


@dataclass(frozen=True, slots=True)
class Untold:
    """An address whose holder the source was not told yet."""

    row_id: int
    source_id: int
    vm_id: UUID | None
    vm: str | None


@dataclass(frozen=True, slots=True)
class SourceRow:
    """An address of ours as it stands here, and its number there."""

    row_id: int
    source_id: int
    address_hex: str
    used: bool
    going_back: bool


@dataclass(frozen=True, slots=True)
class Renumbered:
    """An address that has a row here under another number of the source's than it was acquired with."""

    row_id: int
    before: int
    acquired: Acquired


@dataclass(frozen=True, slots=True)
class Adopted:
    """What became of acquired addresses. `count` are new, `known` have their row already, for another look at what is
    ours was faster; `useless` are none that the prefix gives out, or are there twice; which number stands of the
    `renumbered` ones depends on whether the source still has the one before; the `elsewhere` ones have a row in another
    prefix, which keeps them."""

    count: int
    known: int = 0
    useless: Sequence[Acquired] = ()
    renumbered: Sequence[Renumbered] = ()
    elsewhere: Sequence[Acquired] = ()


@dataclass(frozen=True, slots=True)
class Chance:
    """A prefix that could give an address: at once, or if `source` gives it."""

    source: SourcePrefix | None


def source_prefixes(conn: Connection, vrf_name: str | None = None) -> list[SourcePrefix]:
    """Those whose addresses come from outside, of one VRF or of all."""
    query = select(prefix).join(vrf, vrf.c.id == prefix.c.vrf_id).where(prefix.c.netbox_id.is_not(None))
    if vrf_name is not None:
        query = query.where(vrf.c.name == vrf_name)
    rows = conn.execute(query.order_by(prefix.c.id))
    return [_source_prefix(row) for row in rows]


def _source_prefix(row: Row[Any]) -> SourcePrefix:
    usable = range_of(row)
    return SourcePrefix(row.id, row.netbox_id, usable.network, usable)


def free_rows(prefix_id: int, now: datetime) -> ColumnElement[bool]:
    """Of the prefix's `address` rows those that `is_free`."""
    return (address.c.prefix_id == prefix_id) & is_free(now)


def is_free(now: datetime | ColumnElement[datetime]) -> ColumnElement[bool]:
    """Of an `address` row: may be given to anybody."""
    return (
        address.c.vm_id.is_(None)
        & address.c.hold_id.is_(None)
        & address.c.going_back.is_(False)
        & or_(address.c.free_from.is_(None), address.c.free_from <= now)
    )


def count_free(conn: Connection, prefix_id: int, now: datetime) -> int:
    return conn.execute(select(func.count()).where(free_rows(prefix_id, now))).scalar_one()


def chances(conn: Connection, wanted: NetworkWanted, vrf_name: str | None, now: datetime) -> list[Chance]:
    """The prefixes, of one VRF or of all, that could give just this address, the best first: those of VRFs that have
    hosts, and of these where it is here already. Where a VM has it, or it rests, it can't be had."""
    assert wanted.address is not None
    number = to_hex(int(wanted.address))
    hosts = exists().where(host.c.vrf_id == prefix.c.vrf_id)
    held = exists().where(
        address_hold.c.prefix_id == prefix.c.id, address_hold.c.first_hex <= number, address_hold.c.last_hex >= number
    )
    query = (
        select(
            prefix,
            hosts.label("has_hosts"),
            held.label("held"),
            address.c.id.label("row_id"),
            address.c.vm_id,
            address.c.free_from,
            address.c.going_back,
        )
        .join(vrf, vrf.c.id == prefix.c.vrf_id)
        .outerjoin(address, and_(address.c.prefix_id == prefix.c.id, address.c.address_hex == number))
        .where(prefix.c.family == wanted.address.version, prefix.c.low_hex <= number, prefix.c.high_hex >= number)
        .order_by(prefix.c.id)
    )
    if vrf_name is not None:
        query = query.where(vrf.c.name == vrf_name)
    found = [
        (not row.has_hosts, row.held, chance.source is not None, chance)
        for row in conn.execute(query)
        if (chance := _chance(row, wanted.address, wanted.prefix, now)) is not None
    ]
    return [chance for *_, chance in sorted(found, key=lambda each: each[:3])]


def _chance(row: Row[Any], wanted: Address, within: Network | None, now: datetime) -> Chance | None:
    usable = range_of(row)
    if wanted not in usable or within not in (None, usable.network):
        return None
    if row.row_id is None:
        return Chance(_source_prefix(row) if row.netbox_id is not None else None)
    at_rest = row.free_from is not None and row.free_from > now
    return None if row.vm_id is not None or row.going_back or at_rest else Chance(None)


def adopt(conn: Connection, of: SourcePrefix, acquired: Sequence[Acquired]) -> Adopted:
    """Makes rows of what the source has marked as ours."""
    found = conn.execute(select(prefix).where(prefix.c.id == of.prefix_id).with_for_update()).one_or_none()
    if found is None:
        return Adopted(0, useless=list(acquired))
    usable = range_of(found)
    mine = address.c.prefix_id == of.prefix_id
    columns = address.c.address_hex, address.c.id, address.c.external_id, address.c.going_back
    known = {row.address_hex: row for row in conn.execute(select(*columns).where(mine))}
    others = _rows_of_others(conn, of.prefix_id, {one.source_id for one in acquired})
    new: dict[str, Acquired] = {}
    useless: list[Acquired] = []
    renumbered: list[Renumbered] = []
    elsewhere: list[Acquired] = []
    there = 0
    for one in acquired:
        text = to_hex(int(one.address))
        row = known.get(text)
        if one.source_id in others:
            elsewhere.append(one)
        elif one.address not in usable or new.get(text, one) != one:
            useless.append(one)
        elif row is None:
            new[text] = one
        elif row.external_id != one.source_id:
            renumbered.append(Renumbered(row.id, row.external_id, one))
        elif not row.going_back:
            there += 1
    inserted = _insert_rows(conn, of.prefix_id, new)
    elsewhere += [one for text, one in new.items() if text not in inserted]
    return Adopted(len(inserted), there, useless, renumbered, elsewhere)


def _rows_of_others(conn: Connection, prefix_id: int, source_ids: Collection[int]) -> set[int]:
    """Those of the source's numbers that addresses of other prefixes have."""
    query = select(address.c.external_id).where(
        address.c.external_id.in_(list(source_ids)), address.c.prefix_id != prefix_id
    )
    return set(conn.execute(query).scalars())


def _insert_rows(conn: Connection, prefix_id: int, new: Mapping[str, Acquired]) -> set[str]:
    """Those inserted; of the others another prefix was faster."""
    rows = {
        text: {"prefix_id": prefix_id, "address_hex": text, "external_id": one.source_id} for text, one in new.items()
    }
    if not rows or _is_unique(conn, insert(address), list(rows.values())):
        return set(rows)
    return {text for text, row in rows.items() if _is_unique(conn, insert(address), [row])}


def _is_unique(conn: Connection, statement: Executable, rows: Sequence[dict[str, Any]] | None = None) -> bool:
    """Carries it out, unless a row would be there twice."""
    try:
        with conn.begin_nested():
            conn.execute(statement, rows)
    except IntegrityError as error:
        if not is_unique_violation(error):
            raise
        return False
    return True


def begin_return(
    conn: Connection,
    prefix_id: int,
    keep: int,
    now: datetime,
    *,
    most: int = _BATCH,
    spared: Collection[Address] = (),
) -> int:
    """Marks free ones beyond `keep`, the highest first and none of those `spared`: nobody is given them any more.
    Returns how many, `most` of them at most."""
    surplus = count_free(conn, prefix_id, now) - keep
    if surplus <= 0:
        return 0
    numbers = [to_hex(int(one)) for one in spared]
    free = free_rows(prefix_id, now), address.c.address_hex.not_in(numbers)
    limit = min(surplus, most, _BATCH)
    chosen = select(address.c.id).where(*free).order_by(address.c.address_hex.desc()).limit(limit)
    ids = conn.execute(chosen.with_for_update(skip_locked=True)).scalars().all()
    conn.execute(update(address).where(address.c.id.in_(ids)).values(going_back=True))
    return len(ids)


def close_all(conn: Connection, prefix_id: int, now: datetime, *, force: bool) -> None:
    """Marks all of them: the prefix is to go. Raises `resource.in_use` if any is left that somebody has; without
    `force` also if one rests or is held back, also if that came about only just now: a quarantine is not ended
    unsaid."""
    # Grants by number wait for this lock; for others under way the update waits, and leaves what they took.
    conn.execute(select(prefix.c.id).where(prefix.c.id == prefix_id).with_for_update()).all()
    mine = address.c.prefix_id == prefix_id, address.c.external_id.is_not(None)
    unused = update(address).where(*mine, address.c.vm_id.is_(None))
    if force:
        conn.execute(unused.values(going_back=True, free_from=None))
    else:
        conn.execute(unused.where(~at_rest(now)).values(going_back=True))
        check_unheld(conn, prefix_id, now)
    # Also what a VM gave back after the update had passed it by.
    if conn.execute(select(address.c.id).where(*mine, address.c.going_back.is_(False)).limit(1)).first() is not None:
        raise prefix_in_use(conn, prefix_id, now)


def close_lost(conn: Connection, row_id: int) -> bool:
    """Marks one that others have over there and no VM here: nobody is given it any more. Its row stays for as long as
    it rests, so that until then it is not acquired anew either."""
    lost = update(address).where(address.c.id == row_id, address.c.vm_id.is_(None)).values(going_back=True)
    return conn.execute(lost).rowcount == 1


def returning(conn: Connection, prefix_id: int, after: int, now: datetime) -> dict[int, int]:
    """What is to be given back, from the row after `after` on: the rows' ids in order, and the source's numbers."""
    query = select(address.c.id, address.c.external_id).where(
        address.c.prefix_id == prefix_id,
        address.c.going_back.is_(True),
        address.c.id > after,
        or_(address.c.free_from.is_(None), address.c.free_from <= now),
    )
    return dict(conn.execute(query.order_by(address.c.id).limit(_BATCH)).all())


def returned(conn: Connection, row_ids: Collection[int]) -> None:
    conn.execute(delete(address).where(address.c.id.in_(list(row_ids)), address.c.going_back.is_(True)))


def untold(conn: Connection, prefix_id: int, after: int) -> list[Untold]:
    """From the row after `after` on, in order."""
    rows = conn.execute(
        select(address.c.id, address.c.external_id, address.c.vm_id, vm.c.name)
        .outerjoin(vm, vm.c.id == address.c.vm_id)
        .where(
            address.c.prefix_id == prefix_id,
            address.c.external_id.is_not(None),
            address.c.going_back.is_(False),
            address.c.vm_id.is_distinct_from(address.c.told_vm_id),
            address.c.id > after,
        )
        .order_by(address.c.id)
        .limit(_BATCH)
    )
    return [Untold(row.id, row.external_id, row.vm_id, row.name or ("kept" if row.vm_id else None)) for row in rows]


def told(conn: Connection, holders: Sequence[Untold]) -> None:
    """It was told just that; what has changed since is told next time."""
    for one in holders:
        conn.execute(update(address).where(address.c.id == one.row_id).values(told_vm_id=one.vm_id))


def rows_of(conn: Connection, prefix_id: int) -> list[SourceRow]:
    """All that came from the source and is not wholly given back."""
    rows = conn.execute(
        select(address.c.id, address.c.external_id, address.c.address_hex, address.c.vm_id, address.c.going_back).where(
            address.c.prefix_id == prefix_id, address.c.external_id.is_not(None)
        )
    )
    return [SourceRow(row.id, row.external_id, row.address_hex, row.vm_id is not None, row.going_back) for row in rows]


def forget_free(conn: Connection, row_id: int, now: datetime) -> bool:
    """Removes a row that is free. One that rests is not: who gets the address next would get its last VM's packets."""
    return conn.execute(delete(address).where(address.c.id == row_id, is_free(now))).rowcount == 1


def renumber(conn: Connection, row_id: int, before: int, source_id: int) -> bool:
    """The source knows the address by this number now instead of `before`. False if it is not the row's: that is on its
    way back or gone, or has got a third one, or another prefix has the number."""
    row = address.c.id == row_id, address.c.going_back.is_(False)
    number = conn.execute(select(address.c.external_id).where(*row).with_for_update()).scalar()
    if number != before:
        # Whoever else looked was faster.
        return number == source_id
    return _is_unique(conn, update(address).where(*row).values(external_id=source_id, told_vm_id=None))
