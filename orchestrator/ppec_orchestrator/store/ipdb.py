# SPDX-License-Identifier: Apache-2.0
"""Grants and releases addresses within the caller's transaction, so that address and VM commit together or not at all.

IPv4 has a row per usable address and takes the lowest free ones; IPv6 counts upwards and writes a row per grant, whose
unique constraint is what makes it safe. A released address rests in quarantine before others get it. Each change has
its line in the history (`address_events.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import BindParameter, Connection, Select, bindparam, delete, func, insert, select, update

from ppec_contract.api_ipdb import AddressAction, NetworkWanted
from ppec_contract.errors import PpecError
from ppec_orchestrator.ipdb.ranges import AddressRange, Network, to_hex
from ppec_orchestrator.store import address_events
from ppec_orchestrator.store.address_rows import insert_ipv4_runs
from ppec_orchestrator.store.clock import Clock, utc_now
from ppec_orchestrator.store.external_addresses import free_rows, is_free
from ppec_orchestrator.store.faults import TransactionLostError
from ppec_orchestrator.store.fixed_addresses import Fixed, of_one_vm, refuses_an_address, take_fixed, take_free
from ppec_orchestrator.store.serving import (
    GrantedAddress,
    ServingPrefix,
    held_runs,
    prefixes_serving,
    range_of,
    serving_prefix,
)
from ppec_orchestrator.store.tables import address, prefix, vm
from ppec_orchestrator.store.utilisation import Utilisation, utilisation_of

_NUMBERS_PER_LOOK = 1000
# One of each family that serves the host.
ANY_NETWORK = (NetworkWanted(),)
# What each VM asks for, by its id. One that is not among them asks for `ANY_NETWORK`.
Networks = Mapping[UUID, Sequence[NetworkWanted]]
ALL_ANY: Networks = {}


@dataclass(frozen=True, slots=True)
class _Taking:
    """A round of grants: for the network of which place among those of a VM, by which clock, whether to wait for
    others' locks, and all VMs that the transaction gives addresses to."""

    position: int
    now: Clock
    wait: bool
    owners: Collection[UUID]


# The VMs to be given an address, by the prefixes that could give it: the first one that has any does.
_Groups = Mapping[tuple[ServingPrefix, ...], Sequence[UUID]]


def grant(
    conn: Connection,
    hosts: Mapping[UUID, int],
    networks: Networks = ALL_ANY,
    *,
    wait: bool = True,
    now: Clock = utc_now,
) -> None:
    """Gives each VM (by id, with its host's) what its `networks` ask for: for an empty one, an address of each family
    that serves its host. Without `wait`, rows of addresses that another transaction holds locked count as taken. Two
    things are waited for all the same, for as long as a grant's transaction takes: an address asked for by number, and
    where a prefix without rows (IPv6) goes on counting. Each grant of that prefix has it until its commit, and to leave
    it out would be to say that there is no address where 2^64 are free. So `now` is asked again after each wait: what
    rested when the call began may have been free for whoever was waited for, and the history must not say otherwise.

    Raises `address.exhausted` with counts when there is not one for every VM, `TransactionLostError` when another one
    that uses up the same prefix goes first, and what `take_fixed` raises, where there are several VMs said of which;
    the caller then rolls back. A VM on a host that no prefix serves gets nothing, unless a prefix is named.
    """
    serving = prefixes_serving(conn, set(hosts.values()))
    rounds: dict[tuple[int, NetworkWanted], dict[UUID, int]] = defaultdict(dict)
    for vm_id, host_id in hosts.items():
        for position, one in enumerate(networks.get(vm_id, ANY_NETWORK)):
            rounds[position, one][vm_id] = host_id
    in_turn = sorted(rounds.items(), key=lambda each: _turn(each[0][1]))
    fixed = [
        Fixed(vm_id, one, position, serving[host_id])
        for (position, one), mine in in_turn
        if one.address is not None
        for vm_id, host_id in mine.items()
    ]
    _take_all_fixed(conn, fixed, now, several=len(hosts) > 1)
    for (position, one), mine in in_turn:
        if one.address is None:
            for groups in _alternatives(serving, mine, one):
                _take(conn, groups, _Taking(position, now, wait, hosts))
    address_events.of_vms(conn, AddressAction.GRANTED, address.c.vm_id.in_(list(hosts)), now())


def _take_all_fixed(conn: Connection, fixed: Sequence[Fixed], now: Clock, *, several: bool) -> None:
    """With `several` VMs a refusal says whose address it is."""
    taken = take_free(conn, fixed, now=now) if len(fixed) > 1 else set()
    for one in fixed:
        if (one.vm_id, one.position) not in taken:
            try:
                take_fixed(conn, one.serving, one.vm_id, one.wanted, one.position, now=now)
            except PpecError as error:
                raise _told(conn, error, one.vm_id) if several else error from None


