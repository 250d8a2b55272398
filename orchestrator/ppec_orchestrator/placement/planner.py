# SPDX-License-Identifier: Apache-2.0
"""The planner: places a batch of VMs one after the other and says of every other VM why not.

>>> plan(fleet, request).placed[0]
Placement(vm_id=…, name='web-1', host_id=3, host='h3', cells=(1,), disk_mib=20480, pool='', cores=4, memory_mib=8192, …)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple
from uuid import UUID

import numpy as np

from ppec_contract.api_placement import Policy as PolicyName
from ppec_orchestrator.placement.candidates import Candidates, code, counted
from ppec_orchestrator.placement.filters import in_scope, right_architecture
from ppec_orchestrator.placement.fitting import Fitting
from ppec_orchestrator.placement.fleet import Fleet, IntArray, SomeRows
from ppec_orchestrator.placement.groups import hard_names
from ppec_orchestrator.placement.improving import KNAPSACK_STEPS_AGAIN, Improving
from ppec_orchestrator.placement.moves import Openings, worth_opening
from ppec_orchestrator.placement.neighbours import Neighbours
from ppec_orchestrator.placement.plan import Evidence, Move, Placement, Plan, Refusal
from ppec_orchestrator.placement.policies import POLICIES
from ppec_orchestrator.placement.ranks import Ranks, order
from ppec_orchestrator.placement.reasons import Reason
from ppec_orchestrator.placement.request import Level, PlanRequest, Profile, VmRequest
from ppec_orchestrator.placement.shelf import Shelf
from ppec_orchestrator.placement.spare import MOST_PLACES, SpareGuard
from ppec_orchestrator.placement.spare_rules import SpareRules
from ppec_orchestrator.placement.witnesses import Whose, Witnesses
from ppec_orchestrator.placement.workspace import Seat, Taken, Workspace

# By VM: the place it has and why.
Kept = Mapping[UUID, tuple[Placement, Evidence]]


def plan(fleet: Fleet, request: PlanRequest) -> Plan:
    """Never raises for want of room: what does not fit is refused with counted reasons. The fleet is not changed."""
    return Planner(fleet).plan(request)


class Planner:
    """Plans on one fleet, and keeps what it worked out for the next plan. Not for two threads at once."""

    def __init__(self, fleet: Fleet) -> None:
        self.workspace = Workspace(fleet)
        self.shelf = Shelf(self.workspace)
        self._witnesses: dict[Level, Witnesses] = {}
        self._era = 0

    @property
    def fleet(self) -> Fleet:
        return self.workspace.fleet

    def plan(self, request: PlanRequest, kept: Kept | None = None) -> Plan:
        """Leaves room as it was: two plans in a row are the same.

        `kept` are the places of those VMs of the request that an earlier plan placed where nothing came in between;
        they stay, if they still can and cost no other VM its place. Under N+1 none are: all are placed anew."""
        self.workspace.begin()
        try:
            if kept and self.spare_rules(request).off:
                found = self.run(request, kept)
                if not found.refused:
                    return found
                again = Improving(self, request, knapsack_steps=KNAPSACK_STEPS_AGAIN)
                return max(found, again.better(self.run(request)), key=again.gain)
            return Improving(self, request).better(self.run(request))
        finally:
            self.workspace.end()

    def run(
        self,
        request: PlanRequest,
        kept: Kept | None = None,
        seats: Sequence[Seat] = (),
        turns: Sequence[int] | None = None,
    ) -> Plan:
        """VM after VM, within a plan. `turns` are the places in the request of the VMs in the order they are planned
        in, if that is not the request's own. `seats`, if given, are those of the first; one that can't be had when its
        VM's turn comes is the policy's to replace."""
        batch = _Batch(self, request, kept or {}, seats, turns)
        try:
            return batch.run()
        finally:
            batch.give_back()

    def follow(self, fleet: Fleet, rows: Sequence[int]) -> None:
        """The fleet is another one now, of the same hosts, of which those in `rows` changed."""
        self.workspace.follow(fleet, rows)

    def closed(self, vm: VmRequest) -> list[SomeRows]:
        """The rows that earlier failures and hard groups close to the VM, some perhaps twice."""
        return Neighbours(self.workspace).closed(vm)

    def spare_rules(self, request: PlanRequest) -> SpareRules:
        """The rules about N+1 that the request could meet: its own; those of clusters where its VMs could stand; and of
        those with members of its hard groups, in whose way another one may be from afar."""
        rules = SpareRules.of(self.fleet, request.spare)
        if not rules.clusters:
            return rules
        # Of one place and architecture each; whatever else keeps a VM from a host, something may change it.
        profiles = {(vm.profile.where, vm.profile.architecture): vm.profile for vm in request.vms}.values()
        open_to_it, rows = np.zeros(len(self.fleet.hosts), dtype=np.bool_), self.fleet.places["cluster"]
        for each in profiles:
            open_to_it |= in_scope(self.fleet, each) & right_architecture(self.fleet, each)
        for name in {name for vm in request.vms for name in hard_names(vm.groups)}:
            open_to_it[list(self.workspace.groups.members(name))] = True
        met = {cluster: rule for cluster, rule in rules.clusters.items() if open_to_it[rows[cluster]].any()}
        return replace(rules, clusters=met)

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
            self.shelf.clear()
            self._witnesses.clear()

    def candidates(self, profile: Profile, policy: PolicyName) -> Candidates:
        """Current ones."""
        self._forget_what_is_void()
        return self.shelf.current(profile, policy)


class _Batch:
    """`kept` VMs stay where they are. `seats`, where given, are where the VMs go, or the first so many, in the order
    they are planned in."""

    def __init__(
        self, planner: Planner, request: PlanRequest, kept: Kept, seats: Sequence[Seat], turns: Sequence[int] | None
    ) -> None:
        self.planner = planner
        self._seats = seats
        self._turns = order(request) if turns is None else turns
        self.request = request
        self.kept = kept
        self.workspace = planner.workspace
        self.fleet = planner.fleet
        self.neighbours = Neighbours(planner.workspace, request.contended_hosts)
        self.taken: list[Taken] = []
        self.openings = Openings(planner.workspace, request.most_moves) if request.most_moves else None
        rules = planner.spare_rules(request)
        self.spare: SpareGuard | None = None
        if not rules.off:
            self.spare = SpareGuard([planner.witnesses(level) for level in rules.levels], rules, self.fleet)
        self.ranks = Ranks(self.fleet, request)
        # By identity: hashing a profile takes longer than finding it. Void when the shelf has dropped some.
        self._candidates: dict[int, Candidates] = {}
        self._dropped = planner.shelf.dropped
        self._refusals: dict[tuple[int, int], dict[Reason, int]] = {}

    def run(self) -> Plan:
        moves_with_fleet = POLICIES[self.request.policy].moves_with_fleet
        self.workspace.start_epoch(0)
        found: dict[int, tuple[Placement, Evidence] | Refusal] = dict(self._keep())
        for step, index in enumerate(self._turns):
            if index in found:
                continue
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
            evacuations=self.spare.evacuations() if self.spare is not None and self.request.spare.witnessed else (),
            counted_on=self.spare.counted_on(place.host for place, _ in placed) if self.spare is not None else (),
        )

    def give_back(self) -> None:
        if self.openings is not None:
            self.openings.give_back()
        self.workspace.give_back_all(self.taken)
        self.taken.clear()
        if self.spare is not None:
            self.spare.give_back()

    def _keep(self) -> Iterator[tuple[int, tuple[Placement, Evidence]]]:
        """Takes what the kept VMs hold, before anything else is placed. One with rules about its neighbours is placed
        anew: they may have changed with others' places. So is one that others move for, and all are where N+1 looks on:
        to it, each is a step."""
        if self.spare is not None:
            self.spare.begin(self.request.vms)
            return
        for index, vm in enumerate(self.request.vms if self.kept else ()):
            kept = self.kept.get(vm.vm_id)
            if kept is None or vm.groups or kept[1].moves:
                continue
            if self._take_again(vm, kept[0]):
                yield index, kept

    def _take_again(self, vm: VmRequest, place: Placement) -> bool:
        row = self.fleet.index.get(place.host)
        candidates = self._current(vm)
        if row is None or not candidates.standing[row] or not self.workspace.addresses.enough(vm.profile.networks)[row]:
            return False
        columns = [column for column, cell in enumerate(self.fleet.hosts[row].cells) if cell.cell in place.cells]
        # Compared before it is taken: of a cell that is of no use any more, a VM would take more than there is.
        if len(columns) != len(place.cells) or not self._takes_as_before(candidates.fitting, row, columns, place):
            return False
        taken = self.workspace.take(row, columns, candidates.fitting, vm)
        if self.workspace.overdrawn(taken):
            self.workspace.give_back(taken)
            return False
        self.taken.append(taken)
        if self.ranks.matter:
            self.ranks.placed(row)
        return True

    def _takes_as_before(self, fitting: Fitting, row: int, columns: Sequence[int], place: Placement) -> bool:
        parts = len(columns)
        return parts <= fitting.most and all(
            fitting.part(row, column, parts).each == tuple(place.per_cell.values()) for column in columns
        )

    def _current(self, vm: VmRequest) -> Candidates:
        candidates = self._candidates.get(id(vm.profile))
        if candidates is None:
            candidates = self.planner.candidates(vm.profile, self.request.policy)
            if self._dropped != self.planner.shelf.dropped:
                self._dropped = self.planner.shelf.dropped
                self._candidates.clear()
            self._candidates[id(vm.profile)] = candidates
        else:
            # Where a batch is kept apart, scores decide only among hosts that have none of it.
            candidates.refresh(scores=not self.ranks.matter or bool(self._seats))
        return candidates

    def _place(self, step: int, vm: VmRequest) -> tuple[Placement, Evidence] | Refusal:
        candidates = self._current(vm)
        seat = self._seats[step] if step < len(self._seats) else None
        found = None if seat is None else self._take_seat(candidates, vm, seat)
        searched = found is not None
        if found is None:
            found = self._take_best(candidates, vm)
        if found is None and self.openings is not None and worth_opening(vm.profile.shape):
            found = self._take_opened(candidates, vm)
        if found is None:
            return Refusal(vm.vm_id, vm.name, self._reasons(candidates, vm), step)
        taken, row = found.taken, found.taken.row
        self.taken.append(taken)
        if self.ranks.matter:
            self.ranks.placed(row)
        if self.openings is not None:
            self.openings.changed(row)
        host = self.fleet.hosts[row]
        cells = tuple([host.cells[column].cell for column in taken.columns])
        amounts = taken.part.each
        place = Placement(vm.vm_id, vm.name, host.host_id, host.name, cells, taken.disk_mib, taken.pool, *amounts)
        epoch = self.workspace.epoch
        evidence = Evidence(vm.vm_id, step, found.candidates, found.score, found.broken, epoch, found.moves, searched)
        return place, evidence

    def _take_seat(self, candidates: Candidates, vm: VmRequest, seat: Seat) -> _Found | None:
        """The place that was found for the VM of this step, if it takes as many cells as the policy has it take."""
        best = self._best(candidates, vm)
        row, columns = seat
        if best is None or not candidates.key[row] < np.inf or any(row in rows for rows in self._closed(vm)):
            return None
        if len(candidates.cells(row)) != len(columns):
            return None
        score, broken = float(candidates.key[row]), self.ranks.broken(self.workspace, vm, row)
        taken = self.workspace.take(row, columns, candidates.fitting, vm)
        overdrawn = self.workspace.overdrawn(taken)
        if self.spare is None and not overdrawn:
            return _Found(taken, best.candidates, broken, score)
        self.workspace.give_back(taken)
        # It has room on the host, but one that could not have its own seat may be in this one.
        if self.spare is None or overdrawn:
            return None
        # A warning admits everybody, but has to look on: before the VM is there, and after.
        admitted = None
        if self.spare.may_stand(row):
            admitted = self._take_if_admitted(self.spare, candidates, vm, row, columns)
        return None if admitted is None else _Found(admitted, best.candidates, broken, score)

    def _take_best(self, candidates: Candidates, vm: VmRequest) -> _Found | None:
        """The best host that fits it as it stands. Where N+1 turns the VM away, other cells of the host are tried, and
        then the next best host, up to `MOST_PLACES` places in all."""
        tries = 0
        while tries < MOST_PLACES:
            best = self._best(candidates, vm)
            if best is None:
                return None
            row, score = best.row, candidates.key_items[best.row]
            columns = candidates.cells(row)
            if self.spare is None:
                taken = self.workspace.take(row, columns, candidates.fitting, vm)
                return _Found(taken, best.candidates, best.broken, score)
            if self.spare.may_stand(row):
                for seat in self.spare.seats(vm, row, columns):
                    tries += 1
                    admitted = self._take_if_admitted(self.spare, candidates, vm, row, seat)
                    if admitted is not None:
                        return _Found(admitted, best.candidates, best.broken, score)
            self.spare.close(vm, row)
        return None

    def _take_if_admitted(
        self, spare: SpareGuard, candidates: Candidates, vm: VmRequest, row: int, columns: Sequence[int]
    ) -> Taken | None:
        """The seat, if N+1 lets the VM have it. What it turns away for no group's sake is asked for once, and not
        again by others as large: a search that ends in no is the longest there is."""
        if spare.turned_away(vm, row, columns):
            return None
        taken = self.workspace.take(row, columns, candidates.fitting, vm)
        objection = spare.admit(vm, row, columns)
        if objection is None:
            return taken
        self.workspace.give_back(taken)
        if vm.groups:
            alone = replace(vm, groups=())
            once_more = self.workspace.take(row, columns, candidates.fitting, alone)
            objection = spare.objection(alone, row, columns)
            self.workspace.give_back(once_more)
        if objection is not None:
            spare.turn_away(vm.profile, row, columns, objection)
        return None

    def _take_opened(self, candidates: Candidates, vm: VmRequest) -> _Found | None:
        """A host that fits it once some of its VMs have changed cells: with the fewest moves, then the fewest MiB."""
        openings = self.openings
        if openings is None:
            return None
        rows = self._open_to_moves(openings, candidates, vm)
        for opening in openings.cheapest_first(vm.profile, rows):
            row = opening.row
            if self.spare is not None and (not self.spare.may_stand(row) or self.spare.turned_away(vm, row)):
                continue
            openings.apply(opening)
            candidates.refresh()
            score, columns = float(candidates.key[row]), candidates.cells(row)
            broken = self.ranks.broken(self.workspace, vm, row)
            taken = self.workspace.take(row, columns, candidates.fitting, vm)
            objection = self.spare.admit(vm, row, columns) if self.spare is not None else None
            if objection is None:
                openings.keep(opening)
                if self.spare is not None:
                    self.spare.reopen()
                return _Found(taken, opening.of, broken, score, opening.moves)
            if self.spare is not None and objection.whose is Whose.OWN and not vm.groups:
                self.spare.turn_away(vm.profile, row, columns, objection)
            self.workspace.give_back(taken)
            openings.take_back(opening)
        return None

    def _open_to_moves(self, openings: Openings, candidates: Candidates, vm: VmRequest) -> IntArray:
        """The hosts that turn the VM away for want of a cell alone: they have what it needs, in the wrong cells."""
        candidates.refresh()
        short = (
            openings.have_enough(candidates.fitting, vm.profile.networks)
            & candidates.standing
            & ~(candidates.key < np.inf)
        )
        for rows in self._closed(vm):
            short[rows] = False
        return np.flatnonzero(short)

    def _closed(self, vm: VmRequest) -> list[SomeRows]:
        """The rows that N+1, earlier failures and hard groups close to the VM, some perhaps twice."""
        closed = self.neighbours.closed(vm) if vm.groups or vm.excluded_hosts or self.request.contended_hosts else []
        if self.spare is not None and (spared := self.spare.closed(vm)) is not None:
            closed.append(spared)
        return closed

    def _best(self, candidates: Candidates, vm: VmRequest) -> _Best | None:
        """None where nothing is left."""
        closed = self._closed(vm)
        best = self._best_but_for(closed, candidates, vm)
        if best is None or best.row not in candidates.old_scores:
            return best
        candidates.refresh()
        return self._best_but_for(closed, candidates, vm)

    def _best_but_for(self, closed: Sequence[SomeRows], candidates: Candidates, vm: VmRequest) -> _Best | None:
        if len(closed) == 1 and isinstance(closed[0], list) and (count := candidates.count_but(closed[0])):
            # As a rule none of a few closed hosts is the best: then they need not be closed to see it.
            row, broken = self.ranks.best(candidates.key, self.workspace, vm)
            if row not in closed[0]:
                return _Best(row, broken, count)
        closings = [candidates.close(rows) for rows in closed]
        try:
            count = candidates.count
            return _Best(*self.ranks.best(candidates.key, self.workspace, vm), count) if count else None
        finally:
            for were in closings:
                candidates.reopen(were)

    def _reasons(self, candidates: Candidates, vm: VmRequest) -> dict[Reason, int]:
        if not vm.groups and not vm.excluded_hosts and not self.request.contended_hosts:
            known = (id(vm.profile), self.workspace.moment)
            if known not in self._refusals:
                self._refusals[known] = counted(self._codes(candidates))
            return dict(self._refusals[known])
        codes = self._codes(candidates)
        open_rows = candidates.standing.copy()
        for reason, rows in self.neighbours.shut(vm):
            mine = np.asarray(rows)[open_rows[rows]]
            codes[mine] = code(reason)
            open_rows[mine] = False
        for rows in self.neighbours.within(vm):
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


class _Best(NamedTuple):
    """The row, how many soft groups it breaks, and over how many candidates it won."""

    row: int
    broken: int
    candidates: int


class _Found(NamedTuple):
    """What was taken, over how many candidates, soft groups broken, score, and the moves before it."""

    taken: Taken
    candidates: int
    broken: int
    score: float
    moves: tuple[Move, ...] = ()
