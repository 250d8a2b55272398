# SPDX-License-Identifier: Apache-2.0
"""A batch placed evenly one by one, looked at again as a whole: a VM that would now be better elsewhere is moved there,
and two that would be better in each other's place change places.

Each VM was placed before those that came after it. With all of them in place one is taken out at a time and placed
again, then each is tried in the place of every other, a few times around at most; the fleet's score only falls. That
is a local search, by moves and swaps. For small fleets and batches: it costs several times what planning them again
would.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ppec_contract.api_placement import Policy
from ppec_orchestrator.placement.balance import Balance, Floats
from ppec_orchestrator.placement.candidates import Candidates
from ppec_orchestrator.placement.fleet import IntArray
from ppec_orchestrator.placement.neighbours import Neighbours
from ppec_orchestrator.placement.request import PlanRequest, Profile, VmRequest
from ppec_orchestrator.placement.search import CandidatesOf
from ppec_orchestrator.placement.workspace import EXACT_HOSTS, Seat, Taken, Workspace

MOST_VMS = 200
_ROUNDS = 3
# How many places of others are tried for a VM, the best first: some it can't have.
_PARTNERS = 4
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
        self._candidates_of = candidates
        self._neighbours = Neighbours(workspace, request.contended_hosts)

    def seats(self, vms: Sequence[VmRequest], seats: Sequence[Seat | None]) -> list[Seat] | None:
        """Better seats for the VMs, in their order, all of which have one; None where theirs are good."""
        taken = [self._take(vm, seat) for vm, seat in zip(vms, seats, strict=True) if seat is not None]
        changes = _Changes(self._workspace.balance, [vm.profile for vm in vms], self._candidates)
        changed = False
        for _ in range(_ROUNDS):
            better = [self._moved(number, vms, taken) for number in range(len(vms))]
            better += [self._swapped(number, vms, taken, changes) for number in range(len(vms))]
            if not any(better):
                break
            changed = True
        for one in reversed(taken):
            self._workspace.give_back(one)
        return [(one.row, one.columns) for one in taken] if changed else None

    def _moved(self, number: int, vms: Sequence[VmRequest], taken: list[Taken]) -> bool:
        vm, now = vms[number], taken[number]
        self._workspace.give_back(now)
        self._workspace.start_epoch(0)
        candidates = self._candidates(vm.profile)
        best = int(self._neighbours.open_scores(candidates, vm).argmin())
        better = bool(candidates.key[best] < candidates.key[now.row] - _BETTER)
        row = best if better else self._in_fewer_cells(candidates, now)
        if row is None:
            self._workspace.take_again(now)
            return False
        taken[number] = self._take(vm, (row, tuple(candidates.cells(row))))
        return True

    def _in_fewer_cells(self, candidates: Candidates, now: Taken) -> int | None:
        """The VM's own row, if it would not spread there as it does: others have left since."""
        row = now.row
        fits = len(now.columns) > 1 and candidates.key[row] < np.inf
        return row if fits and len(candidates.cells(row)) != len(now.columns) else None

    def _swapped(self, number: int, vms: Sequence[VmRequest], taken: list[Taken], all_changes: _Changes) -> bool:
        """Whether the VM has changed places with one of those with which the score promises most."""
        balance = self._workspace.balance
        rows = np.array([one.row for one in taken])
        row, score = taken[number].row, balance.score()
        changes, theirs = all_changes.of_swaps(number, rows)
        after = balance.scores_after_two(row, changes, rows, theirs)
        after[rows == row] = np.inf
        for other in np.argsort(after, kind="stable")[:_PARTNERS].tolist():
            if after[other] >= score - _BETTER:
                return False
            if self._swap(number, other, vms, taken):
                return True
        return False

    def _swap(self, one: int, other: int, vms: Sequence[VmRequest], taken: list[Taken]) -> bool:
        """Whether each could have the other's host, and it is better so; else all is as it was."""
        workspace, before = self._workspace, (taken[one], taken[other])
        score = workspace.balance.score()
        for each in before:
            workspace.give_back(each)
        now: list[Taken] = []
        for number, row in ((one, before[1].row), (other, before[0].row)):
            if (seat := self._seat_on(row, vms[number])) is None:
                break
            now.append(self._take(vms[number], seat))
        if len(now) == len(before) and workspace.balance.score() < score - _BETTER:
            taken[one], taken[other] = now
            return True
        for each in now:
            workspace.give_back(each)
        for each in before:
            workspace.take_again(each)
        return False

    def _seat_on(self, row: int, vm: VmRequest) -> Seat | None:
        candidates = self._candidates(vm.profile)
        if not self._neighbours.open_scores(candidates, vm)[row] < np.inf:
            return None
        return row, tuple(candidates.cells(row))

    def _take(self, vm: VmRequest, seat: Seat) -> Taken:
        row, columns = seat
        return self._workspace.take(row, columns, self._candidates(vm.profile).fitting, vm)

    def _candidates(self, profile: Profile) -> Candidates:
        return self._candidates_of(profile, Policy.BALANCED)


class _Changes:
    """What each VM of a batch changes in the figures of each host."""

    def __init__(
        self, balance: Balance, profiles: Sequence[Profile], candidates: Callable[[Profile], Candidates]
    ) -> None:
        numbers = {profile: number for number, profile in enumerate(dict.fromkeys(profiles))}
        self._profile: IntArray = np.array([numbers[profile] for profile in profiles])
        # Shape (profiles, 4, hosts).
        each = [balance.changes_of(candidates(profile).weight) for profile in numbers]
        self._changes: Floats = np.stack(each)

    def of_swaps(self, number: int, rows: IntArray) -> tuple[Floats, Floats]:
        """What changes on the VM's host and on the others' when it changes places with each VM, which stand in `rows`;
        shapes (VMs, 4)."""
        row, mine = rows[number], self._changes[self._profile[number]]
        here = self._changes[self._profile, :, row] - mine[:, row]
        there = mine[:, rows].T - self._changes[self._profile, :, rows]
        return here, there
