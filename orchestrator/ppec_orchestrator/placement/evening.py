# SPDX-License-Identifier: Apache-2.0
"""A batch placed evenly one by one, looked at again as a whole: a VM that would now be better elsewhere is moved there.

Each VM was placed before those that came after it. With all of them in place one is taken out at a time and placed
again, twice around at most; the fleet's score only falls. For small fleets and batches: it costs what planning them
again would.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ppec_contract.api import Policy
from ppec_orchestrator.placement.candidates import Candidates
from ppec_orchestrator.placement.neighbours import Neighbours
from ppec_orchestrator.placement.request import PlanRequest, VmRequest
from ppec_orchestrator.placement.search import CandidatesOf, Seat
from ppec_orchestrator.placement.workspace import EXACT_HOSTS, Taken, Workspace

MOST_VMS = 200
_ROUNDS = 2
# What is less than this is rounding.
_BETTER = 1e-9


def worth_evening(request: PlanRequest, hosts: int) -> bool:
    """Soft groups go before the score, and are left as they are."""
    soft = any(not group.hard for vm in request.vms for group in vm.groups)
    return request.policy is Policy.BALANCED and 1 < len(request.vms) <= MOST_VMS and hosts <= EXACT_HOSTS and not soft


class Evening:
    """One batch. The workspace is left as it was found."""

    def __init__(self, workspace: Workspace, candidates: CandidatesOf, request: PlanRequest) -> None:
        self._workspace = workspace
        self._candidates = candidates
        self._neighbours = Neighbours(workspace, request.contended_hosts)

    def seats(self, vms: Sequence[VmRequest], seats: Sequence[Seat]) -> list[Seat] | None:
        """Better seats for the VMs, in their order; None where theirs are good."""
        taken = [self._take(vm, seat) for vm, seat in zip(vms, seats, strict=True)]
        changed = False
        for _ in range(_ROUNDS):
            moved = [self._moved(number, vms, taken) for number in range(len(vms))]
            if not any(moved):
                break
            changed = True
        for one in reversed(taken):
            self._workspace.give_back(one)
        return [(one.row, one.columns) for one in taken] if changed else None

    def _moved(self, number: int, vms: Sequence[VmRequest], taken: list[Taken]) -> bool:
        vm, now = vms[number], taken[number]
        self._workspace.give_back(now)
        self._workspace.start_epoch(0)
        candidates = self._candidates(vm.profile, Policy.BALANCED)
        best = self._best(candidates, vm)
        better = candidates.key[best] < candidates.key[now.row] - _BETTER
        seat = (best, tuple(candidates.cells(best))) if better else (now.row, now.columns)
        taken[number] = self._take(vm, seat)
        return bool(better)

    def _best(self, candidates: Candidates, vm: VmRequest) -> int:
        key = candidates.key
        closed = self._neighbours.closed(vm)
        if closed:
            key = key.copy()
            for rows in closed:
                key[rows] = np.inf
        return int(key.argmin())

    def _take(self, vm: VmRequest, seat: Seat) -> Taken:
        row, columns = seat
        return self._workspace.take(row, columns, self._candidates(vm.profile, Policy.BALANCED).fitting, vm)
