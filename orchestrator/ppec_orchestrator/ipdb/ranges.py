# SPDX-License-Identifier: Apache-2.0
"""The usable addresses of a prefix.

Never given out: the network address (for IPv6 the subnet-router anycast address, RFC 4291 2.6.1), the IPv4 broadcast
address, the gateway, what lies outside first..last, and what is held back. /31 (RFC 3021) and /127 (RFC 6164) have two
usable addresses, /32 and /128 one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
    ip_address,
    ip_network,
)
from typing import Final

from ppec_contract.errors import PpecError

Address = IPv4Address | IPv6Address
Interface = IPv4Interface | IPv6Interface
Network = IPv4Network | IPv6Network
# First and last number of some addresses that follow one another.
Run = tuple[int, int]

# One row is kept per IPv4 address, so a prefix's rows must stay a number a database inserts in seconds.
MAX_IPV4_ADDRESSES: Final = 2**16
# Special purposes (RFC 6890) that keep addresses from an interface of a VM's; of two that overlap the smaller first.
# Private, shared (RFC 6598), documentation, benchmarking and unique local ones are addresses like any other.
_NOT_FOR_VMS: Final = tuple(
    (ip_network(text), purpose)
    for text, purpose in (
        ("0.0.0.0/8", "unspecified"),
        ("127.0.0.0/8", "loopback"),
        ("169.254.0.0/16", "link-local"),
        ("224.0.0.0/4", "multicast"),
        ("240.0.0.0/4", "reserved"),
        ("::/128", "unspecified"),
        ("::1/128", "loopback"),
        ("::ffff:0:0/96", "IPv4-mapped"),
        ("::/8", "reserved"),
        ("fe80::/10", "link-local"),
        ("ff00::/8", "multicast"),
    )
)


def complement(run: Run, blocked: Iterable[Run]) -> Iterator[Run]:
    """What of `run` is outside of the `blocked` runs, which may overlap but come in order; ascending."""
    low, high = run
    for begin, end in blocked:
        if begin > high:
            break
        if begin > low:
            yield low, begin - 1
        low = max(low, end + 1)
    if low <= high:
        yield low, high


@dataclass(frozen=True, slots=True)
class AddressRange:
    """What may be given out: `first`..`last` inclusive, less the gateway and the `held` runs, which are in order."""

    network: Network
    first: Address
    last: Address
    gateway: Address | None
    held: tuple[Run, ...] = ()

    @property
    def family(self) -> int:
        return self.network.version

    @property
    def size(self) -> int:
        """How many addresses there are in all, held or not (exact, however large)."""
        return int(self.last) - int(self.first) + 1 - (1 if self._gateway_inside() else 0)

    def _gateway_inside(self) -> bool:
        return self.gateway is not None and int(self.first) <= int(self.gateway) <= int(self.last)

    def __contains__(self, address: Address) -> bool:
        """Whether it is one of those counted by `size`."""
        inside = address.version == self.family and self.first <= address <= self.last  # type: ignore[operator]
        return inside and address != self.gateway

    def role_of(self, address: Address) -> str | None:
        """What an address of the network is that is never given out, whatever `first` and `last` are."""
        if address == self.gateway:
            return "gateway"
        if self.network.prefixlen >= self.network.max_prefixlen - 1:
            return None
        if address == self.network.network_address:
            return "network address" if self.family == 4 else "subnet-router anycast address"
        return "broadcast address" if self.family == 4 and address == self.network.broadcast_address else None

    def count(self, run: Run) -> int:
        """How many of these addresses lie in the run."""
        low, high = max(run[0], int(self.first)), min(run[1], int(self.last))
        gateway = self.gateway is not None and self._gateway_inside() and low <= int(self.gateway) <= high
        return max(high - low + 1, 0) - (1 if gateway else 0)

    def hexes(self) -> Iterator[str]:
        """Every usable address in the database's form, ascending. For IPv4 only: IPv6 ranges don't end."""
        for number in range(int(self.first), int(self.last) + 1):
            if self.gateway is None or number != int(self.gateway):
                yield to_hex(number)

    def runs(self, taken: Iterable[int] = ()) -> Iterator[Run]:
        """What is free to be given out when those numbers are taken, ascending."""
        gateway = [int(self.gateway)] if self.gateway is not None and self._gateway_inside() else []
        blocked = [*self.held, *((number, number) for number in (*gateway, *taken))]
        return complement((int(self.first), int(self.last)), sorted(blocked))

    def beyond(self, other: AddressRange) -> list[Run]:
        """What this one gives out and the other doesn't, whatever is held back; ascending."""
        theirs = list(replace(other, held=()).runs())
        return [left for run in replace(self, held=()).runs() for left in complement(run, theirs)]

    def clamped(self, run: Run) -> Run | None:
        """From the first to the last of these addresses that lie in the run; None: it has none."""
        low, high = run
        mine = [one for one in replace(self, held=()).runs() if one[0] <= high and one[1] >= low]
        return (max(low, mine[0][0]), min(high, mine[-1][1])) if mine else None

    def window(self, start: int, count: int) -> list[int]:
        """Up to `count` numbers to give out from `start` upwards, going on at `first` after `last`; none twice."""
        before = list(self.runs())
        after = [(max(low, start), high) for low, high in before if high >= start]
        again = [(low, min(high, start - 1)) for low, high in before if low < start]
        found: list[int] = []
        for low, high in (*after, *again):
            found.extend(range(low, min(high, low + count - len(found) - 1) + 1))
            if len(found) == count:
                break
        return found

    def interface(self, address_hex: str) -> Interface:
        """The address with its prefix length, as a NIC is configured with it."""
        text = f"{from_hex(address_hex, self.family)}/{self.network.prefixlen}"
        return IPv4Interface(text) if self.family == 4 else IPv6Interface(text)


