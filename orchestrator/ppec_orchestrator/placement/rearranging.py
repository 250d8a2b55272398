# SPDX-License-Identifier: Apache-2.0
"""A place for VMs of a batch that the policy's own choices leave without one: another of the batch goes elsewhere.

Each such VM is tried in the place of every other of the batch that would then find a place too, or find one in the same
way in its turn: ejection chains, in the literature's word, of length two. Most of the batch keeps the place that the
policy chose. Bounded, and no search for every way there is: that is `search.py`, which small batches are left to when
this finds nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ppec_orchestrator.placement.balance import Floats
from ppec_orchestrator.placement.candidates import Candidates
from ppec_orchestrator.placement.neighbours import Neighbours
from ppec_orchestrator.placement.request import PlanRequest, VmRequest
from ppec_orchestrator.placement.search import CandidatesOf
from ppec_orchestrator.placement.workspace import Seat, Taken, Workspace

# How many VMs make way for one, each in the place of the next.
MOST_IN_A_ROW = 2
# VMs put in the place of another for a try. A live fleet waits meanwhile: they take less than a second.
MOST_TRIES = 3000
# To find the best of so many hosts takes as long as one try.
HOSTS_PER_TRY = 2000
# To look which of so many VMs could make way takes as long as one try.
VMS_PER_TRY = 100


class Rearranging:
    """One batch. The workspace is left as it was found."""

    def __init__(self, workspace: Workspace, candidates: CandidatesOf, request: PlanRequest) -> None:
        self._workspace = workspace
        self._candidates_of = candidates
        self._neighbours = Neighbours(workspace, request.contended_hosts)
        self._policy = request.policy
        self._vms: Sequence[VmRequest] = ()
        self._kinds: list[object] = []
        self._taken: list[Taken | None] = []
        # Tries, for all lists of seats together.
        self.left = MOST_TRIES
        self._tries_per_look = len(workspace.fleet.hosts) // HOSTS_PER_TRY

    def seats(self, vms: Sequence[VmRequest], seats: Sequence[Seat | None]) -> list[Seat] | None:
        """A seat for each of the VMs, in their order, where these have some left out; None where that is not found."""
        self._begin(vms, seats)
        without = [number for number, one in enumerate(self._taken) if one is None]
        placed = all(self._place(number, MOST_IN_A_ROW) for number in without)
        found = self._end()
        return found if placed else None

    def first_seats(self, vms: Sequence[VmRequest], seats: Sequence[Seat]) -> list[Seat]:
        """Seats for the VMs before the first that finds none, in their order, where the first have these."""
        self._begin(vms, [*seats, *[None] * (len(vms) - len(seats))])
        all(self._place(number, MOST_IN_A_ROW) for number in range(len(seats), len(vms)))
        return self._end()

    def _begin(self, vms: Sequence[VmRequest], seats: Sequence[Seat | None]) -> None:
        self._vms, self._kinds = vms, [vm.kind for vm in vms]
        self._taken = [None if seat is None else self._take(vm, seat) for vm, seat in zip(vms, seats, strict=True)]

    def _end(self) -> list[Seat]:
        """Where the VMs now are, all of which is given back."""
        taken = [one for one in self._taken if one is not None]
        for one in reversed(taken):
            self._workspace.give_back(one)
        return [(one.row, one.columns) for one in taken]

    def _place(self, number: int, most_in_a_row: int) -> bool:
        """Whether the VM has found a place. All is as it was where it has not."""
        vm = self._vms[number]
        self.left -= self._tries_per_look
        scores = self._open_scores(vm)
        row = int(scores.argmin())
        if scores[row] < np.inf:
            self._sit(number, row)
            return True
        return any(self._place_instead(number, other, most_in_a_row) for other in self._partners(vm, most_in_a_row))

    def _place_instead(self, number: int, other: int, most_in_a_row: int) -> bool:
        """Whether the VM has got the other's place, and the other another one."""
        was = self._taken[other]
        if was is None:
            return False
        self.left -= 1
        self._workspace.give_back(was)
        self._taken[other] = None
        if self._open_scores(self._vms[number])[was.row] < np.inf:
            mine = self._sit(number, was.row)
            if self._place(other, most_in_a_row - 1):
                return True
            self._workspace.give_back(mine)
            self._taken[number] = None
        self._workspace.take_again(was)
        self._taken[other] = was
        return False

    def _partners(self, vm: VmRequest, most_in_a_row: int) -> Iterator[int]:
        """The VMs that could make way, those that leave the least of their place unused first."""
        if most_in_a_row == 0:
            return
        candidates, kind = self._candidates(vm), vm.kind
        self.left -= len(self._vms) // VMS_PER_TRY
        found = []
        for number, one in enumerate(self._taken):
            if one is None or self._kinds[number] == kind or not candidates.standing[one.row]:
                continue
            rest = self._left_instead(candidates, one)
            # The last one to make way has to find a place as things are.
            if rest is not None and (most_in_a_row > 1 or self._candidates(self._vms[number]).count):
                found.append((rest, number))
        for _, number in sorted(found):
            if self.left <= 0:
                return
            yield number

    def _left_instead(self, candidates: Candidates, one: Taken) -> tuple[int, int] | None:
        """CPUs and memory that the VM would leave in a cell of the other's; None where it is short of either, and can't
        do with several cells."""
        free, fitting, rests = self._workspace.free, candidates.fitting, []
        for column in one.columns:
            mine, theirs = fitting.part(one.row, column, 1).by_resource, one.part.by_resource
            cpus, memory = (
                int(free[what][one.row, column]) + theirs.get(what, 0) - mine[what]
                for what in (fitting.cpu, fitting.memory)
            )
            if min(cpus, memory) >= 0 or fitting.most > 1:
                rests.append((cpus, memory))
        return min(rests, default=None)

    def _open_scores(self, vm: VmRequest) -> Floats:
        return self._neighbours.open_scores(self._candidates(vm), vm)

    def _sit(self, number: int, row: int) -> Taken:
        vm = self._vms[number]
        taken = self._take(vm, (row, tuple(self._candidates(vm).cells(row))))
        self._taken[number] = taken
        return taken

    def _take(self, vm: VmRequest, seat: Seat) -> Taken:
        row, columns = seat
        return self._workspace.take(row, columns, self._candidates(vm).fitting, vm)

    def _candidates(self, vm: VmRequest) -> Candidates:
        return self._candidates_of(vm.profile, self._policy)
