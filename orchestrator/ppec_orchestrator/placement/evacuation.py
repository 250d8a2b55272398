# SPDX-License-Identifier: Apache-2.0
"""Whether what is lost with a host, or a rack, can restart elsewhere (N+1), in exact NUMA terms.

>>> evacuations(fleet, Level.HOST)[0]
Evacuation(domain='h1', level=<Level.HOST: 'host'>, cluster='c1', seats={vm_id: ('h2', (0,)), …}, without_place=())

A VM restarts in the cluster it was lost in, on a live host that doesn't drain, passes its profile's filters, is of the
same VRF and served by every prefix that served the lost host: it keeps its addresses, and so needs no free ones. It
takes of that host what its profile says, on what is free there while everybody else stays in place. Hard groups are
kept with those who stay and among those who move; soft ones are let go.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from uuid import UUID

import numpy as np

from ppec_orchestrator.placement.cell_by_cell import MOST_KINDS, Free, Kind, fill
from ppec_orchestrator.placement.demand import CELL_RESOURCES
from ppec_orchestrator.placement.fleet import Fleet, IntArray, SeatedVm
from ppec_orchestrator.placement.havens import Evacuee, Havens
from ppec_orchestrator.placement.plan import Evacuation, Exposed
from ppec_orchestrator.placement.request import Group, Level
from ppec_orchestrator.placement.room_for_all import too_many
from ppec_orchestrator.placement.seats import HostSeat, Room
from ppec_orchestrator.placement.workspace import Workspace

# How many hosts an exact search looks at before it gives up. All of a small cluster's ways are fewer.
MOST_LOOKS = 8000
# Of more VMs than this no search would come to an end.
MOST_SEARCHED = 48
# To fill cells (`filling.py`): asked for many domains, and again and again where the answer is no.
MOST_STEPS = 20_000


@dataclass(frozen=True, slots=True)
class Claim:
    """Room that one VM would have elsewhere."""

    evacuee: Evacuee
    row: int
    seat: HostSeat


# By the row of the host they are on.
Claims = Mapping[int, tuple[Claim, ...]]
NO_CLAIMS: Claims = {}


@dataclass(frozen=True, slots=True)
class Shelter:
    """Where a domain's VMs would go, and those that have no place: all it takes to say whether the domain is safe."""

    claims: Claims
    without_place: tuple[Evacuee, ...] = ()


def evacuations(fleet: Fleet, level: Level) -> tuple[Evacuation, ...]:
    """What the loss of each host (or rack) that has VMs would lead to, each alone; by cluster, then name."""
    workspace = Workspace(fleet)
    havens = Havens(workspace)
    found = []
    for (cluster, name), rows in sorted(domains(fleet, level).items()):
        evacuees = evacuees_of(fleet, rows)
        if not evacuees:
            continue
        shelter = find_shelter(havens, frozenset(rows), evacuees)
        without = tuple(each.vm for each in shelter.without_place)
        found.append(Evacuation(name, level, cluster, seats_in(fleet, shelter.claims), without))
    return tuple(found)


def seats_in(fleet: Fleet, claims: Claims) -> dict[UUID, tuple[str, tuple[int, ...]]]:
    """By VM, the name of its host and the numbers of its cells there."""
    return {
        claim.evacuee.vm.vm_id: (host.name, tuple([host.cells[column].cell for column in claim.seat.columns]))
        for row, here in claims.items()
        for host in (fleet.hosts[row],)
        for claim in here
    }


def exposed(fleet: Fleet, level: Level) -> tuple[Exposed, ...]:
    """The hosts (or racks) of the whole fleet whose loss would leave VMs without a place."""
    lost = (each for each in evacuations(fleet, level) if each.without_place)
    return tuple(exposure(each.domain, level, each.cluster, each.without_place) for each in lost)


def exposure(domain: str, level: Level, cluster: str, without_place: Sequence[SeatedVm]) -> Exposed:
    return Exposed(domain, level, cluster, min(vm.name for vm in without_place), len(without_place))


def domains(fleet: Fleet, level: Level) -> dict[tuple[str, str], list[int]]:
    """The rows of hosts that are lost together, by cluster and the host's or rack's name."""
    if level not in (Level.HOST, Level.RACK):
        raise ValueError(f"N+1 is about the loss of a host or a rack, not of a {level.value}")
    found: dict[tuple[str, str], list[int]] = {}
    for row, host in enumerate(fleet.hosts):
        found.setdefault((host.cluster, fleet.domain(row, level)), []).append(row)
    return found


def evacuees_of(fleet: Fleet, rows: Iterable[int]) -> tuple[Evacuee, ...]:
    return tuple(Evacuee(vm, row) for row in rows for vm in fleet.hosts[row].vms)