def usable_range(
    network: Network, *, gateway: Address | None = None, first: Address | None = None, last: Address | None = None
) -> AddressRange:
    """The range of a prefix as an operator gave it; raises `prefix.invalid` with what is wrong."""
    for name, value in (("gateway", gateway), ("first", first), ("last", last)):
        if value is not None and getattr(value, "scope_id", None):
            raise _invalid(network, f"{name} {value} names a zone, which only means something on one machine")
        if value is not None and value not in network and not (name == "gateway" and _link_local(network, value)):
            raise _invalid(network, f"{name} {value} is not in it")
    low, high = _edges(network)
    begin = max(low, int(first)) if first is not None else low
    end = min(high, int(last)) if last is not None else high
    if begin > end:
        raise _invalid(network, "no address lies between first and last")
    if network.version == 4 and end - begin + 1 > MAX_IPV4_ADDRESSES:
        raise _invalid(network, f"{end - begin + 1} addresses are more than {MAX_IPV4_ADDRESSES}")
    kind = IPv4Address if network.version == 4 else IPv6Address
    found = AddressRange(network, kind(begin), kind(end), gateway)
    if found.size == 0:
        raise _invalid(network, "its only address is the gateway")
    return found


def check_purpose(network: Network) -> None:
    """Raises `prefix.invalid` for a network with addresses that no VM could use. Not part of `usable_range`: a prefix
    that is there already goes on as it is."""
    for special, purpose in _NOT_FOR_VMS:
        if special.version == network.version and network.overlaps(special):
            raise PpecError(
                "prefix.invalid",
                f"prefix {network}: {special} is {purpose}, and no VM could use an address of it",
                hint="Choose addresses of your own, private (RFC 1918) or unique local (RFC 4193) ones.",
                subject=f"prefix {network}",
            )


def check_gateway(network: Network, gateway: Address | None) -> None:
    """Raises `prefix.invalid` for the network and broadcast address, which nobody can have. An IPv6 router has the
    subnet-router anycast address besides its own. Not part of `usable_range`, for the same reason."""
    if gateway is None or network.version == 6 or network.prefixlen >= network.max_prefixlen - 1:
        return
    for edge, role in ((network.network_address, "network"), (network.broadcast_address, "broadcast")):
        if gateway == edge:
            raise _invalid(network, f"gateway {gateway} is its {role} address")


def check_nameservers(network: Network, nameservers: Iterable[Address]) -> None:
    """Raises `prefix.invalid` for addresses that no name server can have."""
    for one in nameservers:
        limited = one == IPv4Address("255.255.255.255")
        directed = one == network.broadcast_address and network.version == 4 and network.prefixlen <= 30
        role = "unspecified" if one.is_unspecified else "multicast" if one.is_multicast else ""
        if role or limited or directed:
            raise _invalid(network, f"name server {one} is {role or 'a broadcast address'}")


def _edges(network: Network) -> tuple[int, int]:
    low, high = int(network.network_address), int(network.broadcast_address)
    if network.prefixlen >= network.max_prefixlen - 1:
        return low, high
    return low + 1, high - 1 if network.version == 4 else high


def _link_local(network: Network, gateway: Address) -> bool:
    """IPv6 routers are commonly reached by a link-local address."""
    return network.version == 6 and gateway.version == 6 and gateway.is_link_local


def _invalid(network: Network, why: str) -> PpecError:
    return PpecError(
        "prefix.invalid",
        f"prefix {network}: {why}",
        hint="Choose gateway, first and last inside the prefix, and IPv4 prefixes of /16 or smaller.",
        subject=f"prefix {network}",
    )


def to_hex(number: int) -> str:
    return f"{number:032x}"


def from_hex(text: str, family: int) -> Address:
    number = int(text, 16)
    return IPv4Address(number) if family == 4 else IPv6Address(number)


def to_address(text: str | None) -> Address | None:
    return ip_address(text) if text is not None else None
