# SPDX-License-Identifier: Apache-2.0
"""N+1 while a plan is made: for each host (or rack) of the clusters that it touches a *witness*, an evacuation that
would do as things stand, kept current placement by placement.

A placement concerns the witness of its own domain, which has one VM more to find a place for; those that claim room on
its host, of which only the claims there can be in its way; and with hard groups, those that move a member of one of
them, of which only the claims can be that are too near the new member, or too far from it. Whichever of these still
holds is left alone; of the others only the claims in question are placed again before all of them are. So a domain
without a witness has none that `evacuation.py` could find.

A domain without a witness is left aside until the plan's end, also where a VM that comes is one that its own have to
stand with, and so opens a way out.

Witnesses outlive a plan: what the plan changed is taken back with it. So a cluster is looked at before anything is
placed there; and before the plan begins, where members stand of its VMs' hard groups.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from ppec_orchestrator.placement.evacuation import (
    Claim,
    Claims,
    Shelter,
    domains,
    evacuees_of,
    exposure,
    find_shelter,
    seats_in,
)
from ppec_orchestrator.placement.fleet import Fleet, SeatedVm
from ppec_orchestrator.placement.groups import hard_names
from ppec_orchestrator.placement.havens import Evacuee, Havens
from ppec_orchestrator.placement.plan import Evacuation, Exposed
from ppec_orchestrator.placement.request import Group, Level, Profile, Spare
from ppec_orchestrator.placement.seats import HostSeat, Room
from ppec_orchestrator.placement.workspace import Workspace

# What is made of N+1 in the cluster of this name.
ModeOf = Callable[[str], Spare]


@dataclass(frozen=True, slots=True)
class _State:
    """Of a domain: its VMs, and where they would go. `names` are those of their hard groups."""

    evacuees: tuple[Evacuee, ...]
    shelter: Shelter
    names: frozenset[str]

    @property
    def safe(self) -> bool:
        return not self.shelter.without_place


class Whose(Enum):
    """VMs that would have no place: those of the domain that a VM comes to, or those of another."""

    OWN = "own"
    OTHERS = "others"


class Witnesses:
    """Those of one workspace and level. A domain is an index; one whose state is None has not been looked at."""

    def __init__(self, workspace: Workspace, level: Level) -> None:
        self.level = level
        self._workspace = workspace
        self._fleet = workspace.fleet
        self._era = workspace.era
        self._havens = Havens(workspace)
        self._domains = domains(self._fleet, level)
        self._names = list(self._domains)
        self._rows = [frozenset(rows) for rows in self._domains.values()]
        self._domain_of = {row: index for index, rows in enumerate(self._rows) for row in rows}
        self._of_cluster: dict[str, list[int]] = {}
        for index, (cluster, _) in enumerate(self._names):
            self._of_cluster.setdefault(cluster, []).append(index)
        self._states: list[_State | None] = [None] * len(self._rows)
        # The domains that claim room on a row's host; and those with members of a hard group.
        self._claiming: dict[int, set[int]] = {}
        self._moving: dict[str, set[int]] = {}
        # What the plan changed, with what was there before; and the hard groups that it placed members of.
        self._journal: list[tuple[int, _State | None]] = []
        self._grown: set[str] = set()

    # --- looking ---------------------------------------------------------------------------------------------------

    def look_at_for_good(self, cluster: str) -> None:
        """Finds a witness for each of the cluster's domains that was not looked at yet. It outlives the plan: nothing
        may have been placed there, nor beside members of its groups elsewhere."""
        for index in self._of_cluster.get(cluster, ()):
            if self._states[index] is None:
                found = self._found(index, evacuees_of(self._fleet, sorted(self._rows[index])))
                if found.names & self._grown:
                    raise LookupError(f"cluster {cluster} is looked at too late: its groups have grown")
                self._write(index, found)

    def look_at_members_for_good(self, names: Iterable[str], mode_of: ModeOf) -> set[str]:
        """Looks at the clusters with members of these groups, of those that have a rule, and says which: a new one
        anywhere may be in the way of theirs."""
        members = {row for name in names for row in self._workspace.groups.members(name)}
        clusters = {self._fleet.hosts[row].cluster for row in members}
        ruled = {cluster for cluster in clusters if mode_of(cluster) is not Spare.OFF}
        for cluster in sorted(ruled):
            self.look_at_for_good(cluster)
        return ruled

    def safe(self, row: int) -> bool:
        """Whether everything that would be lost with the host in this row has a place. Its cluster was looked at."""
        state = self._states[self._domain_of[row]]
        return state is not None and state.safe

    def seats(self, profile: Profile, row: int) -> Iterator[HostSeat]:
        """All that a VM could have there now."""
        return self._havens.of(profile).seating.seats(Room(self._workspace, row), row)

    def exposed_rows(self, cluster: str) -> list[int]:
        """The hosts of domains without a witness."""
        unsafe = [index for index in self._of_cluster[cluster] if not self._is_safe(index)]
        return [row for index in unsafe for row in self._rows[index]]

    def exposed(self, cluster: str) -> list[Exposed]:
        """Domains without a witness, by name."""
        found = []
        for index in self._of_cluster[cluster]:
            state = self._states[index]
            if state is not None and not state.safe:
                without = [each.vm for each in state.shelter.without_place]
                found.append(exposure(self._names[index][1], self.level, cluster, without))
        return sorted(found, key=lambda each: each.domain)

    def evacuations(self, cluster: str) -> Iterator[Evacuation]:
        """The witnesses of the domains that have VMs. Of one without, nobody keeps the claims current."""
        for index in self._of_cluster[cluster]:
            state = self._known(index)
            without = tuple(each.vm for each in state.shelter.without_place)
            if state.evacuees:
                seats = {} if without else seats_in(self._fleet, state.shelter.claims)
                yield Evacuation(self._names[index][1], self.level, cluster, seats, without)

    # --- the plan goes on, and back --------------------------------------------------------------------------------

    def placed(self, vm: SeatedVm, row: int, mode_of: ModeOf) -> Whose | None:
        """The workspace has this VM on the host in `row` now: are all domains safe that were, and its own, where that
        is required? None if so; the first that is not is answer enough. Clusters without a rule are passed over."""
        own = self._domain_of[row]
        names = hard_names(vm.groups)
        self._grown |= names
        concerned = self._concerned(vm.groups, row) - {own}
        mode = mode_of(self._names[own][0])
        if mode is not Spare.OFF and not self._join(own, Evacuee(vm, row)) and mode is Spare.REQUIRED:
            return Whose.OWN
        for index in sorted(concerned):
            mode = mode_of(self._names[index][0])
            if mode is not Spare.OFF and not self._mend(index, row, names) and mode is Spare.REQUIRED:
                return Whose.OTHERS
        return None

    def home(self, row: int) -> tuple[Hashable, ...]:
        """The same for hosts that are lost together and whose VMs can restart on the same hosts. Unlike `Havens.home`,
        it names the domain too."""
        host = self._fleet.hosts[row]
        return (self._domain_of[row], host.vrf, host.prefixes)

    def _concerned(self, groups: Iterable[Group], row: int) -> set[int]:
        """The domains whose claims may be in the way of a VM of these groups on the host in `row`: those that claim
        room there, and those that move a member. Of a group whose members stand on a host each, the first alone."""
        found = set(self._claiming.get(row, ()))
        for group in groups:
            if group.hard and not (group.apart and group.level is Level.HOST):
                found |= self._moving.get(group.name, set())
        return found

    def mark(self) -> int:
        return len(self._journal)

    def back_to(self, mark: int) -> None:
        """Everything is as it was when `mark` was made, and so is the workspace, or will be."""
        while len(self._journal) > mark:
            index, before = self._journal.pop()
            self._write(index, before)
        if not self._journal:
            self._grown.clear()

    def follow(self) -> None:
        """The workspace's fleet is another one now, of the same hosts; no plan is under way."""
        self._havens.forget()
        before, self._fleet = self._fleet, self._workspace.fleet
        if before is self._fleet:
            return
        if self._era != self._workspace.era:
            raise ValueError("the workspace was loaded anew: what was worked out for it is void")
        changed = [
            row for row, (old, new) in enumerate(zip(before.hosts, self._fleet.hosts, strict=True)) if old is not new
        ]
        if not changed:
            return
        clusters = {self._fleet.hosts[row].cluster for row in changed}
        names = {name for row in changed for fleet in (before, self._fleet) for name in _names_on(fleet, row)}
        again = {index for row in changed for index in (self._domain_of[row], *self._claiming.get(row, ()))}
        # What had no place may have one now.
        again |= {index for cluster in clusters for index in self._of_cluster[cluster] if not self._is_safe(index)}
        again |= {index for name in names for index in self._moving.get(name, ())}
        for index in again:
            self._write(index, None)

    # --- one domain ------------------------------------------------------------------------------------------------

    def _join(self, index: int, evacuee: Evacuee) -> bool:
        """One more VM that would be lost with this domain."""
        state = self._known(index)
        evacuees = (*state.evacuees, evacuee)
        names = state.names | hard_names(evacuee.vm.groups)
        if not state.safe:
            shelter = Shelter(state.shelter.claims, (*state.shelter.without_place, evacuee))
            self._set_for_the_plan(index, _State(evacuees, shelter, names))
            return False
        shelter = find_shelter(self._havens, self._rows[index], (evacuee,), state.shelter.claims)
        self._set_for_the_plan(index, _State(evacuees, shelter, names))
        return not shelter.without_place

    def _mend(self, index: int, row: int, names: frozenset[str]) -> bool:
        """Whether the domain is as safe as it was, now that there is less on the host in `row`, and one more member of
        these groups."""
        state = self._known(index)
        if not state.safe:
            return True
        claims = state.shelter.claims
        homeless = [] if not names else self._beside(index, claims, row, names)
        here = claims.get(row, ())
        if here and not self._hold(row, here):
            homeless += [claim.evacuee for claim in here if claim.evacuee not in homeless]
        if not homeless:
            return True
        shelter = find_shelter(self._havens, self._rows[index], homeless, _without(claims, homeless))
        self._set_for_the_plan(index, _State(state.evacuees, shelter, state.names))
        return not shelter.without_place

    def _beside(self, index: int, claims: Claims, row: int, names: frozenset[str]) -> list[Evacuee]:
        """Those who can't go where they would have gone, now that a member of these groups stands in `row`."""
        moving = [c for each in claims.values() for c in each if hard_names(c.evacuee.vm.groups) & names]
        return [claim.evacuee for claim in moving if not self._may_stay(index, claim, row, names)]

    def _may_stay(self, index: int, claim: Claim, row: int, names: frozenset[str]) -> bool:
        for group in claim.evacuee.vm.groups:
            if not group.hard or group.name not in names:
                continue
            domain_of = self._havens.members.domain_of(group.level)
            with_it = domain_of[claim.row] == domain_of[row]
            if with_it if group.apart else not (with_it or self._stand_in(index, group, claim.row)):
                return False
        return True

    def _stand_in(self, index: int, group: Group, row: int) -> bool:
        """Whether members of the group stand in the domain of this row, besides those who are lost with `index`."""
        domain_of, members = self._havens.members.domain_of(group.level), self._workspace.groups.members(group.name)
        lost = sum(members[r] for r in self._rows[index] & members.keys() if domain_of[r] == domain_of[row])
        return bool(self._havens.members.counts(group)[domain_of[row]] > lost)

    def _hold(self, row: int, claims: Sequence[Claim]) -> bool:
        room = Room(self._workspace, row)
        for claim in claims:
            room.use(claim.seat, claim.evacuee.vm.profile.shape)
        return not room.overdrawn()

    def _found(self, index: int, evacuees: tuple[Evacuee, ...]) -> _State:
        names = frozenset(name for each in evacuees for name in hard_names(each.vm.groups))
        return _State(evacuees, find_shelter(self._havens, self._rows[index], evacuees), names)

    def _known(self, index: int) -> _State:
        state = self._states[index]
        if state is None:
            raise LookupError(f"cluster {self._names[index][0]} was not looked at")
        return state

    def _is_safe(self, index: int) -> bool:
        state = self._states[index]
        return state is not None and state.safe

    def _set_for_the_plan(self, index: int, state: _State) -> None:
        """Until the plan is taken back (`back_to`)."""
        self._journal.append((index, self._states[index]))
        self._write(index, state)

    def _write(self, index: int, state: _State | None) -> None:
        """Outlives the plan: all but what the journal takes back."""
        before = self._states[index]
        old = before.shelter.claims if before is not None else {}
        new = state.shelter.claims if state is not None else {}
        for row in old.keys() - new.keys():
            self._claiming[row].discard(index)
        for row in new.keys() - old.keys():
            self._claiming.setdefault(row, set()).add(index)
        for name in before.names if before is not None else ():
            self._moving[name].discard(index)
            if not self._moving[name]:
                del self._moving[name]
        for name in state.names if state is not None else ():
            self._moving.setdefault(name, set()).add(index)
        self._states[index] = state


def _without(claims: Claims, homeless: Sequence[Evacuee]) -> dict[int, tuple[Claim, ...]]:
    gone = {id(each) for each in homeless}
    left = {row: tuple(claim for claim in each if id(claim.evacuee) not in gone) for row, each in claims.items()}
    return {row: each for row, each in left.items() if each}


def _names_on(fleet: Fleet, row: int) -> frozenset[str]:
    return frozenset(name for vm in fleet.hosts[row].vms for name in hard_names(vm.groups))