def _told(conn: Connection, refused: PpecError, vm_id: UUID) -> PpecError:
    """With the VM's name, where an address was refused."""
    name = conn.execute(select(vm.c.name).where(vm.c.id == vm_id)).scalar()
    return of_one_vm(refused, name) if name and refuses_an_address(refused) else refused


def _turn(wanted: NetworkWanted) -> tuple[int, int, int]:
    """Those first that leave the least to choose from, which the others must not take away: by number, then of a named
    prefix. And in the order of numbers: two transactions that take the same ones can't wait for each other."""
    if wanted.address is not None:
        return 0, wanted.address.version, int(wanted.address)
    if wanted.prefix is not None:
        return 1, wanted.prefix.version, int(wanted.prefix.network_address)
    return 2, 0, 0


def _alternatives(
    serving: Mapping[int, Sequence[ServingPrefix]], hosts: Mapping[UUID, int], wanted: NetworkWanted
) -> list[_Groups]:
    """An address is wanted of each of these."""
    if wanted.prefix is not None:
        named = {host_id: _named(prefixes, wanted.prefix) for host_id, prefixes in serving.items()}
        return [_grouped(named, hosts)]
    families = (
        {host_id: tuple(one for one in prefixes if one.family == family) for host_id, prefixes in serving.items()}
        for family in (4, 6)
    )
    return [_grouped(each, hosts) for each in families]


def _named(prefixes: Sequence[ServingPrefix], wanted: Network) -> tuple[ServingPrefix, ...]:
    found = tuple(one for one in prefixes if one.range.network == wanted)
    if not found:
        raise PpecError(
            "prefix.not_serving",
            f"prefix {wanted} does not serve the host",
            hint="Choose another prefix, or narrow the request to hosts that this one serves.",
            subject=f"prefix {wanted}",
        )
    return found


def _grouped(prefixes: Mapping[int, tuple[ServingPrefix, ...]], hosts: Mapping[UUID, int]) -> _Groups:
    groups: dict[tuple[ServingPrefix, ...], list[UUID]] = defaultdict(list)
    for vm_id, host_id in hosts.items():
        groups[prefixes[host_id]].append(vm_id)
    groups.pop((), None)
    return dict(sorted(groups.items(), key=lambda item: item[0][0].prefix_id))


def _take(conn: Connection, groups: _Groups, taking: _Taking) -> None:
    """An address for every VM, or `address.exhausted`. The first prefix has enough, as a rule: a few statements for all
    VMs try that, before each group looks further."""
    got = _take_lowest(conn, {prefixes: ids for prefixes, ids in groups.items() if prefixes[0].has_rows}, taking)
    got |= _count_on(conn, {prefixes: ids for prefixes, ids in groups.items() if not prefixes[0].has_rows}, taking)
    for prefixes, ids in groups.items():
        left = [vm_id for vm_id in ids if vm_id not in got]
        took = dict.fromkeys(prefixes, 0) | {prefixes[0]: len(ids) - len(left)}
        for one in prefixes:
            if left:
                more = (_take_rows if one.has_rows else _take_ipv6)(conn, one, left, taking)
                took[one] += more
                left = left[more:]
        if left:
            raise _exhausted(conn, list(took.items()), len(ids), taking.now())


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


_TAKEN: Mapping[str, Any] = {
    "vm_id": bindparam("owner"),
    "position": bindparam("place"),
    "free_from": None,
    "last_vm_id": None,
}
_TAKE_LOWEST = (
    update(address)
    .where(
        address.c.id
        == select(address.c.id)
        .where(address.c.prefix_id == bindparam("which"), is_free(bindparam("now", type_=address.c.free_from.type)))
        .order_by(address.c.address_hex)
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )
    .values(_TAKEN)
)


def _take_lowest(conn: Connection, groups: _Groups, taking: _Taking) -> set[UUID]:
    """The lowest free row of the first prefix for each VM, in one statement for all; which VMs got one."""
    terms = {"now": taking.now(), "place": taking.position}
    tries = [
        {"which": prefixes[0].prefix_id, "owner": vm_id} | terms for prefixes, ids in groups.items() for vm_id in ids
    ]
    if not tries:
        return set()
    owners = {vm_id for ids in groups.values() for vm_id in ids}
    if conn.execute(_TAKE_LOWEST, tries).rowcount == len(tries):
        return owners
    firsts = {prefixes[0].prefix_id for prefixes in groups}
    rows = conn.execute(
        select(address.c.vm_id).where(
            address.c.vm_id.in_(list(owners)), address.c.prefix_id.in_(firsts), address.c.position == taking.position
        )
    )
    return set(rows.scalars())


