# SPDX-License-Identifier: Apache-2.0
"""Which prefixes serve a host, and what a VM is told with an address of one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from ipaddress import ip_network
from typing import Any

from sqlalchemy import Connection, Row, and_, bindparam, join, or_, select

from ppec_orchestrator.ipdb.ranges import Address, AddressRange, Interface, Run, to_address, usable_range
from ppec_orchestrator.store.places import Place
from ppec_orchestrator.store.tables import address_hold, cluster, datacentre, host, prefix, rack


@dataclass(frozen=True, slots=True)
class GrantedAddress:
    """One address of a VM, and all its NIC needs to use it. `vlan` None means untagged.

    `position` is the place of the network it was granted for in the VM's request.
    """

    address: Interface
    prefix_id: int
    gateway: Address | None
    bridge: str
    vlan: int | None
    nameservers: tuple[Address, ...]
    position: int = 0

    @property
    def order(self) -> tuple[int, int, int]:
        """IPv4 first, then as asked for: of each family, the first one's gateway is the VM's."""
        return self.address.version, self.position, int(self.address.ip)


@dataclass(frozen=True, slots=True)
class ServingPrefix:
    """A prefix that serves a host."""

    prefix_id: int
    range: AddressRange
    bridge: str
    vlan: int | None
    nameservers: tuple[Address, ...]
    # Its addresses come from NetBox: those acquired have rows, of either family.
    external: bool = False

    @property
    def family(self) -> int:
        return self.range.family

    @property
    def has_rows(self) -> bool:
        """What it can give has rows, and is taken from them; else it is counted upwards."""
        return self.family == 4 or self.external

    def granted(self, address_hex: str, position: int = 0) -> GrantedAddress:
        return GrantedAddress(
            address=self.range.interface(address_hex),
            prefix_id=self.prefix_id,
            gateway=self.range.gateway,
            bridge=self.bridge,
            vlan=self.vlan,
            nameservers=self.nameservers,
            position=position,
        )


def range_of(row: Row[Any], held: tuple[Run, ...] = ()) -> AddressRange:
    """The usable range of a `prefix` row."""
    usable = _range(row.cidr, row.gateway, row.first, row.last)
    return replace(usable, held=held) if held else usable


# Reading addresses from text takes longer than reading the row.
@lru_cache(maxsize=4096)
def _range(cidr: str, gateway: str | None, first: str, last: str) -> AddressRange:
    return usable_range(ip_network(cidr), gateway=to_address(gateway), first=to_address(first), last=to_address(last))


def serving_prefix(row: Row[Any]) -> ServingPrefix:
    """Of a row that has the columns of `prefix`."""
    nameservers = tuple(a for text in row.nameservers if (a := to_address(text)) is not None)
    return ServingPrefix(row.id, range_of(row), row.bridge, row.vlan, nameservers, row.netbox_id is not None)


_HELD = (
    select(address_hold.c.prefix_id, address_hold.c.first_hex, address_hold.c.last_hex)
    .where(address_hold.c.prefix_id.in_(bindparam("ids", expanding=True)))
    .order_by(address_hold.c.prefix_id, address_hold.c.first_hex)
)


def held_runs(conn: Connection, prefix_ids: Collection[int]) -> dict[int, tuple[Run, ...]]:
    """What is held back of each prefix, in order; prefixes of which nothing is are left out."""
    found: dict[int, list[Run]] = defaultdict(list)
    for row in conn.execute(_HELD, {"ids": list(prefix_ids)}):
        found[row.prefix_id].append((int(row.first_hex, 16), int(row.last_hex, 16)))
    return {prefix_id: tuple(runs) for prefix_id, runs in found.items()}


_OF_CLUSTER = and_(
    prefix.c.cluster_id == rack.c.cluster_id, or_(prefix.c.rack_id.is_(None), prefix.c.rack_id == host.c.rack_id)
)
_WITH_HOSTS = (
    join(host, rack, rack.c.id == host.c.rack_id)
    .join(cluster, cluster.c.id == rack.c.cluster_id)
    .join(datacentre, datacentre.c.id == cluster.c.datacentre_id)
    .join(prefix, and_(prefix.c.vrf_id == host.c.vrf_id, or_(_OF_CLUSTER, prefix.c.region == datacentre.c.region)))
)
_SERVING = (
    select(host.c.id.label("host_id"), prefix)
    .select_from(_WITH_HOSTS)
    .where(host.c.id.in_(bindparam("ids", expanding=True)))
    .order_by(host.c.id, prefix.c.rack_id.is_(None), prefix.c.cluster_id.is_(None), prefix.c.id)
)


def prefixes_serving(conn: Connection, host_ids: Iterable[int]) -> dict[int, tuple[ServingPrefix, ...]]:
    """The prefixes of each host's VRF that serve it: its rack's own first, then its cluster's, then its region's; an
    empty tuple if none does. What is held back of them, who grants must look up under the prefix's lock."""
    ids = list(host_ids)
    found: dict[int, list[ServingPrefix]] = {host_id: [] for host_id in ids}
    known: dict[int, ServingPrefix] = {}
    for row in conn.execute(_SERVING, {"ids": ids}):
        if row.id not in known:
            known[row.id] = serving_prefix(row)
        found[row.host_id].append(known[row.id])
    return {host_id: tuple(prefixes) for host_id, prefixes in found.items()}


def serving_a_host(conn: Connection, prefix_ids: Collection[int], place: Place) -> set[int]:
    """Those of the prefixes that serve any of the hosts there."""
    found = select(prefix.c.id).select_from(_WITH_HOSTS).where(prefix.c.id.in_(prefix_ids), *place.conditions())
    return set(conn.execute(found.distinct()).scalars())