def find_shelter(
    havens: Havens, lost: AbstractSet[int], evacuees: Sequence[Evacuee], kept: Claims = NO_CLAIMS
) -> Shelter:
    """Places for VMs that are lost with the hosts in the rows `lost`, beside those whose claims are `kept`.

    Largest first. Each takes the first host that has room, and domains begin to look at different hosts, so that a
    placement touches few evacuations. Where that fails all are placed again, each on the tightest host; then by filling
    cell after cell. Where that is no way, as some take several cells, are of hard groups or of too many kinds, every
    way is tried at last, of few enough VMs and up to `MOST_LOOKS` hosts looked at."""
    ordered = sorted(evacuees, key=_size)
    nearest = _Attempt(havens, lost, kept).place(ordered)
    if not nearest.without_place:
        return nearest
    everybody = sorted([*ordered, *(claim.evacuee for claims in kept.values() for claim in claims)], key=_size)
    # Somebody whom nobody could take in even alone: no order of the others helps.
    if any(not len(havens.open_rows(each, lost)) for each in everybody):
        return nearest
    tightest = _Attempt(havens, lost, tight=True).place(everybody)
    if not tightest.without_place:
        return tightest
    best = min(nearest, tightest, key=lambda shelter: len(shelter.without_place))
    return _search(havens, lost, everybody) or best


def _search(havens: Havens, lost: AbstractSet[int], everybody: Sequence[Evacuee]) -> Shelter | None:
    """A place for each, where one is found."""
    rows = np.unique(np.concatenate([havens.open_rows(each, lost) for each in everybody]))
    if too_many(havens.workspace, [havens.of(each.vm.profile).seating.fitting for each in everybody], rows):
        return None
    choosy = [each for each in everybody if _minds_others(each)]
    first = _Attempt(havens, lost, tight=True).place(choosy)
    if not first.without_place:
        shelter, begun = _fill(havens, lost, [each for each in everybody if not _minds_others(each)], first.claims)
        # What filling has begun and given up, a search VM by VM was never seen to find, and takes as long again.
        if shelter is not None or (begun and not choosy):
            return shelter
    if len(everybody) > MOST_SEARCHED:
        return None
    return _Search(havens, lost, everybody).run()


def _minds_others(evacuee: Evacuee) -> bool:
    """How many cells it takes, or where it may stand, depends on who is there."""
    vm = evacuee.vm
    return vm.profile.shape.numa.multi_cell or any(group.hard for group in vm.groups)


def _size(evacuee: Evacuee) -> tuple[int, int, int, str]:
    shape = evacuee.vm.profile.shape
    return (-shape.vcpus, -shape.memory_mib, -shape.disk_mib, evacuee.vm.name)


def _fill(
    havens: Havens, lost: AbstractSet[int], evacuees: Sequence[Evacuee], claims: Claims
) -> tuple[Shelter | None, bool]:
    """Cell by cell, beside those who have claims; and whether that was tried at all, or seen to be impossible."""
    kinds = [(each.vm.profile, havens.home(each.row)) for each in evacuees]
    of_kinds = dict(zip(kinds, evacuees, strict=True))
    if len(of_kinds) > MOST_KINDS:
        return None, False
    found = []
    for evacuee in of_kinds.values():
        stands = np.zeros(len(havens.workspace.fleet.hosts), dtype=np.bool_)
        stands[havens.open_rows(evacuee, lost)] = True
        found.append(Kind(havens.of(evacuee.vm.profile).seating.fitting, stands))
    free = _free_beside(havens.workspace, claims, {each.vm.profile.shape.pool for each in evacuees})
    filled = fill(free, kinds, found, MOST_STEPS)
    if filled.seats is None:
        return None, filled.impossible or filled.steps > 0
    all_claims = dict(claims)
    for evacuee, (row, columns) in zip(evacuees, filled.seats, strict=True):
        part = havens.of(evacuee.vm.profile).seating.part(row, columns[0])
        all_claims[row] = (*all_claims.get(row, ()), Claim(evacuee, row, HostSeat(columns, part or ())))
    return Shelter(all_claims), True


def _free_beside(workspace: Workspace, claims: Claims, pools: AbstractSet[str]) -> Free:
    free = {resource: workspace.free[resource].copy() for resource in CELL_RESOURCES}
    disk = {pool: workspace.disk(pool).copy() for pool in pools}
    for claim in (claim for here in claims.values() for claim in here):
        for index, amount in claim.seat.part:
            free[CELL_RESOURCES[index]][claim.row, list(claim.seat.columns)] -= amount
        shape = claim.evacuee.vm.profile.shape
        if shape.pool in disk:
            disk[shape.pool][claim.row] -= shape.disk_mib
    return Free(free, disk)


