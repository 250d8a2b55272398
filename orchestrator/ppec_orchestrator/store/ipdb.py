# SPDX-License-Identifier: Apache-2.0
"""Grants and releases addresses within the caller's transaction, so that address and VM commit together or not at all.

IPv4 has a row per usable address and takes the lowest free ones; IPv6 counts upwards and writes a row per grant, whose
unique constraint is what makes it safe. A released address rests in quarantine before others get it. Each change has
its line in the history (`address_events.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import islice
from uuid import UUID

from sqlalchemy import Connection, bindparam, delete, func, insert, select, update

from ppec_contract.api_ipdb import AddressAction, NetworkWanted
from ppec_contract.errors import PpecError
from ppec_orchestrator.ipdb.ranges import AddressRange, to_hex
from ppec_orchestrator.store import address_events
from ppec_orchestrator.store.external_addresses import free_rows
from ppec_orchestrator.store.fixed_addresses import take_fixed
from ppec_orchestrator.store.serving import (
    GrantedAddress,
    ServingPrefix,
    held_runs,
    prefixes_serving,
    serving_prefix,
)
from ppec_orchestrator.store.tables import address, prefix
from ppec_orchestrator.store.utilisation import Utilisation, utilisation_of

_ROWS_PER_INSERT = 5000
# One of each family that serves the host.
ANY_NETWORK = (NetworkWanted(),)


def utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class _Taking:
    """A round of grants: whom for, for which network of their request, and when."""

    vm_ids: Sequence[UUID]
    position: int
    now: datetime


def grant(
    conn: Connection,
    host_id: int,
    vm_ids: Sequence[UUID],
    networks: Sequence[NetworkWanted] = ANY_NETWORK,
    *,
    now: datetime | None = None,
) -> dict[UUID, tuple[GrantedAddress, ...]]:
    """Gives each VM what `networks` asks for: for an empty one, an address of each family that serves the host.

    Raises `address.exhausted` with counts when there is not one for every VM, and what `take_fixed` raises; the caller
    then rolls back. A host that no prefix serves gives an empty tuple for each VM, unless a prefix is named.
    """
    now = now or utc_now()
    serving = prefixes_serving(conn, [host_id])[host_id]
    granted: dict[UUID, list[GrantedAddress]] = {vm_id: [] for vm_id in vm_ids}
    # Those first that are asked for by number: the others must not take them away.
    for position, one in enumerate(networks):
        if one.address is not None:
            for vm_id in vm_ids:
                granted[vm_id].append(take_fixed(conn, serving, vm_id, one, position, now=now))
    by_choice = sorted(enumerate(networks), key=lambda each: each[1].prefix is None)
    for position, one in by_choice:
        if one.address is None:
            for prefixes in _alternatives(serving, one):
                for vm_id, got in _take(conn, prefixes, _Taking(vm_ids, position, now)):
                    granted[vm_id].append(got)
    _record(conn, AddressAction.GRANTED, vm_ids, now)
    return {vm_id: tuple(sorted(mine, key=lambda one: one.order)) for vm_id, mine in granted.items()}


def _record(conn: Connection, action: AddressAction, vm_ids: Sequence[UUID], now: datetime) -> None:
    rows = conn.execute(select(address.c.id).where(address.c.vm_id.in_(list(vm_ids)))).scalars().all()
    if rows:
        address_events.of_vms(conn, action, rows, now)


def _alternatives(serving: Sequence[ServingPrefix], wanted: NetworkWanted) -> list[list[ServingPrefix]]:
    """An address is wanted of each of these lists: of whichever prefix in it has one, the first first."""
    if wanted.prefix is not None:
        found = [one for one in serving if one.range.network == wanted.prefix]
        if not found:
            raise PpecError(
                "prefix.not_serving",
                f"prefix {wanted.prefix} does not serve the host",
                hint="Choose another prefix, or narrow the request to hosts that this one serves.",
                subject=f"prefix {wanted.prefix}",
            )
        return [found]
    families = ([one for one in serving if one.family == family] for family in (4, 6))
    return [prefixes for prefixes in families if prefixes]


def _take(conn: Connection, prefixes: Sequence[ServingPrefix], taking: _Taking) -> list[tuple[UUID, GrantedAddress]]:
    """An address for every VM, or `address.exhausted`."""
    found: list[tuple[UUID, GrantedAddress]] = []
    left = list(taking.vm_ids)
    took: list[int] = []
    for one in prefixes:
        take = _take_rows if one.family == 4 or one.external else _take_ipv6
        got = take(conn, one, replace(taking, vm_ids=left))
        found += [(vm_id, one.granted(text, taking.position)) for vm_id, text in zip(left, got, strict=False)]
        took.append(len(got))
        left = left[len(got) :]
        if not left:
            return found
    raise _exhausted(conn, list(zip(prefixes, took, strict=True)), len(taking.vm_ids), taking.now)


def _exhausted(conn: Connection, looked: Sequence[tuple[ServingPrefix, int]], wanted: int, now: datetime) -> PpecError:
    """`looked` are the prefixes and how many free addresses each had."""
    rows = conn.execute(select(prefix).where(prefix.c.id.in_([one.prefix_id for one, _ in looked]))).all()
    counted = utilisation_of(conn, rows, now)
    free = sum(took for _, took in looked)
    family = looked[0][0].family
    told = [(one, took, counted[one.prefix_id]) for one, took in looked if one.prefix_id in counted]
    resting = [use.next_free_at for _, _, use in told if use.next_free_at is not None]
    return PpecError(
        "address.exhausted",
        f"{wanted} IPv{family} addresses wanted, {free} free: "
        + "; ".join(shortage_words(str(one.range.network), took, use) for one, took, use in told),
        hint=f"The next one leaves quarantine at {min(resting):%H:%M:%SZ}." if resting else
        "Add a prefix for this VRF and cluster, or delete VMs.",
        subject=", ".join(str(one.range.network) for one, _ in looked),
        details={
            "wanted": wanted,
            "missing": wanted - free,
            "family": family,
            "prefixes": [
                {"prefix": str(one.range.network), "free": took} | shortage_counts(use) for one, took, use in told
            ],
        },
    )  # fmt: skip


def shortage_words(network: str, free: int, use: Utilisation) -> str:
    return f"{network} has {free} of {use.total} free, {use.quarantined} in quarantine, {use.reserved} reserved"


def shortage_counts(use: Utilisation) -> dict[str, int]:
    return {"total": use.total, "quarantined": use.quarantined, "reserved": use.reserved}


def _take_rows(conn: Connection, one: ServingPrefix, taking: _Taking) -> list[str]:
    """Up to one address per VM, lowest first, of those that have rows."""
    count = len(taking.vm_ids)
    free = (
        select(address.c.id, address.c.address_hex)
        .where(free_rows(one.prefix_id, taking.now))
        .order_by(address.c.address_hex)
        .limit(count)
    )
    rows = conn.execute(free.with_for_update(skip_locked=True)).all()
    if len(rows) < count and conn.dialect.name == "postgresql":
        # What others hold locked may yet be rolled back: wait for them rather than refuse while an address is free.
        # Rows they do take drop out while we wait, so look again until a look loses none.
        while len(rows) < (seen := len(conn.execute(free).all())):
            rows = conn.execute(free.with_for_update()).all()
            if len(rows) == seen:
                break
    if rows:
        taken = {"vm_id": bindparam("owner"), "position": taking.position, "free_from": None, "last_vm_id": None}
        statement = update(address).where(address.c.id == bindparam("row")).values(taken)
        pairs = zip(rows, taking.vm_ids, strict=False)
        conn.execute(statement, [{"row": row.id, "owner": vm_id} for row, vm_id in pairs])
    return [row.address_hex for row in rows]


def _take_ipv6(conn: Connection, one: ServingPrefix, taking: _Taking) -> list[str]:
    """Up to one address per VM, counting upwards. The lock on the prefix's row makes its grants one after another."""
    locked = conn.execute(
        select(prefix.c.id, prefix.c.next_hex).where(prefix.c.id == one.prefix_id).with_for_update()
    ).one_or_none()
    if locked is None:
        return []  # deleted since it was read
    conn.execute(delete(address).where(free_rows(one.prefix_id, taking.now)))
    # Who holds addresses back has the lock too: what is held is known only now.
    usable = replace(one.range, held=held_runs(conn, [one.prefix_id]).get(one.prefix_id, ()))
    start = int(locked.next_hex, 16) if locked.next_hex else int(usable.first)
    found = _count_upwards(conn, one.prefix_id, usable, start, len(taking.vm_ids))
    if found:
        conn.execute(
            update(prefix).where(prefix.c.id == one.prefix_id).values(next_hex=to_hex((found[-1] + 1) % 2**128))
        )
        conn.execute(
            insert(address),
            [
                {"prefix_id": one.prefix_id, "address_hex": to_hex(n), "vm_id": vm_id, "position": taking.position}
                for n, vm_id in zip(found, taking.vm_ids, strict=False)
            ],
        )
    return [to_hex(number) for number in found]


