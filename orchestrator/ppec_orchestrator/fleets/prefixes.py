# SPDX-License-Identifier: Apache-2.0
"""Which prefixes a snapshot knows: its hosts and profiles refer to no others, since what isn't counted never ends.

A file that lists prefixes lists all of them, those without a bound without a count. One that lists none counts none:
its prefixes are those of its hosts.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from ppec_orchestrator.fleets.faults import FleetError, shown
from ppec_orchestrator.fleets.snapshot_rows import FleetRow, HostRow, ProfileRow
from ppec_orchestrator.placement.fleet import Fleet, HostState
from ppec_orchestrator.placement.request import Profile


def refuse_unknown_prefixes(document: FleetRow) -> None:
    """Raises FleetError."""
    rows = document["hosts"]
    listed = {prefix["id"] for prefix in document.get("prefixes", ())}
    if listed:
        _refuse_on_hosts(rows, listed)
    served = (prefix for row in rows for family in row.get("prefixes", ()) for prefix in family)
    refuse_unknown_networks(document.get("profiles", ()), listed or set(served))


def refuse_unknown_networks(profiles: Iterable[ProfileRow], known: Container[int]) -> None:
    """Raises FleetError where a profile wants an address of a prefix that isn't known, counted or by number."""
    for index, row in enumerate(profiles):
        for number, network in enumerate(row.get("networks", ())):
            _refuse_others(network or (), known, f"profiles[{index}].networks[{number}]")
        for number, prefixes in enumerate(row.get("fixed", ())):
            _refuse_others(prefixes, known, f"profiles[{index}].fixed[{number}]")


def prefixes_of(fleet: Fleet, profiles: Iterable[Profile]) -> set[int]:
    """All that a fleet and these profiles speak of."""
    return {*fleet.free_addresses, *_served(fleet.hosts), *_wanted(profiles)}


def prefix_rows(fleet: Fleet, profiles: Iterable[Profile]) -> list[Mapping[str, Any]]:
    """All of them, or none where none is counted and none is asked for by its id."""
    known = {*fleet.free_addresses, *_wanted(profiles)}
    if not known:
        return []
    counts = fleet.free_addresses
    return [
        {"id": prefix, "free_addresses": counts[prefix]} if prefix in counts else {"id": prefix}
        for prefix in sorted(known | _served(fleet.hosts))
    ]


def _refuse_on_hosts(rows: Sequence[HostRow], listed: set[int]) -> None:
    for index, row in enumerate(rows):
        for number, family in enumerate(row.get("prefixes", ())):
            _refuse_others(family, listed, f"hosts[{index}].prefixes[{number}]")


def _refuse_others(prefixes: Sequence[int], known: Container[int], where: str) -> None:
    for index, prefix in enumerate(prefixes):
        if prefix not in known:
            raise FleetError(f"{where}[{index}]", f"there is no prefix {shown(prefix)}")


def _served(hosts: Iterable[HostState]) -> set[int]:
    # Hosts of one rack and VRF have the same, and there are few of those.
    return {prefix for prefixes in {host.prefixes for host in hosts} for prefix in chain(*prefixes)}


def _wanted(profiles: Iterable[Profile]) -> set[int]:
    networks = chain.from_iterable((*profile.networks, *profile.fixed) for profile in profiles)
    return {prefix for network in networks for prefix in network or ()}
