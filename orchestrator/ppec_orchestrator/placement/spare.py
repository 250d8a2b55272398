# SPDX-License-Identifier: Apache-2.0
"""N+1 in one batch: where a rule requires it, places are turned away; where it warns, somebody looks on.

The rules may be about both levels, and in some clusters alone (`spare_rules.py`). Of each level there are witnesses
(`witnesses.py`), and a VM may stand where all of them are satisfied.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from ppec_orchestrator.placement.fleet import Fleet, IntArray, SeatedVm
from ppec_orchestrator.placement.groups import hard_names
from ppec_orchestrator.placement.havens import seated_profile
from ppec_orchestrator.placement.plan import Evacuation, Exposed
from ppec_orchestrator.placement.request import Group, Level, Profile, Spare, VmRequest
from ppec_orchestrator.placement.spare_rules import SpareRules
from ppec_orchestrator.placement.witnesses import Whose, Witnesses

# How many places of one VM are tried before it is refused: hosts, and on each the cells that differ.
MOST_PLACES = 256


class Objection(NamedTuple):
    """What is lost by a placement where that is ruled out: the loss of one host, or rack, could not be made good any
    more."""

    level: Level
    whose: Whose


class SpareGuard:
    """All rules in one batch. `witnesses` are of the levels that the rules are about."""

    def __init__(self, witnesses: Sequence[Witnesses], rules: SpareRules, fleet: Fleet) -> None:
        self._fleet = fleet
        self._rules = rules
        self._levels = {each.level: _LevelGuard(each, rules, fleet) for each in witnesses}
        self._profiles: dict[tuple[int, str], Profile] = {}
        # Rows closed to all that are alike. A place that would break a rule goes on doing so, for room gets less.
        self._closed: dict[tuple[int, tuple[Group, ...]], set[int]] = {}

    def begin(self, vms: Sequence[VmRequest]) -> None:
        """Nothing of the batch is placed yet: its last moment to look at what a member of a group may disturb from
        afar. All other clusters are looked at when the first VM comes to them."""
        for guard in self._guards:
            guard.begin(vms)

    def closed(self, vm: VmRequest) -> IntArray | None:
        """The rows that the rules have closed to the VM so far; None for none."""
        closed = self._closed.get((id(vm.profile), vm.groups))
        return np.fromiter(closed, dtype=np.int64, count=len(closed)) if closed else None

    def close(self, vm: VmRequest, row: int) -> None:
        """The VM was turned away there, or has no seat there that was not."""
        rows = self._closed.setdefault((id(vm.profile), vm.groups), set())
        rows.add(row)
        for guard in self._guards:
            rows.update(guard.closed_beside(row))

    def may_stand(self, row: int) -> bool:
        """Whether what the host is lost with is safe, before anything is placed there; that is asked first."""
        # Asked of all of them: each has to look before something is placed.
        safe = [guard.may_stand(row) for guard in self._guards]
        return all(safe)

    def seats(self, vm: VmRequest, row: int, columns: Sequence[int]) -> Iterator[Sequence[int]]:
        """The cells chosen; then, where a rule requires N+1, as many others. Nothing may be taken when the next is
        asked for."""
        yield columns
        if not self._rules.required_in(self._fleet.hosts[row].cluster):
            return
        for seat in next(iter(self._guards)).witnesses.seats(vm.profile, row):
            if len(seat.columns) > len(columns):
                return
            if seat.columns != tuple(columns):
                yield seat.columns

    def admit(self, vm: VmRequest, row: int, columns: Sequence[int]) -> Objection | None:
        """The VM has been given room on this host: None if it may stay. If not, the witnesses are as they were
        before."""
        return self._placed(vm, row, columns, to_stay=True)

    def objection(self, vm: VmRequest, row: int, columns: Sequence[int]) -> Objection | None:
        """As `admit`, and the witnesses are as they were before in any case."""
        return self._placed(vm, row, columns, to_stay=False)

    def turn_away(self, profile: Profile, row: int, columns: Sequence[int], objection: Objection) -> None:
        """Remembers that a VM of this profile and of no group was not admitted, so that others like it are not
        tried."""
        self._levels[objection.level].turn_away(profile, row, columns, objection.whose)

    def turned_away(self, vm: VmRequest, row: int, columns: Sequence[int] | None = None) -> bool:
        """Whether one like it, and no larger, was turned away there without being of any group. Then so is this one:
        groups never make places, and room only gets less. Without `columns`: whatever cells it would have."""
        return any(guard.turned_away(vm, row, columns) for guard in self._guards)

    def reopen(self) -> None:
        """VMs were moved on a host: what was closed for want of a cell may be open."""
        self._closed.clear()
        for guard in self._guards:
            guard.turned.clear()

    def exposed(self) -> tuple[Exposed, ...]:
        """In the clusters that the plan touched."""
        return tuple(chain.from_iterable(guard.exposed() for guard in self._guards))

    def evacuations(self) -> tuple[Evacuation, ...]:
        """Those that the plan relied on, as it leaves them."""
        return tuple(chain.from_iterable(guard.evacuations() for guard in self._guards))

    def counted_on(self, hosts: Iterable[str]) -> tuple[str, ...]:
        """The clusters of these hosts, and those linked to the batch by its groups, where N+1 is required."""
        here = {self._fleet.hosts[self._fleet.index[name]].cluster for name in hosts}
        clusters = here.union(*(guard.linked for guard in self._guards)) if here else ()
        return tuple(sorted(cluster for cluster in clusters if self._rules.required_in(cluster)))

    def give_back(self) -> None:
        for guard in self._guards:
            guard.give_back()

    @property
    def _guards(self) -> Iterable[_LevelGuard]:
        return self._levels.values()

    def _placed(self, vm: VmRequest, row: int, columns: Sequence[int], *, to_stay: bool) -> Objection | None:
        host = self._fleet.hosts[row]
        cells = tuple(host.cells[column].cell for column in columns)
        seated = SeatedVm(vm.vm_id, vm.name, self._seated_profile(vm.profile, host.vrf), cells, vm.groups)
        marks = [(guard.witnesses, guard.witnesses.mark()) for guard in self._guards]
        objection = None
        for level, guard in self._levels.items():
            whose = guard.witnesses.placed(seated, row, guard.mode_of)
            if whose is not None:
                objection = Objection(level, whose)
                break
        if objection is not None or not to_stay:
            for witnesses, mark in marks:
                witnesses.back_to(mark)
        return objection

    def _seated_profile(self, profile: Profile, vrf: str) -> Profile:
        """One object for each: they are looked up by identity. The request keeps its own alive."""
        key = (id(profile), vrf)
        if key not in self._profiles:
            self._profiles[key] = seated_profile(profile, vrf)
        return self._profiles[key]


class _LevelGuard:
    """The rules about one level."""

    def __init__(self, witnesses: Witnesses, rules: SpareRules, fleet: Fleet) -> None:
        self.witnesses = witnesses
        self._fleet = fleet
        self._mark = witnesses.mark()
        self._modes = {cluster: rules.mode(witnesses.level, cluster) for cluster in fleet.places["cluster"]}
        self._touched: list[str] = []
        # Those with members of the batch's hard groups, wherever it is placed.
        self.linked: set[str] = set()
        # By host and cells, or by home: what was turned away there without being of any group.
        self.turned: dict[tuple[Hashable, ...], list[Profile]] = {}

    def mode_of(self, cluster: str) -> Spare:
        return self._modes[cluster]

    def begin(self, vms: Iterable[VmRequest]) -> None:
        names = {name for vm in vms for name in hard_names(vm.groups)}
        self.linked = self.witnesses.look_at_members_for_good(names, self.mode_of)

    def closed_beside(self, row: int) -> Sequence[int]:
        """One look at a cluster tells of all hosts that nothing may be placed on."""
        cluster = self._fleet.hosts[row].cluster
        return self.witnesses.exposed_rows(cluster) if self._modes[cluster] is Spare.REQUIRED else ()

    def may_stand(self, row: int) -> bool:
        cluster = self._fleet.hosts[row].cluster
        mode = self._modes[cluster]
        if mode is Spare.OFF:
            return True
        if cluster not in self._touched:
            self._touched.append(cluster)
            self.witnesses.look_at_for_good(cluster)
        return self.witnesses.safe(row) or mode is Spare.WARN

    def turn_away(self, profile: Profile, row: int, columns: Sequence[int], whose: Whose) -> None:
        """`OWN`: lost with its own domain, it or another VM would have no place. Where in that domain it stood makes no
        difference to what is free elsewhere, so no seat would do on any of its hosts with the same `home`. `OTHERS`:
        it takes room that the VMs of another domain would need, which depends on the cells it takes, so it is
        remembered for these cells alone."""
        place = self.witnesses.home(row) if whose is Whose.OWN else (row, tuple(columns))
        turned = self.turned.setdefault(place, [])
        turned[:] = [each for each in turned if not _at_least(each, profile)]
        turned.append(profile)

    def turned_away(self, vm: VmRequest, row: int, columns: Sequence[int] | None) -> bool:
        if not self.turned:
            return False
        turned = self.turned.get(self.witnesses.home(row), [])
        if columns is not None:
            turned = turned + self.turned.get((row, tuple(columns)), [])
        return any(_at_least(vm.profile, each) for each in turned)

    def exposed(self) -> Iterator[Exposed]:
        for cluster in sorted(self._touched):
            yield from self.witnesses.exposed(cluster)

    def evacuations(self) -> Iterator[Evacuation]:
        for cluster in sorted(self.linked.union(self._touched)):
            yield from self.witnesses.evacuations(cluster)

    def give_back(self) -> None:
        self.witnesses.back_to(self._mark)


def _at_least(one: Profile, other: Profile) -> bool:
    """Whether a restart of one VM needs all that a restart of the other does, or more."""
    mine, theirs = one.shape, other.shape
    if one.architecture != other.architecture or (mine.numa, mine.pool) != (theirs.numa, theirs.pool):
        return False
    if mine.numa.multi_cell:
        # With more vCPUs it could span more cells.
        return mine == theirs
    return (
        mine.vcpus >= theirs.vcpus
        and mine.memory_mib >= theirs.memory_mib
        and mine.disk_mib >= theirs.disk_mib
        and mine.nvme >= theirs.nvme
    )