def _count_upwards(conn: Connection, prefix_id: int, usable: AddressRange, start: int, wanted: int) -> list[int]:
    """Up to so many numbers that have no row, from `start` on and round once."""
    found: list[int] = []
    begin, looked = start, 0
    rows = conn.execute(select(func.count()).where(address.c.prefix_id == prefix_id)).scalar_one()
    # Of as many numbers as there are rows and are wanted, so many have no row; fewer are only in a smaller range.
    bound = min(rows + wanted, usable.size)
    while len(found) < wanted and looked < bound:
        window = usable.window(begin, min(wanted + 1, bound - looked))
        if not window:
            break
        looked += len(window)
        hexes = [to_hex(number) for number in window]
        taken = set(
            conn.execute(
                select(address.c.address_hex).where(address.c.prefix_id == prefix_id, address.c.address_hex.in_(hexes))
            ).scalars()
        )
        free = [number for number in window if to_hex(number) not in taken and number not in found]
        found += free[: wanted - len(found)]
        begin = window[-1] + 1
    return found


def release(conn: Connection, vm_ids: Iterable[UUID], *, now: datetime | None = None) -> int:
    """Takes back whatever addresses the VMs have, into quarantine; returns how many those were."""
    now = now or utc_now()
    rows = conn.execute(
        select(address.c.id, address.c.external_id, prefix.c.family, prefix.c.quarantine_s)
        .join(prefix, prefix.c.id == address.c.prefix_id)
        .where(address.c.vm_id.in_(list(vm_ids)))
        .order_by(address.c.id)
        .with_for_update(of=address)
    ).all()
    if not rows:
        return 0
    address_events.of_vms(conn, AddressAction.RELEASED, [row.id for row in rows], now)
    alike: dict[tuple[bool, int], list[int]] = defaultdict(list)
    for row in rows:
        alike[row.family == 4 or row.external_id is not None, row.quarantine_s].append(row.id)
    for (has_row, quarantine_s), ids in alike.items():
        _rest(conn, has_row, ids, now + timedelta(seconds=quarantine_s) if quarantine_s else None)
    return len(rows)


