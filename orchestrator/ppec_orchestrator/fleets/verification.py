# SPDX-License-Identifier: Apache-2.0
"""Verifies a plan of ten thousand VMs on ten thousand hosts, by the rules of `placement/checker.py`.

The checker asks every host anew for every VM, which would take hours here. Every rule is asked of its `Replay` here as
well, but once for all VMs of a profile, and again only of hosts that changed: what fits, and scores with the figures of
an epoch. Groups and who else of the batch is near are counted for all hosts at once. Nothing is the planner's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ppec_contract.api_placement import Policy
from ppec_orchestrator.placement.checker import Part, Replay
from ppec_orchestrator.placement.fleet import Fleet, HostState, IntArray
from ppec_orchestrator.placement.plan import Evidence, Move, Placement, Plan, Refusal
from ppec_orchestrator.placement.request import Group, Level, PlanRequest, Profile, Spare, VmRequest

_Flags = NDArray[np.bool_]
# The checker's: sums come out a little different in another order. What `pack` counts is whole.
_SLACK = 1e-6


def verify(fleet: Fleet, request: PlanRequest, plan: Plan) -> list[str]:
    """The faults that `placement.checker.check` finds."""
    answered = Counter([place.vm_id for place in plan.placed] + [refusal.vm_id for refusal in plan.refused])
    if answered != Counter(vm.vm_id for vm in request.vms):
        return ["the plan does not answer each VM of the request once"]
    replay, by_id = _LargeReplay(fleet, request), {vm.vm_id: vm for vm in request.vms}
    steps: dict[int, tuple[Placement, Evidence] | Refusal] = {one.step: one for one in plan.refused}
    steps |= {why.step: (place, why) for place, why in zip(plan.placed, plan.evidence, strict=True)}
    faults: list[str] = []
    for _, answer in sorted(steps.items(), key=lambda item: item[0]):
        if isinstance(answer, Refusal):
            faults += replay.refused(by_id[answer.vm_id], answer)
        else:
            faults += replay.placed(by_id[answer[0].vm_id], *answer)
    return faults if len(steps) == len(request.vms) else [*faults, "two VMs were planned in one step"]


@dataclass(slots=True)
class _Looked:
    """What is known of all hosts for the VMs of one profile, whatever their groups: which they fit, and their scores
    there. `seen` is how far in the list of changes that is true, `epoch` whose figures the scores are of."""

    vm: VmRequest
    fits: _Flags
    scores: NDArray[np.float64]
    seen: int
    epoch: int


class _LargeReplay(Replay):
    """Rows are the hosts' places in the fleet."""

    def __init__(self, fleet: Fleet, request: PlanRequest) -> None:
        super().__init__(fleet, request)
        names = [host.name for host in self.hosts]
        self._rows = {name: row for row, name in enumerate(names)}
        # Which of two names comes first, as a number.
        self._alphabetic = np.unique(names, return_inverse=True)[1]
        self._domains: dict[Level, IntArray] = {
            Level.HOST: np.arange(len(names)),
            Level.RACK: _numbered([host.rack for host in self.hosts]),
            Level.DATACENTRE: _numbered([host.datacentre for host in self.hosts]),
        }
        self._members: dict[str, list[int]] = {}
        for row, host in enumerate(self.hosts):
            for group in (group for vm in host.vms for group in vm.groups):
                self._members.setdefault(group.name, []).append(row)
        self._batch = np.array([request.batch_hosts.get(name, 0) for name in names], dtype=np.int64)
        self._looked: dict[Profile, _Looked] = {}
        # Rows, in the order they changed in.
        self._changes: list[int] = []
        self._rows_of_prefix: dict[int, list[int]] = {}
        for row, host in enumerate(self.hosts):
            for prefix in {prefix for family in host.prefixes for prefix in family}:
                self._rows_of_prefix.setdefault(prefix, []).append(row)
        networks = max((len(vm.profile.networks) for vm in request.vms), default=0)
        # No VM takes more addresses than so many: of a prefix that has them it matters to nobody how many it has.
        self._most_addresses = networks * max((len(host.prefixes) for host in self.hosts), default=0)

    def refused(self, vm: VmRequest, refusal: Refusal) -> list[str]:
        loose = self.request.spare.mode is Spare.REQUIRED
        fits = [] if loose else np.flatnonzero(self._look(vm.profile).fits & self._allowed(vm)).tolist()
        faults = [f"{vm.name} was refused, but fits {self.hosts[fits[0]].name}"] if fits else []
        if sum(refusal.reasons.values()) != len(self.hosts):
            faults.append(f"{vm.name}: {sum(refusal.reasons.values())} hosts have a reason, of {len(self.hosts)}")
        return faults

    def placed(self, vm: VmRequest, place: Placement, why: Evidence) -> list[str]:
        if why.epoch > self.means[0]:
            self.means = (why.epoch, *self.spread())
        stuck = [f"{move.name} can't move to cells {move.cells_after}" for move in why.moves if not self.move(move)]
        if stuck:
            return stuck
        looked, row = self._look(vm.profile), self._rows.get(place.host)
        candidates = looked.fits & self._allowed(vm)
        part = self._part(looked, row, place.cells) if row is not None and candidates[row] else None
        if row is None or part is None:
            return [f"{vm.name} does not fit cells {place.cells} of {place.host}"]
        faults = [
            f"{vm.name} takes {place.per_cell} of cell {c}, not {p}" for c, p in part.items() if place.per_cell != p
        ]
        faults += self._evidence_faults(vm, row, why, candidates)
        self.take(self.hosts[row], vm, part)
        return faults

    def _evidence_faults(self, vm: VmRequest, row: int, why: Evidence, candidates: _Flags) -> list[str]:
        faults = []
        chosen = self.request.spare.mode is not Spare.REQUIRED and not why.moves
        if chosen and np.count_nonzero(candidates) != why.candidates:
            claimed = f"{why.candidates} candidates are claimed, there are {np.count_nonzero(candidates)}"
            faults.append(f"{vm.name}: {claimed}")
        host, score, broken = self.hosts[row].name, self._look(vm.profile).scores[row], self._broken(vm)
        slack = 0.0 if self.request.policy is Policy.PACK else _SLACK
        if abs(score - why.score) > slack or broken[row] != why.broken:
            faults.append(f"{vm.name} on {host}: a score of {why.score} is claimed, it is {score}")
        if chosen and not why.searched:
            better = np.flatnonzero(candidates & self._better(vm.profile, row, broken))
            if len(better):
                faults.append(f"{vm.name}: {self.hosts[better[0]].name} would have been better than {host}")
        return faults

    def _better(self, profile: Profile, row: int, broken: IntArray) -> _Flags:
        """Than the row's host: by soft groups, then by the batch's other VMs if these are spread, then by score."""
        scores = self._look(profile).scores
        if self.request.policy is Policy.PACK:
            better: _Flags = (scores < scores[row]) | (
                (scores == scores[row]) & (self._alphabetic < self._alphabetic[row])
            )
        else:
            better = scores < scores[row] - _SLACK
        ranks = [broken]
        if self.request.policy is Policy.SPREAD:
            racks = self._domains[Level.RACK]
            ranks += [self._batch, np.bincount(racks, weights=self._batch)[racks]]
        for rank in reversed(ranks):
            better = (rank < rank[row]) | ((rank == rank[row]) & better)
        return better

    # --- the same rules, for all hosts at once -----------------------------------------------------------------------

    def _allowed(self, vm: VmRequest) -> _Flags:
        """Where its hard groups and the hosts it is kept from let it stand."""
        allowed = np.ones(len(self.hosts), dtype=np.bool_)
        allowed[[row for name in vm.excluded_hosts if (row := self._rows.get(name)) is not None]] = False
        for group in vm.groups:
            if group.hard:
                allowed &= self._kept(group)
        return allowed

    def _broken(self, vm: VmRequest) -> IntArray:
        broken = np.zeros(len(self.hosts), dtype=np.int64)
        for group in vm.groups:
            if not group.hard:
                broken += ~self._kept(group)
        return broken

    def _kept(self, group: Group) -> _Flags:
        """`Replay.keeps` of every host."""
        members = self._members.get(group.name, [])
        domains = self._domains[group.level]
        taken = np.zeros(len(self.hosts), dtype=np.bool_)
        taken[domains[members]] = True
        here: _Flags = taken[domains]
        return ~here if group.apart else here | (not members)

    # --- what is remembered ------------------------------------------------------------------------------------------

    def _look(self, profile: Profile) -> _Looked:
        looked = self._looked.get(profile)
        if looked is None:
            # Without groups and hosts it is kept from, which are the VM's and not its profile's.
            vm = VmRequest(self.request.vms[0].vm_id, "", profile)
            fits, scores = np.zeros(len(self.hosts), dtype=np.bool_), np.zeros(len(self.hosts))
            looked = self._looked[profile] = _Looked(vm, fits, scores, len(self._changes), self.means[0])
            stale: set[int] | range = range(len(self.hosts))
        else:
            stale = set(self._changes[looked.seen :])
        for row in stale:
            self._look_at(looked, row)
        if looked.epoch != self.means[0] and self.request.policy is not Policy.PACK:
            for row in np.flatnonzero(looked.fits).tolist():
                looked.scores[row] = self.balanced(self.hosts[row], profile.shape)
        looked.seen, looked.epoch = len(self._changes), self.means[0]
        return looked

    def _look_at(self, looked: _Looked, row: int) -> None:
        host, shape = self.hosts[row], looked.vm.profile.shape
        ways = self.ways(host, looked.vm)
        first = next(ways, None)
        looked.fits[row] = first is not None
        if first is not None and self.request.policy is Policy.PACK:
            looked.scores[row] = min(self.left(host, shape, way) for way in (first, *ways))
        elif first is not None:
            looked.scores[row] = self.balanced(host, shape)

    def _part(self, looked: _Looked, row: int, cells: tuple[int, ...]) -> dict[int, Part] | None:
        return next((part for part in self.ways(self.hosts[row], looked.vm) if tuple(sorted(part)) == cells), None)

    def take(self, host: HostState, vm: VmRequest, parts: Mapping[int, Part]) -> None:
        before = {p: self.addresses[p] for family in host.prefixes for p in family if p in self.addresses}
        super().take(host, vm, parts)
        row = self._rows[host.name]
        self._changes.append(row)
        for prefix, count in before.items():
            if self._most_addresses > self.addresses[prefix] != count:
                self._changes += self._rows_of_prefix[prefix]
        for group in vm.groups:
            self._members.setdefault(group.name, []).append(row)
        self._batch[row] += 1

    def move(self, move: Move) -> bool:
        moved = super().move(move)
        if moved:
            self._changes.append(self._rows[move.host])
        return moved


def _numbered(names: list[str]) -> IntArray:
    return np.unique(names, return_inverse=True)[1].astype(np.int64)
