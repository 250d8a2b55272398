# SPDX-License-Identifier: Apache-2.0
"""What the networks in a VM's request mean: the prefixes that could give each address, before a host is chosen."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import datetime
from ipaddress import ip_network
from typing import Any

from sqlalchemy import Connection, Row, exists, func, or_, select

from ppec_contract.api_ipdb import NetworkWanted
from ppec_contract.errors import PpecError
from ppec_orchestrator.ipdb.ranges import Address, to_hex
from ppec_orchestrator.store.catalogue import not_found
from ppec_orchestrator.store.external_addresses import is_free
from ppec_orchestrator.store.fixed_addresses import Claim, containing, never_given, why_not
from ppec_orchestrator.store.places import Place
from ppec_orchestrator.store.serving import ServingPrefix, serving_a_host, serving_prefix
from ppec_orchestrator.store.tables import address, address_hold, prefix, vrf

# Addresses that are looked up in a statement.
_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class Requester:
    """Who asks: where its VM may go, as far as that is said by place, and the VM's name. `now` is when."""

    place: Place
    vm_name: str | None
    now: datetime


@dataclass(frozen=True, slots=True)
class Known:
    """What of the IPDB is looked up once for several VMs: the `rows` among which their prefixes are, and of the
    addresses that they ask for by number those that are anybody's, by prefix and number. Others may be had as well."""

    rows: Sequence[Row[Any]]
    free: Set[tuple[int, str]]


def known(conn: Connection, vrf_name: str | None, networks: Iterable[NetworkWanted], now: datetime) -> Known:
    """For VMs with these networks."""
    numbers = sorted({to_hex(int(one.address)) for one in networks if one.address is not None})
    # What is acquired for a prefix of NetBox's, or counted (IPv6), may be held back all the same.
    whole = (prefix.c.family == 4) & prefix.c.netbox_id.is_(None)
    query = select(address.c.prefix_id, address.c.address_hex).join(prefix, prefix.c.id == address.c.prefix_id)
    free: set[tuple[int, str]] = set()
    for start in range(0, len(numbers), _AT_ONCE):
        part = address.c.address_hex.in_(numbers[start : start + _AT_ONCE])
        free |= {(row.prefix_id, row.address_hex) for row in conn.execute(query.where(whole, part, is_free(now)))}
    return Known(_prefix_rows(conn, vrf_name), free)


def _prefix_rows(conn: Connection, vrf_name: str | None) -> Sequence[Row[Any]]:
    """Without a VRF's name those of every VRF count."""
    query = select(prefix).join(vrf, vrf.c.id == prefix.c.vrf_id).order_by(prefix.c.id)
    return conn.execute(query if vrf_name is None else query.where(vrf.c.name == vrf_name)).all()


def candidates(
    conn: Connection,
    networks: Sequence[NetworkWanted],
    requester: Requester,
    looked_up: Known | None = None,
) -> tuple[tuple[int, ...] | None, ...]:
    """For each network the ids of the prefixes that could give its address; None: whichever serve the host.

    Who asks for several VMs has `looked_up` what is `known`. Raises `prefix.not_found`, and for an address that no
    prefix would give the VM now what `fixed_addresses.take_fixed` raises.
    """
    if all(one.prefix is None and one.address is None for one in networks):
        return (None,) * max(len(networks), 1)
    at_hand = looked_up or Known(_prefix_rows(conn, requester.place.vrf), frozenset())
    return tuple(_candidates(conn, at_hand, one, requester) for one in networks)


def counted_free(
    conn: Connection,
    networks: Sequence[NetworkWanted],
    givers: Sequence[tuple[int, ...] | None],
    looked_up: Known | None = None,
) -> frozenset[Address]:
    """Of the addresses that networks with these `candidates` ask for by number, those that are counted as free in each
    of them. One is not where it is reserved for the VM, or where NetBox has yet to give it."""
    free = looked_up.free if looked_up else frozenset()
    pairs = zip(networks, givers, strict=False)
    return frozenset(
        one.address
        for one, ids in pairs
        if one.address is not None and _counted_free(conn, one.address, ids or (), free)
    )


