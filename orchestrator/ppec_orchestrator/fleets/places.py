# SPDX-License-Identifier: Apache-2.0
"""Where hosts stand, and where requests may go: no place is in two others, and none is named that isn't there."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields

from ppec_orchestrator.fleets.faults import FleetError, shown
from ppec_orchestrator.placement.fleet import Fleet, HostState
from ppec_orchestrator.placement.request import Profile, Where

# Each is in one of those after it.
_INSIDE = (("rack", "cluster"), ("cluster", "datacentre"), ("datacentre", "region"))
_WORDS = {"datacentre": "data centre", "vrf": "VRF"}
_SCOPES = tuple(each.name for each in fields(Where) if each.name not in ("labels", "without"))


class Places:
    """Checks hosts one by one. `called` has the format's own names of what hosts stand in. A place without a name is
    none: hosts may do without."""

    def __init__(self, called: Mapping[str, str] | None = None) -> None:
        self._called = called or {}
        self._outer: dict[tuple[str, str], tuple[str, str]] = {}
        self._seen: set[tuple[str, ...]] = set()

    def check(self, host: HostState, where: str) -> None:
        """Raises FleetError for a place that was in another one before."""
        stands = (host.rack, host.cluster, host.datacentre, host.region)
        if stands in self._seen:
            return
        self._seen.add(stands)
        for inner, outer in _INSIDE:
            name, around = getattr(host, inner), getattr(host, outer)
            first, at = self._outer.setdefault((inner, name), (around, where))
            if name and first != around:
                raise FleetError(
                    f"{where}.{self._called.get(inner, inner)}",
                    f"{self._word(inner)} {shown(name)} is in {self._word(outer)} {shown(around)}, "
                    f"and at {at} it is in {shown(first)}",
                )

    def _word(self, place: str) -> str:
        return self._called.get(place) or _WORDS.get(place, place)


def refuse_unknown_scope(profile: Profile, fleet: Fleet, where: str) -> None:
    """Raises FleetError where the profile's VMs may go to a place alone that no host stands in."""
    for place in _SCOPES:
        name = getattr(profile.where, place)
        known: Collection[str] = fleet.index if place == "host" else fleet.places[place]
        if name is not None and name not in known:
            raise FleetError(where, f"it is for {_WORDS.get(place, place)} {shown(name)} alone, where there is no host")


def refuse_unknown_hosts(names: Collection[str], fleet: Fleet, where: str) -> None:
    for index, name in enumerate(names):
        if name not in fleet.index:
            raise FleetError(f"{where}[{index}]", f"there is no host {shown(name)}")
