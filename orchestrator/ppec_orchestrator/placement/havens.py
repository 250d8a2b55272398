# SPDX-License-Identifier: Apache-2.0
"""Which hosts could take in a VM that lost its own, were it the only one: by profile, and by where it stood.

For N+1 what `candidates.py` is for a batch. Only whether a host would do is kept: no scores, for no policy has a say;
and no addresses, for a VM that restarts keeps its own."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np

from ppec_orchestrator.placement.filters import STANDING
from ppec_orchestrator.placement.fleet import BoolArray, IntArray, Rows, SeatedVm, at
from ppec_orchestrator.placement.request import Group, Level, Profile, Where
from ppec_orchestrator.placement.seats import Seating
from ppec_orchestrator.placement.workspace import Workspace

# Profiles that are remembered before all are forgotten: in one plan, and from plan to plan. Each takes up to 300 kB on
# five thousand hosts.
MOST_KNOWN, MOST_KEPT = 512, 256
# Objects that are known to be such a profile.
MOST_OBJECTS = 65536
# Groups whose members are counted before all are forgotten.
MOST_COUNTED = 256
Home = tuple[str, str, frozenset[int]]


@dataclass(frozen=True, slots=True)
class Evacuee:
    """A VM that is lost with the host in this row."""

    vm: SeatedVm
    row: int


def seated_profile(profile: Profile, vrf: str) -> Profile:
    """What is still known of a VM once it stands, and all that a restart has to keep to: it may come to any place of
    the host's VRF, whatever part of the fleet it was asked for. As its record has it (`store/seated.py`)."""
    return Profile(profile.shape, profile.architecture, Where(vrf=vrf))


class Haven:
    """One profile's: `fits` are the hosts that could take such a VM now, kept current row by row."""

    def __init__(self, workspace: Workspace, profile: Profile) -> None:
        self.seating = Seating(workspace.fleet, profile.shape)
        self._workspace = workspace
        passes = [host_filter(workspace.fleet, profile) for _, host_filter in STANDING]
        self._standing: BoolArray = np.logical_and.reduce(passes)
        self._seen = workspace.moment
        self._fits = self._work_out(None)

    def fits(self) -> BoolArray:
        if self._seen != self._workspace.moment:
            changed = self._workspace.changed_since(self._seen)
            self._seen = self._workspace.moment
            if changed is None:
                self._fits = self._work_out(None)
            else:
                rows = np.array(list(changed), dtype=np.int64)
                self._fits[rows] = self._work_out(rows)
        return self._fits

    def _work_out(self, rows: Rows) -> BoolArray:
        workspace, shape = self._workspace, self.seating.shape
        enough: BoolArray = self.seating.fitting.parts(workspace.free, rows) > 0
        enough &= at(self._standing, rows)
        enough &= at(workspace.disk(shape.pool), rows) >= shape.disk_mib
        return enough


class Members:
    """How many members a group has by domain (of its level), numbered: read once for all who ask between two changes
    of the workspace."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._domain_of: dict[Level, IntArray] = {}
        self._counts: dict[tuple[str, Level], IntArray] = {}
        self._moment = workspace.moment

    def domain_of(self, level: Level) -> IntArray:
        """The number of each row's domain."""
        if level not in self._domain_of:
            fleet, numbers = self._workspace.fleet, dict[str, int]()
            names = (fleet.domain(row, level) for row in range(len(fleet.hosts)))
            found = (numbers.setdefault(name, len(numbers)) for name in names)
            self._domain_of[level] = np.fromiter(found, dtype=np.int64, count=len(fleet.hosts))
        return self._domain_of[level]

    def counts(self, group: Group) -> IntArray:
        """By number of the domain; not to be changed."""
        if self._moment != self._workspace.moment or len(self._counts) >= MOST_COUNTED:
            self._moment = self._workspace.moment
            self._counts.clear()
        key = (group.name, group.level)
        if key not in self._counts:
            domain_of, members = self.domain_of(group.level), self._workspace.groups.members(group.name)
            counts = self._counts[key] = np.zeros(int(domain_of.max(initial=-1)) + 1, dtype=np.int64)
            if members:
                np.add.at(counts, domain_of[list(members)], list(members.values()))
        return self._counts[key]


class Havens:
    """Of all profiles. Good as long as the workspace is of the same `era`."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._of: dict[Profile, Haven] = {}
        # Hashing a profile takes longer than all else here: looked up by identity, and kept, so that ids stay theirs.
        self._known: dict[int, tuple[Profile, Haven]] = {}
        self._around: dict[Home, BoolArray] = {}
        self._home_of: dict[int, BoolArray] = {}
        self.members = Members(workspace)

    def of(self, profile: Profile) -> Haven:
        known = self._known.get(id(profile))
        if known is not None:
            return known[1]
        if len(self._known) >= MOST_OBJECTS:
            self._known.clear()
        haven = self._of.get(profile)
        if haven is None:
            self._forget_beyond(MOST_KNOWN - 1)
            haven = self._of[profile] = Haven(self.workspace, profile)
        self._known[id(profile)] = (profile, haven)
        return haven

    def forget(self) -> None:
        """Between plans: what need not be kept for the next one."""
        self._forget_beyond(MOST_KEPT)

    def _forget_beyond(self, most: int) -> None:
        if len(self._of) > most:
            self._of.clear()
            self._known.clear()

    def open_rows(self, evacuee: Evacuee, lost: AbstractSet[int]) -> IntArray:
        """Ascending."""
        there: BoolArray = self.of(evacuee.vm.profile).fits() & self._same_home(evacuee.row)
        there[list(lost)] = False
        return np.flatnonzero(there)

    def home(self, row: int) -> Home:
        """What decides, beside its profile, where a VM that is lost with the host in `row` may come to."""
        host = self.workspace.fleet.hosts[row]
        return host.cluster, host.vrf, frozenset(prefix for family in host.prefixes for prefix in family)

    def in_turn(self, evacuee: Evacuee, rows: IntArray) -> Iterator[int]:
        """`rows` in a circle, beginning as far along in them as its own host is in the fleet. So VMs of different
        domains come to different hosts first, and claim room on different ones."""
        start = evacuee.row * len(rows) // len(self.workspace.fleet.hosts)
        yield from rows[start:].tolist()
        yield from rows[:start].tolist()

    def by_tightness(self, evacuee: Evacuee, rows: IntArray) -> Iterator[int]:
        """Those with the least CPUs left in all their cells first, then the least memory."""
        fitting, free = self.of(evacuee.vm.profile).seating.fitting, self.workspace.free
        cpus, memory = (fitting.usable(free, each, rows) for each in (fitting.cpu, fitting.memory))
        yield from rows[np.lexsort((memory, cpus))].tolist()

    def _same_home(self, row: int) -> BoolArray:
        """Hosts of the same cluster and VRF, with all prefixes that serve the host in `row`."""
        found = self._home_of.get(row)
        if found is not None:
            return found
        hosts = self.workspace.fleet.hosts
        home = cluster, vrf, prefixes = self.home(row)
        if home not in self._around:
            mask = np.zeros(len(hosts), dtype=np.bool_)
            for near in self.workspace.fleet.places["cluster"][cluster].tolist():
                other = hosts[near]
                served = {prefix for family in other.prefixes for prefix in family}
                mask[near] = other.vrf == vrf and prefixes <= served
            self._around[home] = mask
        self._home_of[row] = self._around[home]
        return self._around[home]