def _counted_free(conn: Connection, wanted: Address, ids: Collection[int], free: Set[tuple[int, str]]) -> bool:
    number = to_hex(int(wanted))
    if all((prefix_id, number) in free for prefix_id in ids):
        return True
    held = exists().where(
        address_hold.c.prefix_id == prefix.c.id, address_hold.c.first_hex <= number, address_hold.c.last_hex >= number
    )
    acquired = exists().where(address.c.prefix_id == prefix.c.id, address.c.address_hex == number)
    counted = select(func.count()).where(prefix.c.id.in_(ids), ~held, or_(prefix.c.netbox_id.is_(None), acquired))
    return conn.execute(counted).scalar_one() == len(ids)


def _candidates(
    conn: Connection, at_hand: Known, wanted: NetworkWanted, requester: Requester
) -> tuple[int, ...] | None:
    if wanted.address is not None:
        return _givers(conn, at_hand, wanted, requester)
    if wanted.prefix is None:
        return None
    found = tuple(row.id for row in at_hand.rows if row.cidr == str(wanted.prefix))
    if not found:
        raise not_found("prefix", "prefix", str(wanted.prefix))
    return found


def _givers(conn: Connection, at_hand: Known, wanted: NetworkWanted, requester: Requester) -> tuple[int, ...]:
    assert wanted.address is not None
    around = [
        serving_prefix(row)
        for row in at_hand.rows
        if wanted.address in ip_network(row.cidr) and wanted.prefix in (None, ip_network(row.cidr))
    ]
    if not around:
        containing(around, wanted)  # raises, with the reason
    refused: dict[int, PpecError] = {}
    found: list[ServingPrefix] = []
    for one in around:
        why = _why_not(conn, one, wanted.address, requester, at_hand.free)
        if why is None:
            found.append(one)
        else:
            refused[one.prefix_id] = why
    if refused:
        _refuse(conn, found, refused, requester.place)
    return _ready(conn, found, wanted.address)


def _why_not(
    conn: Connection, one: ServingPrefix, wanted: Address, requester: Requester, free: Set[tuple[int, str]]
) -> PpecError | None:
    if wanted not in one.range:
        return never_given(one, wanted)
    if (one.prefix_id, to_hex(int(wanted))) in free:
        return None
    return why_not(conn, Claim(one, wanted, None, requester.vm_name, requester.now))


def _refuse(conn: Connection, found: Sequence[ServingPrefix], refused: Mapping[int, PpecError], place: Place) -> None:
    """Raises why the address can't be had, unless one of those `found` to give it serves a host: in a VRF without hosts
    the same address may be free, and be of no use to anybody."""
    serving = serving_a_host(conn, [*refused, *(one.prefix_id for one in found)], place)
    if any(one.prefix_id in serving for one in found):
        return
    reasons = [why for prefix_id, why in refused.items() if prefix_id in serving]
    if reasons:
        raise reasons[0]
    # Nobody there is served by any of them. If one could give it, planning counts whom it doesn't serve.
    if not found:
        raise next(iter(refused.values()))


def _ready(conn: Connection, found: Sequence[ServingPrefix], wanted: Address) -> tuple[int, ...]:
    """Of a prefix of NetBox's it can only be granted once it was acquired, as it is in one of them on the way here; a
    plan that is only shown acquires none."""
    outside = [one.prefix_id for one in found if one.external]
    rows = select(address.c.prefix_id).where(
        address.c.prefix_id.in_(outside), address.c.address_hex == to_hex(int(wanted))
    )
    acquired = set(conn.execute(rows).scalars()) if outside else set()
    ready = tuple(one.prefix_id for one in found if not one.external or one.prefix_id in acquired)
    return ready or tuple(outside)
