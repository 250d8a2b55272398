# SPDX-License-Identifier: Apache-2.0
"""What the networks in a VM's request mean: the prefixes that could give each address, before a host is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from ipaddress import ip_network
from typing import Any

from sqlalchemy import Connection, Row, select

from ppec_contract.api_ipdb import NetworkWanted
from ppec_contract.errors import PpecError
from ppec_orchestrator.ipdb.ranges import Address, to_hex
from ppec_orchestrator.store.catalogue import not_found
from ppec_orchestrator.store.fixed_addresses import Claim, containing, why_not
from ppec_orchestrator.store.serving import ServingPrefix, serving_prefix
from ppec_orchestrator.store.tables import address, prefix, vrf


def candidates(
    conn: Connection, networks: Sequence[NetworkWanted], *, vrf_name: str | None, vm_name: str | None, now: datetime
) -> tuple[tuple[int, ...] | None, ...]:
    """For each network the ids of the prefixes that could give its address; None: whichever serve the host.

    Without a VRF's name those of every VRF count. Raises `prefix.not_found`, and for an address that no prefix would
    give the VM now what `fixed_addresses.take_fixed` raises.
    """
    if all(one.prefix is None and one.address is None for one in networks):
        return (None,) * max(len(networks), 1)
    query = select(prefix).join(vrf, vrf.c.id == prefix.c.vrf_id).order_by(prefix.c.id)
    if vrf_name is not None:
        query = query.where(vrf.c.name == vrf_name)
    rows = conn.execute(query).all()
    return tuple(_candidates(conn, rows, one, vm_name, now) for one in networks)


def _candidates(
    conn: Connection, rows: Sequence[Row[Any]], wanted: NetworkWanted, vm_name: str | None, now: datetime
) -> tuple[int, ...] | None:
    if wanted.address is not None:
        return _givers(conn, rows, wanted, vm_name, now)
    if wanted.prefix is None:
        return None
    found = tuple(row.id for row in rows if row.cidr == str(wanted.prefix))
    if not found:
        raise not_found("prefix", "prefix", str(wanted.prefix))
    return found


def _givers(
    conn: Connection, rows: Sequence[Row[Any]], wanted: NetworkWanted, vm_name: str | None, now: datetime
) -> tuple[int, ...]:
    around = [serving_prefix(row) for row in rows if wanted.address in ip_network(row.cidr)]
    assert wanted.address is not None
    usable = [one for one in around if wanted.address in one.range and wanted.prefix in (None, one.range.network)]
    if not usable:
        containing(around, wanted)  # raises, with the reason
    refused: list[PpecError] = []
    found: list[ServingPrefix] = []
    for one in usable:
        why = why_not(conn, Claim(one, wanted.address, None, vm_name, now))
        if why is None:
            found.append(one)
        else:
            refused.append(why)
    if not found:
        raise refused[0]
    return _ready(conn, found, wanted.address)


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
