# SPDX-License-Identifier: Apache-2.0
"""Free space as people look at it: the networks that some free addresses make up. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from heapq import nsmallest
from ipaddress import IPv4Network, IPv6Network

from ppec_orchestrator.ipdb.ranges import Network, Run, complement


def networks_of(run: Run, family: int) -> Iterator[Network]:
    """The fewest networks that are exactly this run, ascending.

    >>> [str(one) for one in networks_of((0x0A000002, 0x0A000007), 4)]
    ['10.0.0.2/31', '10.0.0.4/30']
    """
    bits = 32 if family == 4 else 128
    kind = IPv4Network if family == 4 else IPv6Network
    low, high = run
    while low <= high:
        # The largest block that begins here, by alignment and by what is left.
        aligned = bits if low == 0 else (low & -low).bit_length() - 1
        size = min(aligned, (high - low + 1).bit_length() - 1)
        yield kind((low, bits - size))
        low += 1 << size


def largest_networks(runs: Iterable[Run], family: int, most: int) -> list[Network]:
    """Of the networks that the runs make up, the `most` largest; largest first, then ascending."""
    found = (one for run in runs for one in networks_of(run, family))
    return nsmallest(most, found, key=lambda one: (one.prefixlen, int(one.network_address)))


def uncovered(within: Network, covered: Iterable[Network]) -> Iterator[Network]:
    """The networks within a network that none of the others covers, ascending. Those of the other family don't
    count."""
    mine = sorted(
        (int(one.network_address), int(one.broadcast_address)) for one in covered if one.version == within.version
    )
    whole = (int(within.network_address), int(within.broadcast_address))
    for run in complement(whole, mine):
        yield from networks_of(run, within.version)