# Made once: to put a statement together takes longer than to carry it out.
_IDS: BindParameter[Any] = bindparam("ids", expanding=True)
_COUNTERS = select(prefix).where(prefix.c.id.in_(_IDS)).order_by(prefix.c.id).with_for_update()
_RETURNED = delete(address).where(
    address.c.prefix_id.in_(_IDS), is_free(bindparam("now", type_=address.c.free_from.type))
)
_OCCUPIED = select(address.c.prefix_id).where(
    address.c.prefix_id.in_(_IDS), address.c.address_hex.in_(bindparam("hexes", expanding=True))
)


def _count_on(conn: Connection, groups: _Groups, taking: _Taking) -> set[UUID]:
    """Each first prefix's next numbers for the VMs wanted there, in a few statements for all; which VMs got one. A
    prefix whose next numbers are taken, as happens in a small one, gives none here."""
    firsts = {prefixes[0].prefix_id: prefixes[0] for prefixes in groups}
    wanted: dict[int, list[UUID]] = defaultdict(list)
    for prefixes, ids in groups.items():
        wanted[prefixes[0].prefix_id] += ids
    locked = _counters(conn, list(firsts), taking.now) if firsts else {}
    windows = {
        which: usable.window(start, len(wanted[which]))
        for which, (start, usable) in locked.items()
        if usable.size >= len(wanted[which])
    }
    hexes = {to_hex(number) for window in windows.values() for number in window}
    taken = set(conn.execute(_OCCUPIED, {"ids": list(windows), "hexes": hexes}).scalars()) if hexes else set()
    found = {
        which: window for which, window in windows.items() if which not in taken and len(window) == len(wanted[which])
    }
    if found:
        _insert_counted(conn, [(which, window, wanted[which]) for which, window in found.items()], taking)
    return {vm_id for which in found for vm_id in wanted[which]}


def _counters(conn: Connection, prefix_ids: Collection[int], now: Clock) -> dict[int, tuple[int, AddressRange]]:
    """Where each prefix goes on counting, and over what. The locks on their rows make a prefix's grants one after
    another; by id, for two transactions that take them in the same order can't wait for each other. Prefixes that are
    gone are left out."""
    locked = conn.execute(_COUNTERS, {"ids": list(prefix_ids)}).all()
    ids = [row.id for row in locked]
    if not ids:
        return {}
    conn.execute(_RETURNED, {"ids": ids, "now": now()})
    # Who holds addresses back, or changes the prefix, has the locks too: what there is to give is known only now.
    held = held_runs(conn, ids)
    ranges = {row.id: range_of(row, held.get(row.id, ())) for row in locked}
    return {row.id: (int(row.next_hex or to_hex(int(ranges[row.id].first)), 16), ranges[row.id]) for row in locked}


def _insert_counted(
    conn: Connection, found: Sequence[tuple[int, Sequence[int], Sequence[UUID]]], taking: _Taking
) -> None:
    """`found` are prefixes, the numbers that each gives, and to whom."""
    ends = [{"which": which, "next": to_hex((numbers[-1] + 1) % 2**128)} for which, numbers, _ in found]
    conn.execute(_COUNTED, ends)
    rows = [
        {"prefix_id": which, "address_hex": to_hex(number), "vm_id": vm_id, "position": taking.position}
        for which, numbers, vm_ids in found
        for number, vm_id in zip(numbers, vm_ids, strict=False)
    ]
    conn.execute(insert(address), rows)


_COUNTED = update(prefix).where(prefix.c.id == bindparam("which")).values(next_hex=bindparam("next"))


def _take_rows(conn: Connection, one: ServingPrefix, vm_ids: Sequence[UUID], taking: _Taking) -> int:
    """Up to one address per VM, lowest first, of those that have rows; how many there were."""
    count = len(vm_ids)
    rows = conn.execute(_free(one, count, taking.now()).with_for_update(skip_locked=True)).all()
    if taking.wait and len(rows) < count and conn.dialect.name == "postgresql":
        _take_turn_at_the_last(conn, one, taking, holds_some=bool(rows))
        # What others hold locked may yet be rolled back: wait for them rather than refuse while an address is free.
        # Rows they do take drop out while we wait, so look again until a look loses none.
        while len(rows) < (seen := len(conn.execute(free := _free(one, count, taking.now())).all())):
            rows = conn.execute(free.with_for_update()).all()
            if len(rows) == seen:
                break
    if rows:
        statement = update(address).where(address.c.id == bindparam("row")).values(_TAKEN)
        pairs = zip(rows, vm_ids, strict=False)
        conn.execute(statement, [{"row": row.id, "owner": vm_id, "place": taking.position} for row, vm_id in pairs])
    return len(rows)