def _rest(conn: Connection, has_row: bool, ids: Collection[int], until: datetime | None) -> None:
    if until is None and not has_row:
        conn.execute(delete(address).where(address.c.id.in_(ids)))
        return
    last = address.c.vm_id if until is not None else None
    conn.execute(update(address).where(address.c.id.in_(ids)).values(vm_id=None, last_vm_id=last, free_from=until))


def keep(conn: Connection, vm_id: UUID, holder: UUID, *, now: datetime | None = None) -> None:
    """The VM's addresses stay taken, in the name of `holder`: what may be left of it on a host."""
    address_events.kept(conn, vm_id, holder, now or utc_now())
    conn.execute(update(address).where(address.c.vm_id == vm_id).values(vm_id=holder))


def addresses_of(conn: Connection, vm_ids: Iterable[UUID]) -> dict[UUID, tuple[GrantedAddress, ...]]:
    """What each VM holds, IPv4 first, then as asked for; VMs without an address are left out."""
    rows = conn.execute(
        select(address.c.vm_id, address.c.address_hex, address.c.position, prefix)
        .join(prefix, prefix.c.id == address.c.prefix_id)
        .where(address.c.vm_id.in_(list(vm_ids)))
    )
    found: dict[UUID, list[GrantedAddress]] = defaultdict(list)
    for row in rows:
        found[row.vm_id].append(serving_prefix(row).granted(row.address_hex, row.position))
    return {vm_id: tuple(sorted(mine, key=lambda one: one.order)) for vm_id, mine in found.items()}


def insert_ipv4_rows(conn: Connection, prefix_id: int, usable: AddressRange) -> None:
    """The free rows of a new IPv4 prefix."""
    hexes = usable.hexes()
    while chunk := list(islice(hexes, _ROWS_PER_INSERT)):
        conn.execute(insert(address), [{"prefix_id": prefix_id, "address_hex": text} for text in chunk])
