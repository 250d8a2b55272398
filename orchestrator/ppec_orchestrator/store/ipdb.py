# SPDX-License-Identifier: Apache-2.0
"""Grants and releases addresses within the caller's transaction, so that address and VM commit together or not at all.

IPv4 has a row per usable address and takes the lowest free ones; IPv6 counts upwards and writes a row per grant, whose
unique constraint is what makes it safe.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import ip_network
from itertools import islice
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, Select, bindparam, delete, func, insert, select, update

from ppec_contract.errors import PpecError
from ppec_orchestrator.ipdb.ranges import (
    MAX_COUNT,
    Address,
    AddressRange,
    Interface,
    to_address,
    to_hex,
    usable_range,
)
from ppec_orchestrator.store.tables import address, host, prefix, rack

_ROWS_PER_INSERT = 5000


@dataclass(frozen=True, slots=True)
class GrantedAddress:
    """One address of a VM, and all its NIC needs to use it. `vlan` None means untagged."""

    address: Interface
    prefix_id: int
    gateway: Address | None
    bridge: str
    vlan: int | None
    nameservers: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class ServingPrefix:
    """A prefix that serves a host."""

    prefix_id: int
    range: AddressRange
    bridge: str
    vlan: int | None
    nameservers: tuple[Address, ...]

    @property
    def family(self) -> int:
        return self.range.family

    def granted(self, address_hex: str) -> GrantedAddress:
        return GrantedAddress(
            address=self.range.interface(address_hex),
            prefix_id=self.prefix_id,
            gateway=self.range.gateway,
            bridge=self.bridge,
            vlan=self.vlan,
            nameservers=self.nameservers,
        )


def range_of(row: Row[Any]) -> AddressRange:
    """The usable range of a `prefix` row."""
    return _range(row.cidr, row.gateway, row.first, row.last)


# Reading addresses from text takes longer than reading the row.
@lru_cache(maxsize=4096)
def _range(cidr: str, gateway: str | None, first: str, last: str) -> AddressRange:
    return usable_range(ip_network(cidr), gateway=to_address(gateway), first=to_address(first), last=to_address(last))


def _serving(row: Row[Any]) -> ServingPrefix:
    nameservers = tuple(a for text in row.nameservers if (a := to_address(text)) is not None)
    return ServingPrefix(row.id, range_of(row), row.bridge, row.vlan, nameservers)


_SERVING = (
    select(host.c.id.label("host_id"), prefix)
    .join(rack, rack.c.id == host.c.rack_id)
    .join(
        prefix,
        (prefix.c.vrf_id == host.c.vrf_id)
        & (prefix.c.cluster_id == rack.c.cluster_id)
        & (prefix.c.rack_id.is_(None) | (prefix.c.rack_id == host.c.rack_id)),
    )
    .where(host.c.id.in_(bindparam("ids", expanding=True)))
    .order_by(host.c.id, prefix.c.rack_id.is_(None), prefix.c.id)
)


def prefixes_serving(conn: Connection, host_ids: Iterable[int]) -> dict[int, tuple[ServingPrefix, ...]]:
    """The prefixes of each host's VRF that serve its cluster, its rack's own first; an empty tuple if none does."""
    ids = list(host_ids)
    rows = conn.execute(_SERVING, {"ids": ids})
    found: dict[int, list[ServingPrefix]] = {host_id: [] for host_id in ids}
    known: dict[int, ServingPrefix] = {}
    for row in rows:
        if row.id not in known:
            known[row.id] = _serving(row)
        found[row.host_id].append(known[row.id])
    return {host_id: tuple(prefixes) for host_id, prefixes in found.items()}


def grant(conn: Connection, hosts: Mapping[UUID, int], *, wait: bool = True) -> None:
    """Gives each VM (by id, with its host's) one IPv4 address, if an IPv4 prefix serves the host, and one IPv6 address
    likewise. Without `wait`, what another transaction holds locked counts as taken.

    Raises `address.exhausted` when a family that serves a host can't give one to every VM; the caller then rolls back.
    """
    serving = prefixes_serving(conn, set(hosts.values()))
    for family, take in ((4, _grant_ipv4), (6, _grant_ipv6)):
        groups: dict[tuple[ServingPrefix, ...], list[UUID]] = defaultdict(list)
        for vm_id, host_id in hosts.items():
            groups[tuple(p for p in serving[host_id] if p.family == family)].append(vm_id)
        groups.pop((), None)
        if groups:
            take(conn, dict(sorted(groups.items(), key=lambda item: item[0][0].prefix_id)), wait)


_Groups = Mapping[tuple[ServingPrefix, ...], Sequence[UUID]]


_GRANT_LOWEST = (
    update(address)
    .where(
        address.c.id
        == select(address.c.id)
        .where(address.c.prefix_id == bindparam("which"), address.c.vm_id.is_(None))
        .order_by(address.c.address_hex)
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )
    .values(vm_id=bindparam("owner"))
)


def _grant_ipv4(conn: Connection, groups: _Groups, wait: bool) -> None:
    """The first prefix has enough, as a rule: one statement for all VMs tries that."""
    tries = [{"which": prefixes[0].prefix_id, "owner": vm_id} for prefixes, ids in groups.items() for vm_id in ids]
    if conn.execute(_GRANT_LOWEST, tries).rowcount == len(tries):
        return
    served = [p.prefix_id for prefixes in groups for p in prefixes]
    rows = conn.execute(
        select(address.c.vm_id).where(
            address.c.vm_id.in_([each["owner"] for each in tries]), address.c.prefix_id.in_(served)
        )
    )
    got = set(rows.scalars())
    for prefixes, ids in groups.items():
        left = [vm_id for vm_id in ids if vm_id not in got]
        for one in prefixes:
            left = left[_take_ipv4(conn, one, left, wait) :] if left else left
        if left:
            raise _exhausted(prefixes, len(ids), len(left))


def _grant_ipv6(conn: Connection, groups: _Groups, wait: bool) -> None:
    firsts: dict[int, ServingPrefix] = {}
    wanted: dict[int, list[UUID]] = defaultdict(list)
    for prefixes, ids in groups.items():
        firsts[prefixes[0].prefix_id] = prefixes[0]
        wanted[prefixes[0].prefix_id] += ids
    got = _next_ipv6(conn, firsts, wanted, wait)
    for prefixes, ids in groups.items():
        left = [vm_id for vm_id in ids if vm_id not in got]
        for one in prefixes:
            left = left[_take_ipv6(conn, one, left, wait) :] if left else left
        if left:
            raise _exhausted(prefixes, len(ids), len(left))


def _next_ipv6(
    conn: Connection, prefixes: Mapping[int, ServingPrefix], wanted: Mapping[int, Sequence[UUID]], wait: bool
) -> set[UUID]:
    """Each prefix's next numbers for the VMs wanted there, in a few statements for all; which VMs got one. A prefix
    whose next numbers are taken, as happens in a small one, gives none here."""
    locked = conn.execute(_counters(wait), {"ids": sorted(prefixes)}).all()
    windows: dict[int, list[int]] = {}
    for row in locked:
        one = prefixes[row.id].range
        start = int(row.next_hex, 16) if row.next_hex else int(one.first)
        windows[row.id] = one.window(start, len(wanted[row.id]))
    hexes = {to_hex(number) for window in windows.values() for number in window}
    occupied = select(address.c.prefix_id).where(
        address.c.prefix_id.in_(list(windows)), address.c.address_hex.in_(hexes)
    )
    taken = set(conn.execute(occupied).scalars())
    found = {
        which: window for which, window in windows.items() if which not in taken and len(window) == len(wanted[which])
    }
    if found:
        ends = [{"which": which, "next": to_hex(window[-1] + 1)} for which, window in found.items()]
        conn.execute(_COUNT_ON, ends)
        rows = [
            {"prefix_id": which, "address_hex": to_hex(number), "vm_id": vm_id}
            for which, window in found.items()
            for number, vm_id in zip(window, wanted[which], strict=True)
        ]
        conn.execute(insert(address), rows)
    return {vm_id for which in found for vm_id in wanted[which]}


def _counters(wait: bool) -> Select[Any]:
    """By id, locked: two transactions that take prefixes in the same order can't wait for each other."""
    statement = select(prefix.c.id, prefix.c.next_hex).where(prefix.c.id.in_(bindparam("ids", expanding=True)))
    return statement.order_by(prefix.c.id).with_for_update(skip_locked=not wait)


_COUNT_ON = update(prefix).where(prefix.c.id == bindparam("which")).values(next_hex=bindparam("next"))


def _exhausted(prefixes: Sequence[ServingPrefix], wanted: int, missing: int) -> PpecError:
    names = ", ".join(str(p.range.network) for p in prefixes)
    return PpecError(
        "address.exhausted",
        f"{wanted} IPv{prefixes[0].family} addresses wanted, {wanted - missing} free in {names}",
        hint="Add a prefix for this VRF and cluster, or delete VMs.",
        subject=names,
        details={"wanted": wanted, "missing": missing, "family": prefixes[0].family},
    )


def _take_ipv4(conn: Connection, one: ServingPrefix, vm_ids: Sequence[UUID], wait: bool) -> int:
    """Up to one address per VM, lowest first; how many there were."""
    free = (
        select(address.c.id, address.c.address_hex)
        .where(address.c.prefix_id == one.prefix_id, address.c.vm_id.is_(None))
        .order_by(address.c.address_hex)
        .limit(len(vm_ids))
    )
    rows = conn.execute(free.with_for_update(skip_locked=True)).all()
    if wait and len(rows) < len(vm_ids) and conn.dialect.name == "postgresql":
        # What others hold locked may yet be rolled back: wait for them rather than refuse while an address is free.
        # Rows they do take drop out while we wait, so look again until a look loses none.
        while len(rows) < (seen := len(conn.execute(free).all())):
            rows = conn.execute(free.with_for_update()).all()
            if len(rows) == seen:
                break
    if rows:
        statement = update(address).where(address.c.id == bindparam("row")).values(vm_id=bindparam("owner"))
        pairs = zip(rows, vm_ids, strict=False)
        conn.execute(statement, [{"row": row.id, "owner": vm_id} for row, vm_id in pairs])
    return len(rows)


def _take_ipv6(conn: Connection, one: ServingPrefix, vm_ids: Sequence[UUID], wait: bool) -> int:
    """Up to one address per VM, counting upwards; how many there were. The lock on the prefix's row makes its grants
    one after another."""
    locked = conn.execute(
        select(prefix.c.id, prefix.c.next_hex).where(prefix.c.id == one.prefix_id).with_for_update(skip_locked=not wait)
    ).one_or_none()
    if locked is None:
        return 0  # deleted since it was read, or not to be waited for
    wanted = min(len(vm_ids), _ipv6_left(conn, one))
    found: list[int] = []
    start = int(locked.next_hex, 16) if locked.next_hex else int(one.range.first)
    while len(found) < wanted:
        window = one.range.window(start, len(vm_ids) + 1)
        hexes = [to_hex(number) for number in window]
        taken = set(
            conn.execute(
                select(address.c.address_hex).where(
                    address.c.prefix_id == one.prefix_id, address.c.address_hex.in_(hexes)
                )
            ).scalars()
        )
        free = [number for number in window if to_hex(number) not in taken and number not in found]
        found += free[: wanted - len(found)]
        start = found[-1] + 1 if len(found) == wanted else window[-1] + 1
    if found:
        conn.execute(update(prefix).where(prefix.c.id == one.prefix_id).values(next_hex=to_hex(start)))
        rows = [
            {"prefix_id": one.prefix_id, "address_hex": to_hex(number), "vm_id": vm_id}
            for number, vm_id in zip(found, vm_ids, strict=False)
        ]
        conn.execute(insert(address), rows)
    return len(found)


def _ipv6_left(conn: Connection, one: ServingPrefix) -> int:
    """A lower bound of what is free. Counted only where somebody could have used it up."""
    if one.range.size > MAX_COUNT:
        return MAX_COUNT
    counted = select(func.count()).select_from(address).where(address.c.prefix_id == one.prefix_id)
    return one.range.size - conn.execute(counted).scalar_one()


def release(conn: Connection, vm_ids: Iterable[UUID]) -> int:
    """Takes back whatever addresses the VMs have; returns how many those were."""
    ids = list(vm_ids)
    ipv6 = select(prefix.c.id).where(prefix.c.family == 6)
    gone = conn.execute(delete(address).where(address.c.vm_id.in_(ids), address.c.prefix_id.in_(ipv6)))
    freed = conn.execute(update(address).where(address.c.vm_id.in_(ids)).values(vm_id=None))
    return gone.rowcount + freed.rowcount


def used_counts(conn: Connection) -> dict[int, int]:
    """Addresses given out, per prefix that has given out any."""
    rows = conn.execute(
        select(address.c.prefix_id, func.count()).where(address.c.vm_id.is_not(None)).group_by(address.c.prefix_id)
    )
    return dict(rows.all())


def free_counts(conn: Connection) -> dict[int, int]:
    """Free addresses of every prefix; capped at 2**53, which only IPv6 reaches."""
    used = used_counts(conn)
    return {row.id: min(range_of(row).size - used.get(row.id, 0), MAX_COUNT) for row in conn.execute(select(prefix))}


def addresses_of(conn: Connection, vm_ids: Iterable[UUID]) -> dict[UUID, tuple[GrantedAddress, ...]]:
    """What each VM holds, IPv4 first; VMs without an address are left out."""
    rows = conn.execute(
        select(address.c.vm_id, address.c.address_hex, prefix)
        .join(prefix, prefix.c.id == address.c.prefix_id)
        .where(address.c.vm_id.in_(list(vm_ids)))
        .order_by(prefix.c.family, address.c.address_hex)
    )
    found: dict[UUID, list[GrantedAddress]] = defaultdict(list)
    for row in rows:
        found[row.vm_id].append(_serving(row).granted(row.address_hex))
    return {vm_id: tuple(addresses) for vm_id, addresses in found.items()}


def insert_ipv4_rows(conn: Connection, prefix_id: int, usable: AddressRange) -> None:
    """The free rows of a new IPv4 prefix."""
    hexes = usable.hexes()
    while chunk := list(islice(hexes, _ROWS_PER_INSERT)):
        conn.execute(insert(address), [{"prefix_id": prefix_id, "address_hex": text} for text in chunk])
