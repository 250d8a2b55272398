# SPDX-License-Identifier: Apache-2.0
"""The planner: places a batch of VMs one after the other and says of every other VM why not.

>>> plan(fleet, request).placed[0]
Placement(vm_id=…, name='web-1', host_id=3, host='h3', cells=(1,), cores=4, memory_mib=8192, disk_mib=20480)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np

from ppec_contract.api import Policy as PolicyName
from ppec_orchestrator.placement.balance import Floats
from ppec_orchestrator.placement.candidates import Candidates, code, counted
from ppec_orchestrator.placement.demand import CELL_RESOURCES
from ppec_orchestrator.placement.fleet import Fleet, IntArray
from ppec_orchestrator.placement.moves import Openings
from ppec_orchestrator.placement.plan import Evidence, Move, Placement, Plan, Refusal
from ppec_orchestrator.placement.policies import POLICIES
from ppec_orchestrator.placement.reasons import Reason
from ppec_orchestrator.placement.request import Level, PlanRequest, Profile, Spare, VmRequest
from ppec_orchestrator.placement.spare import MOST_TRIES, SpareGuard, Witnesses
from ppec_orchestrator.placement.workspace import Taken, Workspace

# Profiles whose vectors are kept; of some 250 kB each on ten thousand hosts.
MOST_PROFILES = 256


def plan(fleet: Fleet, request: PlanRequest) -> Plan:
    """Never raises for want of room: what does not fit is refused with counted reasons. The fleet is not changed."""
    return Planner(fleet).plan(request)


class Planner:
    """Plans on one fleet, and keeps what it worked out for the next plan. Not for two threads at once."""

    def __init__(self, fleet: Fleet) -> None:
        self.workspace = Workspace(fleet)
        self._candidates: dict[tuple[Profile, PolicyName], Candidates] = {}
        self._witnesses: dict[Level, Witnesses] = {}
        self._era = 0

    @property
    def fleet(self) -> Fleet:
        return self.workspace.fleet

    def plan(self, request: PlanRequest) -> Plan:
        """Leaves room as it was: two plans in a row are the same."""
        batch = _Batch(self, request)
        try:
            return batch.run()
        finally:
            batch.give_back()

    def follow(self, fleet: Fleet, rows: Sequence[int]) -> None:
        """The fleet is another one now, of the same hosts, of which those in `rows` changed."""
        self.workspace.follow(fleet, rows)

    def witnesses(self, level: Level) -> Witnesses:
        """Current ones, between two plans."""
        self._forget_what_is_void()
        if level not in self._witnesses:
            self._witnesses[level] = Witnesses(self.workspace, level)
        self._witnesses[level].follow()
        return self._witnesses[level]

    def _forget_what_is_void(self) -> None:
        if self._era != self.workspace.era:
            self._era = self.workspace.era
            self._candidates.clear()
            self._witnesses.clear()

    def candidates(self, profile: Profile, policy: PolicyName) -> Candidates:
        """Current ones."""
        self._forget_what_is_void()
        key = (profile, policy)
        found = self._candidates.get(key)
        if found is None:
            if len(self._candidates) >= MOST_PROFILES:
                self._candidates.pop(next(iter(self._candidates)))
            found = self._candidates[key] = Candidates(self.workspace, profile, policy)
        else:
            found.refresh()
        return found


class _Batch:
    def __init__(self, planner: Planner, request: PlanRequest) -> None:
        self.planner = planner
        self.request = request
        self.workspace = planner.workspace
        self.fleet = planner.fleet
        self.taken: list[Taken] = []
        self.openings = Openings(planner.workspace, request.most_moves) if request.most_moves else None
        self.spare: SpareGuard | None = None
        if request.spare.mode is not Spare.OFF:
            self.spare = SpareGuard(planner.witnesses(request.spare.level), request.spare.mode, self.fleet)
        self.ranks = _Ranks(self.fleet, request)
        # By identity: hashing a profile takes longer than finding it, and a batch has few.
        self._candidates: dict[int, Candidates] = {}
        self._refusals: dict[tuple[int, int], dict[Reason, int]] = {}

    def run(self) -> Plan:
        moves_with_fleet = POLICIES[self.request.policy].moves_with_fleet
        if moves_with_fleet:
            self.workspace.start_epoch(0)
        found: dict[int, tuple[Placement, Evidence] | Refusal] = {}
        for step, index in enumerate(_order(self.request)):
            if moves_with_fleet:
                self.workspace.step(step)
            found[index] = self._place(step, self.request.vms[index])
        answers = [found[index] for index in range(len(self.request.vms))]
        placed = [answer for answer in answers if not isinstance(answer, Refusal)]
        return Plan(
            placed=tuple(place for place, _ in placed),
            refused=tuple(answer for answer in answers if isinstance(answer, Refusal)),
            evidence=tuple(evidence for _, evidence in placed),
            exposed=self.spare.exposed() if self.spare is not None else (),
        )

    def give_back(self) -> None:
        for taken in reversed(self.taken):
            self.workspace.give_back(taken)
        self.taken.clear()
        if self.openings is not None:
            self.openings.give_back()
        if self.spare is not None:
            self.spare.give_back()

    def _place(self, step: int, vm: VmRequest) -> tuple[Placement, Evidence] | Refusal:
        candidates = self._candidates.get(id(vm.profile))
        if candidates is None:
            candidates = self.planner.candidates(vm.profile, self.request.policy)
            self._candidates[id(vm.profile)] = candidates
        else:
            candidates.refresh()
        found = self._take_best(candidates, vm) or (self._take_opened(candidates, vm) if self.openings else None)
        if found is None:
            return Refusal(vm.vm_id, vm.name, self._reasons(candidates, vm), step)
        taken, count, broken, score, moves = found
        row = taken.row
        self.taken.append(taken)
        if self.ranks.matter:
            self.ranks.placed(row)
        if self.openings is not None:
            self.openings.changed(row)
        host = self.fleet.hosts[row]
        place = Placement(
            vm_id=vm.vm_id,
            name=vm.name,
            host_id=host.host_id,
            host=host.name,
            cells=tuple([host.cells[column].cell for column in taken.columns]),
            disk_mib=vm.profile.shape.disk_mib,
            **{**_NOTHING, **taken.part},
        )
        return place, Evidence(vm.vm_id, step, count, score, broken, self.workspace.epoch, moves)

    def _take_best(self, candidates: Candidates, vm: VmRequest) -> _Found | None:
        """The best host that fits it as it stands. Where N+1 turns the VM away, other cells of the host are tried, and
        then the next best host, up to `MOST_TRIES` places in all."""
        tries = 0
        while tries < MOST_TRIES:
            best = self._best(candidates, vm, self._closed(vm))
            if best is None:
                return None
            row, count, broken = best
            score = float(candidates.key[row])
            columns = candidates.cells(row)
            if self.spare is None:
                taken = self.workspace.take(row, columns, candidates.fitting, vm.groups)
                return taken, count, broken, score, ()
            if self.spare.may_stand(row):
                for seat in self.spare.seats(vm, row, columns):
                    tries += 1
                    taken = self.workspace.take(row, seat, candidates.fitting, vm.groups)
                    if self.spare.admits(vm, row, seat):
                        return taken, count, broken, score, ()
                    self.workspace.give_back(taken)
            self.spare.close(vm, row)
        return None

    def _take_opened(self, candidates: Candidates, vm: VmRequest) -> _Found | None:
        """A host that fits it once some of its VMs have changed cells: with the fewest moves, then the fewest MiB."""
        openings = self.openings
        if openings is None:
            return None
        rows = self._open_to_moves(openings, candidates, vm)
        for opening in openings.cheapest_first(vm.profile, rows):
            row = opening.row
            if self.spare is not None and not self.spare.may_stand(row):
                continue
            openings.apply(opening)
            candidates.refresh()
            score, columns = float(candidates.key[row]), candidates.cells(row)
            broken = self.ranks.of(self.workspace, vm)[1]
            taken = self.workspace.take(row, columns, candidates.fitting, vm.groups)
            if self.spare is None or self.spare.admits(vm, row, columns):
                openings.keep(opening)
                if self.spare is not None:
                    self.spare.reopen()
                return taken, opening.of, int(broken[row]) if broken is not None else 0, score, opening.moves
            self.workspace.give_back(taken)
            openings.take_back(opening)
        return None

    def _open_to_moves(self, openings: Openings, candidates: Candidates, vm: VmRequest) -> IntArray:
        """The hosts that turn the VM away for want of a cell alone: they have what it needs, in the wrong cells."""
        candidates.refresh()
        short = openings.have_enough(candidates.fitting) & candidates.standing & ~(candidates.key < np.inf)
        closed = self._closed(vm)
        if closed is not None:
            short[closed] = False
        return np.flatnonzero(short)

    def _closed(self, vm: VmRequest) -> IntArray | None:
        """The rows that N+1, earlier failures and hard groups close to the VM, some perhaps twice; None for none."""
        spared = self.spare.closed(vm) if self.spare is not None else None
        if not vm.groups and not vm.excluded_hosts:
            return spared
        closed = [rows for _, rows in self._shut(vm)]
        if spared is not None:
            closed.append(spared)
        within = self._within(vm)
        if within:
            outside = np.ones(len(self.fleet.hosts), dtype=np.bool_)
            outside[reduce(np.intersect1d, within)] = False
            closed.append(np.flatnonzero(outside))
        if not closed:
            return None
        return closed[0] if len(closed) == 1 else np.unique(np.concatenate(closed))

    def _shut(self, vm: VmRequest) -> list[tuple[Reason, IntArray]]:
        """Rows closed one by one: hosts that failed it, and domains with VMs that it must stand apart from."""
        shut: list[tuple[Reason, IntArray]] = []
        if vm.excluded_hosts:
            failed = [self.fleet.index[name] for name in vm.excluded_hosts if name in self.fleet.index]
            shut.append((Reason.FAILED_BEFORE, np.array(failed, dtype=np.int64)))
        for group in vm.groups:
            if group.hard and group.apart:
                rows = self.workspace.groups.rows(group)
                if rows is not None:
                    shut.append((Reason.ANTI_AFFINITY, rows))
        return shut

    def _within(self, vm: VmRequest) -> list[IntArray]:
        """Rows of the domains with VMs that it must stand with, for each group that has any VM yet."""
        together = [group for group in vm.groups if group.hard and not group.apart]
        found = (self.workspace.groups.rows(group) for group in together)
        return [rows for rows in found if rows is not None]

    def _best(self, candidates: Candidates, vm: VmRequest, closed: IntArray | None) -> tuple[int, int, int] | None:
        """The row, over how many candidates it won, and how many soft groups it breaks; None where nothing is left."""
        key = candidates.key
        if closed is None or not len(closed):
            return self._lowest(key, vm, candidates.count)
        # Few rows, as a rule: closed for a moment in place, and opened again.
        kept = key.take(closed)
        key[closed] = np.inf
        try:
            return self._lowest(key, vm, candidates.count - int(np.count_nonzero(kept < np.inf)))
        finally:
            key[closed] = kept

    def _lowest(self, key: Floats, vm: VmRequest, count: int) -> tuple[int, int, int] | None:
        if not count:
            return None
        soft = any(not group.hard for group in vm.groups)
        if not soft and not self.ranks.matter:
            return int(key.argmin()), count, 0
        rank, broken = self.ranks.of(self.workspace, vm)
        fits = key < np.inf
        first = rank[fits].min()
        row = int(np.where(fits & (rank == first), key, np.inf).argmin())
        return row, count, int(broken[row]) if broken is not None else 0

    def _reasons(self, candidates: Candidates, vm: VmRequest) -> dict[Reason, int]:
        if not vm.groups and not vm.excluded_hosts:
            known = (id(vm.profile), len(self.workspace.changes))
            if known not in self._refusals:
                self._refusals[known] = counted(self._codes(candidates))
            return dict(self._refusals[known])
        codes = self._codes(candidates)
        open_rows = candidates.standing.copy()
        for reason, rows in self._shut(vm):
            mine = rows[open_rows[rows]]
            codes[mine] = code(reason)
            open_rows[mine] = False
        for rows in self._within(vm):
            outside = open_rows.copy()
            outside[rows] = False
            codes[outside] = code(Reason.AFFINITY)
            open_rows &= ~outside
        return counted(codes)

    def _codes(self, candidates: Candidates) -> IntArray:
        """Of a VM that was placed nowhere: where it fits, it was N+1 (or its neighbours: not looked at here)."""
        candidates.refresh()
        codes = candidates.reasons().copy()
        codes[candidates.key < np.inf] = code(Reason.N_PLUS_ONE)
        return codes


_NOTHING = dict.fromkeys(CELL_RESOURCES, 0)
# What was taken, over how many candidates, soft groups broken, score, and the moves before it.
_Found = tuple[Taken, int, int, float, tuple[Move, ...]]


class _Ranks:
    """What comes before the score: fewest soft groups broken, then (where the policy keeps a batch apart) the fewest
    VMs of the batch on the host, then the fewest in the rack."""

    def __init__(self, fleet: Fleet, request: PlanRequest) -> None:
        self._fleet = fleet
        self.matter = POLICIES[request.policy].apart
        self._on_host: IntArray = np.zeros(len(fleet.hosts), dtype=np.int64)
        self._on_rack: IntArray = np.zeros(len(fleet.hosts), dtype=np.int64)
        if self.matter:
            for name, count in request.batch_hosts.items():
                if name in fleet.index:
                    self._count(fleet.index[name], count)

    def placed(self, row: int) -> None:
        self._count(row, 1)

    def of(self, workspace: Workspace, vm: VmRequest) -> tuple[IntArray, IntArray | None]:
        """Per host: its rank, and how many of the VM's soft groups it breaks (None where the VM has none)."""
        broken: IntArray | None = None
        for group in vm.groups:
            rows = None if group.hard else workspace.groups.rows(group)
            if rows is None:
                continue
            if broken is None:
                broken = np.zeros(len(self._on_host), dtype=np.int64)
            if group.apart:
                broken[rows] += 1
            else:
                broken += 1
                broken[rows] -= 1
        # No batch has as many VMs as the next factor.
        apart = (self._on_host << 20) + self._on_rack
        return apart + ((broken << 40) if broken is not None else 0), broken

    def _count(self, row: int, count: int) -> None:
        self._on_host[row] += count
        self._on_rack[self._fleet.places["rack"][self._fleet.hosts[row].rack]] += count


def _order(request: PlanRequest) -> Sequence[int]:
    """The order VMs are placed in. All or nothing: the largest first, so that the plan is the same whatever order they
    came in; otherwise as they came. The priority goes before both."""
    vms = request.vms
    if not request.all_or_nothing:
        if all(not vm.priority for vm in vms):
            return range(len(vms))
        return sorted(range(len(vms)), key=lambda index: -vms[index].priority)

    def size(index: int) -> tuple[object, ...]:
        vm, shape = vms[index], vms[index].profile.shape
        return (-vm.priority, -shape.vcpus, -shape.memory_mib, -shape.disk_mib, len(vm.name), vm.name)

    return sorted(range(len(vms)), key=size)