class _Attempt:
    """One after the other, never taken back. Rooms are copied as they are looked at."""

    def __init__(
        self, havens: Havens, lost: AbstractSet[int], kept: Claims = NO_CLAIMS, *, tight: bool = False
    ) -> None:
        self.havens, self.lost = havens, lost
        self._tight = tight
        self._rooms: dict[int, Room] = {}
        self.claims: dict[int, tuple[Claim, ...]] = dict(kept)
        # Members of hard groups by the number of their host, rack or data centre; read when first asked for.
        self._counts: dict[tuple[str, Level], IntArray] = {}

    def place(self, evacuees: Iterable[Evacuee]) -> Shelter:
        without = tuple(evacuee for evacuee in evacuees if not self._place(evacuee))
        return Shelter(self.claims, without)

    def _place(self, evacuee: Evacuee) -> bool:
        havens = self.havens
        seating = havens.of(evacuee.vm.profile).seating
        order = havens.by_tightness if self._tight else havens.in_turn
        for row in order(evacuee, self.allowed(evacuee, havens.open_rows(evacuee, self.lost))):
            seat = seating.best(self.room(row), row)
            if seat is not None:
                self.claim(Claim(evacuee, row, seat))
                return True
        return False

    def room(self, row: int) -> Room:
        found = self._rooms.get(row)
        if found is None:
            found = self._rooms[row] = Room(self.havens.workspace, row)
            for claim in self.claims.get(row, ()):
                found.use(claim.seat, claim.evacuee.vm.profile.shape)
        return found

    def claim(self, claim: Claim) -> None:
        self.room(claim.row).use(claim.seat, claim.evacuee.vm.profile.shape)
        self.claims[claim.row] = (*self.claims.get(claim.row, ()), claim)
        self._count(claim, 1)

    def unclaim(self, claim: Claim) -> None:
        """The latest one of its host."""
        self.room(claim.row).use(claim.seat, claim.evacuee.vm.profile.shape, -1)
        self.claims[claim.row] = self.claims[claim.row][:-1]
        self._count(claim, -1)

    # --- hard groups -----------------------------------------------------------------------------------------------

    def allowed(self, evacuee: Evacuee, rows: IntArray) -> IntArray:
        """Those of the rows in which its hard groups let it stand."""
        for group in evacuee.vm.groups:
            if group.hard:
                counts = self._counts_of(group)
                there = counts[self._domain_of(group.level)[rows]]
                if group.apart:
                    rows = rows[there == 0]
                elif counts.any():
                    rows = rows[there > 0]
        return rows

    def _counts_of(self, group: Group) -> IntArray:
        """Of its members, but for those who are lost and have no place yet: how many by domain."""
        key = (group.name, group.level)
        if key not in self._counts:
            members, domain_of = self.havens.workspace.groups.members(group.name), self._domain_of(group.level)
            counts = self._counts[key] = self.havens.members.counts(group).copy()
            for row in self.lost & members.keys():
                counts[domain_of[row]] -= members[row]
            for claim in (claim for claims in self.claims.values() for claim in claims):
                if any(each.name == group.name for each in claim.evacuee.vm.groups):
                    counts[domain_of[claim.row]] += 1
        return self._counts[key]

    def _count(self, claim: Claim, by: int) -> None:
        names = {group.name for group in claim.evacuee.vm.groups} if self._counts else ()
        for (name, level), counts in self._counts.items():
            if name in names:
                counts[self._domain_of(level)[claim.row]] += by

    def _domain_of(self, level: Level) -> IntArray:
        return self.havens.members.domain_of(level)


class _Search:
    """Every way there is, the largest VM first. Hosts that are alike, and states met before, are tried once, unless
    hard groups tell them apart."""

    def __init__(self, havens: Havens, lost: AbstractSet[int], evacuees: Sequence[Evacuee]) -> None:
        self._evacuees = evacuees
        self._attempt = _Attempt(havens, lost)
        self._open = [havens.open_rows(evacuee, lost) for evacuee in evacuees]
        self._seatings = [havens.of(evacuee.vm.profile).seating for evacuee in evacuees]
        self._looks = MOST_LOOKS
        self._grouped = any(group.hard for evacuee in evacuees for group in evacuee.vm.groups)
        open_to = [set(rows.tolist()) for rows in self._open]
        # Which VMs may come to a row at all: rows of one pattern that have the same free are one choice.
        self._pattern = {row: tuple(row in mine for mine in open_to) for row in set[int]().union(*open_to)}
        self._dead: set[object] = set()

    def run(self) -> Shelter | None:
        found = self._from(0)
        return Shelter({row: claims for row, claims in self._attempt.claims.items() if claims}) if found else None

    def _from(self, index: int) -> bool:
        if index == len(self._evacuees):
            return True
        state = None if self._grouped else (index, self._state())
        if state in self._dead:
            return False
        evacuee, seating = self._evacuees[index], self._seatings[index]
        for row in self._unlike(index):
            for seat in list(seating.seats(self._attempt.room(row), row)):
                if self._looks <= 0:
                    return False
                claim = Claim(evacuee, row, seat)
                self._attempt.claim(claim)
                if self._from(index + 1):
                    return True
                self._attempt.unclaim(claim)
        if state is not None:
            self._dead.add(state)
        return False

    def _unlike(self, index: int) -> Iterator[int]:
        seen = set()
        for row in self._attempt.allowed(self._evacuees[index], self._open[index]).tolist():
            self._looks -= 1
            alike: object = row
            if not self._grouped:
                needs = id(self._seatings[index].needs(row))
                alike = (needs, self._pattern[row], self._attempt.room(row).key())
            if alike not in seen:
                seen.add(alike)
                yield row

    def _state(self) -> frozenset[tuple[int, object]]:
        return frozenset((row, self._attempt.room(row).key()) for row, claims in self._attempt.claims.items() if claims)
