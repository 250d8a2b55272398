# SPDX-License-Identifier: Apache-2.0
"""Checks a plan against its fleet and request: what the planner worked out is not believed.

The plan is played through step by step (`replay.py`), by rules in plain words (`host_rules.py`), and what it says of
itself held against that. None of the three has any of the planner's code but its data, so that a plan on which both
agree is right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from ppec_orchestrator.placement.fleet import BoolArray, Fleet, IntArray
from ppec_orchestrator.placement.host_rules import Seat
from ppec_orchestrator.placement.plan import Evidence, Placement, Plan, Refusal
from ppec_orchestrator.placement.replay import Ranks, Replay
from ppec_orchestrator.placement.request import Level, PlanRequest, Spare, VmRequest

# Sums come out a little different in another order, and a root near zero makes much of a little. What `pack` counts is
# whole, and so never this near.
_SLACK = 1e-6


def check(fleet: Fleet, request: PlanRequest, plan: Plan) -> list[str]:
    """The faults found, none for a sound plan. Every VM is answered once; each placement fits where it stands, when its
    turn came, and none of the hosts that fit was better; where a VM was refused, none did fit."""
    answered = Counter([place.vm_id for place in plan.placed] + [refusal.vm_id for refusal in plan.refused])
    if answered != Counter(vm.vm_id for vm in request.vms):
        return ["the plan does not answer each VM of the request once"]
    if [why.vm_id for why in plan.evidence] != [place.vm_id for place in plan.placed]:
        return ["the plan has not the evidence of each placement, in their order"]
    steps: dict[int, tuple[Placement, Evidence] | Refusal] = {one.step: one for one in plan.refused}
    steps |= {why.step: (place, why) for place, why in zip(plan.placed, plan.evidence, strict=True)}
    by_id, turns = {vm.vm_id: vm for vm in request.vms}, _Turns(Replay(fleet, request), plan)
    faults: list[str] = []
    for step in sorted(steps):
        answer = steps[step]
        if isinstance(answer, Refusal):
            faults += turns.refused(by_id[answer.vm_id], answer)
        else:
            faults += turns.placed(by_id[answer[0].vm_id], *answer)
    return faults if len(steps) == len(request.vms) else [*faults, "two VMs were planned in one step"]


class _Turns:
    """One VM after the other: what is wrong with its answer."""

    def __init__(self, replay: Replay, plan: Plan) -> None:
        self._replay, self._hosts, self._request = replay, replay.fleet.hosts, replay.request
        # Which hosts N+1 closes is not worked out here, but for those that the plan itself says can't be lost.
        self._all_open = self._request.spare.mode is not Spare.REQUIRED
        by_host = not self._all_open and self._request.spare.level is Level.HOST
        self._exposed = {each.domain for each in plan.exposed} if by_host else set()

    def refused(self, vm: VmRequest, refusal: Refusal) -> Iterator[str]:
        """It fits nowhere, and each host is counted under a reason."""
        fits = np.flatnonzero(self._replay.candidates(vm)).tolist() if self._all_open else []
        if fits:
            yield f"{vm.name} was refused, but fits {self._hosts[fits[0]].name}"
        counted = sum(refusal.reasons.values())
        if counted != len(self._hosts):
            yield f"{vm.name}: {counted} hosts have a reason, of {len(self._hosts)}"

    def placed(self, vm: VmRequest, place: Placement, why: Evidence) -> Iterator[str]:
        """Its moves can be made, it fits, and it won as the evidence says. From now on it stands there."""
        replay = self._replay
        if why.epoch > replay.epoch:
            replay.start_epoch(why.epoch)
        if len(why.moves) > self._request.most_moves:
            yield f"{vm.name} moves {len(why.moves)} VMs, {self._request.most_moves} may be moved"
        stuck = [f"{move.name} can't move to cells {move.cells_after}" for move in why.moves if not replay.move(move)]
        if stuck:
            yield from stuck
            return
        row, candidates = replay.fleet.index.get(place.host, -1), replay.candidates(vm)
        seats = replay.seats(row, vm.profile) if row >= 0 and candidates[row] else ()
        seat = next((seat for seat in seats if tuple(sorted(seat)) == place.cells), None)
        if seat is None:
            yield f"{vm.name} does not fit cells {place.cells} of {place.host}"
            return
        yield from self._wrong_amounts(vm, row, place, seat)
        yield from self._wrong_evidence(vm, row, why, candidates)
        replay.take(row, vm, seat)

    def _wrong_amounts(self, vm: VmRequest, row: int, place: Placement, seat: Seat) -> Iterator[str]:
        for cell, part in seat.items():
            taken = {resource: part.get(resource, 0) for resource in place.per_cell}
            if place.per_cell != taken:
                yield f"{vm.name} takes {place.per_cell} of cell {cell}, not {taken}"
        host_id, disk_mib, pool = self._hosts[row].host_id, vm.profile.shape.disk_mib, vm.profile.shape.pool
        if (place.host_id, place.disk_mib) != (host_id, disk_mib):
            yield f"{vm.name} takes {place.disk_mib} MiB of disk of host {place.host_id}, not {disk_mib} of {host_id}"
        if place.pool != pool:
            yield f"{vm.name} takes disk of pool {place.pool!r}, not of {pool!r}"

    def _wrong_evidence(self, vm: VmRequest, row: int, why: Evidence, candidates: BoolArray) -> Iterator[str]:
        host, ranks, count = self._hosts[row].name, self._replay.ranks(vm), np.count_nonzero(candidates)
        if host in self._exposed:
            yield f"{vm.name} is on {host}, whose VMs would have no place if it were lost"
        # Neither is it worked out which other hosts moves could open.
        comparable = self._all_open and not why.moves
        if not why.moves and (count < why.candidates or (self._all_open and count > why.candidates)):
            yield f"{vm.name}: {why.candidates} candidates are claimed, there are {count}"
        broken, score = int(ranks.broken[row]), float(ranks.score[row])
        if broken != why.broken or not abs(score - why.score) <= _SLACK:
            claimed = f"a score of {why.score} and {why.broken} broken groups are claimed"
            yield f"{vm.name} on {host}: {claimed}, it is {score} and {broken}"
        better = _better(ranks, row, np.flatnonzero(candidates)) if comparable and not why.searched else None
        if better is not None:
            yield f"{vm.name}: {self._hosts[better].name} would have been better than {host}"


def _better(ranks: Ranks, row: int, rows: IntArray) -> int | None:
    """One of the hosts in `rows` that goes before the one in `row`."""
    for rank in (ranks.broken, *ranks.apart, ranks.score, *ranks.names):
        above = rank[rows] - rank[row]
        if above.min() < -_SLACK:
            return int(rows[above.argmin()])
        rows = rows[abs(above) <= _SLACK]
    return None