def _free(one: ServingPrefix, count: int, now: datetime) -> Select[Any]:
    """The lowest rows."""
    columns = address.c.id, address.c.address_hex
    return select(*columns).where(free_rows(one.prefix_id, now)).order_by(address.c.address_hex).limit(count)


def _take_turn_at_the_last(conn: Connection, one: ServingPrefix, taking: _Taking, *, holds_some: bool) -> None:
    """Of all that use the prefix up one waits for the others' addresses. Two that have some each, and wait for each
    other's, would both wait for ever; so whoever has some and is not the one loses, which lets go of them, and tries
    again. Raises `TransactionLostError`."""
    turn = select(prefix.c.id).where(prefix.c.id == one.prefix_id)
    if conn.execute(turn.with_for_update(key_share=True, skip_locked=True)).first() is not None:
        return
    mine = select(address.c.id).where(address.c.vm_id.in_(list(taking.owners))).limit(1)
    if holds_some or conn.execute(mine).first() is not None:
        raise TransactionLostError
    conn.execute(turn.with_for_update(key_share=True)).all()


def _take_ipv6(conn: Connection, one: ServingPrefix, vm_ids: Sequence[UUID], taking: _Taking) -> int:
    """Up to one address per VM, counting upwards; how many there were."""
    for start, usable in _counters(conn, [one.prefix_id], taking.now).values():
        found = _count_upwards(conn, one.prefix_id, usable, start, len(vm_ids))
        if found:
            _insert_counted(conn, [(one.prefix_id, found, vm_ids)], taking)
        return len(found)
    return 0


def _count_upwards(conn: Connection, prefix_id: int, usable: AddressRange, start: int, wanted: int) -> list[int]:
    """Up to so many numbers that have no row, from `start` on and round once."""
    found: list[int] = []
    begin, looked = start, 0
    rows = conn.execute(select(func.count()).where(address.c.prefix_id == prefix_id)).scalar_one()
    # Of as many numbers as there are rows and are wanted, so many have no row; fewer are only in a smaller range.
    bound = min(rows + wanted, usable.size)
    # The next ones are free as a rule; where they are not, more are looked at at once.
    width = wanted + 1
    while len(found) < wanted and looked < bound:
        window = usable.window(begin, min(width, bound - looked))
        width = max(wanted + 1, _NUMBERS_PER_LOOK)
        if not window:
            break
        looked += len(window)
        hexes = [to_hex(number) for number in window]
        taken = set(
            conn.execute(
                select(address.c.address_hex).where(address.c.prefix_id == prefix_id, address.c.address_hex.in_(hexes))
            ).scalars()
        )
        seen = set(found)
        free = [number for number, text in zip(window, hexes, strict=True) if text not in taken and number not in seen]
        found += free[: wanted - len(found)]
        begin = window[-1] + 1
    return found


def release(conn: Connection, vm_ids: Iterable[UUID], *, now: Clock = utc_now) -> int:
    """Takes back whatever addresses the VMs have, into quarantine; returns how many those were."""
    rows = conn.execute(
        select(address.c.id, address.c.external_id, prefix.c.family, prefix.c.quarantine_s)
        .join(prefix, prefix.c.id == address.c.prefix_id)
        .where(address.c.vm_id.in_(list(vm_ids)))
        .order_by(address.c.id)
        .with_for_update(of=address)
    ).all()
    if not rows:
        return 0
    # Not before they are locked: they rest from now on.
    at = now()
    address_events.of_vms(conn, AddressAction.RELEASED, address.c.id.in_([row.id for row in rows]), at)
    alike: dict[tuple[bool, int], list[int]] = defaultdict(list)
    for row in rows:
        alike[row.family == 4 or row.external_id is not None, row.quarantine_s].append(row.id)
    for (has_row, quarantine_s), ids in alike.items():
        _rest(conn, has_row, ids, at + timedelta(seconds=quarantine_s) if quarantine_s else None)
    return len(rows)


def _rest(conn: Connection, has_row: bool, ids: Collection[int], until: datetime | None) -> None:
    if until is None and not has_row:
        conn.execute(delete(address).where(address.c.id.in_(ids)))
        return
    last = address.c.vm_id if until is not None else None
    conn.execute(update(address).where(address.c.id.in_(ids)).values(vm_id=None, last_vm_id=last, free_from=until))


def keep(conn: Connection, vm_id: UUID, holder: UUID, *, now: datetime) -> None:
    """The VM's addresses stay taken, in the name of `holder`: what may be left of it on a host."""
    address_events.kept(conn, vm_id, holder, now)
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
    insert_ipv4_runs(conn, prefix_id, usable.runs())
