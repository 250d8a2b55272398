# SPDX-License-Identifier: Apache-2.0
"""A way to place a whole batch where the policy's own choices, taken one after the other, leave some of it without a
place.

Depth first over the VMs, largest first, and over hosts and cells in the policy's order; what is only another name for
what has been tried is not tried again. Bounded: exact for small batches and fleets, a fair try for large ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Protocol

import numpy as np

from ppec_contract.api import Policy
from ppec_orchestrator.placement.candidates import Candidates
from ppec_orchestrator.placement.neighbours import Neighbours
from ppec_orchestrator.placement.request import PlanRequest, Profile, VmRequest
from ppec_orchestrator.placement.workspace import Taken, Workspace

# VMs put somewhere for a try. Each costs about what placing one costs.
MOST_TRIES = 4000
# Hosts tried for one VM, of those that are not alike.
MOST_HOSTS = 256

# Where a VM goes: a row, and columns.
Seat = tuple[int, tuple[int, ...]]


class CandidatesOf(Protocol):
    def __call__(self, profile: Profile, policy: Policy) -> Candidates: ...


class Search:
    """One search of one batch. The workspace is left as it was found."""

    def __init__(self, workspace: Workspace, candidates: CandidatesOf, request: PlanRequest) -> None:
        self._workspace = workspace
        self._candidates = candidates
        self._neighbours = Neighbours(workspace, request.contended_hosts)
        self._policy = request.policy
        self._lonely = not any(vm.groups for vm in request.vms)
        self._tries = MOST_TRIES
        # What came to nothing, by who sits where: equal VMs may trade seats.
        self._dead: set[tuple[int, frozenset[tuple[object, int]]]] = set()

    def seats(self, vms: Sequence[VmRequest]) -> list[Seat] | None:
        """A seat for each of the VMs, in their order; None where there is none, or none was found within the bound."""
        found: list[Seat] = []
        return found if self._place(vms, found, Counter()) else None

    def _place(self, vms: Sequence[VmRequest], found: list[Seat], seated: Counter[object]) -> bool:
        if len(found) == len(vms):
            return True
        position = (len(found), frozenset(seated.items()))
        if position in self._dead:
            return False
        vm = vms[len(found)]
        for seat in list(self._open_seats(vm)):
            if self._tries <= 0:
                return False
            self._tries -= 1
            taken = self._take(vm, seat)
            found.append(seat)
            who = (seat, vm.profile, vm.groups)
            seated[who] += 1
            placed = self._place(vms, found, seated)
            self._workspace.give_back(taken)
            if placed:
                return True
            found.pop()
            seated[who] -= 1
            if not seated[who]:
                del seated[who]
        self._dead.add(position)
        return False

    def _take(self, vm: VmRequest, seat: Seat) -> Taken:
        row, columns = seat
        return self._workspace.take(row, columns, self._candidates(vm.profile, self._policy).fitting, vm)

    def _open_seats(self, vm: VmRequest) -> Iterator[Seat]:
        candidates = self._candidates(vm.profile, self._policy)
        key = candidates.key.copy()
        for rows in self._neighbours.closed(vm):
            key[rows] = np.inf
        seen: set[object] = set()
        for row in np.argsort(key, kind="stable")[: int(np.count_nonzero(key < np.inf))]:
            if len(seen) >= MOST_HOSTS:
                return
            for columns in self._columns(candidates, int(row)):
                look = self._look(int(row), columns)
                # Where groups count, no two hosts are alike.
                if self._lonely and look in seen:
                    continue
                seen.add(look)
                yield int(row), columns

    def _columns(self, candidates: Candidates, row: int) -> Iterator[tuple[int, ...]]:
        """All sets of cells that would do, the policy's first."""
        first = tuple(candidates.cells(row))
        yield first
        fitting, workspace = candidates.fitting, self._workspace
        can = fitting.able(workspace.free, row, len(first))
        threads, socket = workspace.fleet.threads_per_core[row], workspace.fleet.socket[row]
        near = len({int(socket[column]) for column in first}) == 1
        for columns in combinations(can, len(first)):
            of_one_socket = len({int(socket[column]) for column in columns}) == 1
            if columns != first and len({int(threads[c]) for c in columns}) == 1 and (of_one_socket or not near):
                yield columns

    def _look(self, row: int, columns: tuple[int, ...]) -> object:
        """What of a seat matters to this batch: two that look alike lead to the same."""
        workspace = self._workspace
        host = workspace.fleet.hosts[row]
        free = tuple(
            tuple(int(amounts[row, column]) for amounts in workspace.free.values())
            for column in range(workspace.fleet.threads_per_core.shape[1])
        )
        taken, left = [free[column] for column in columns], [f for c, f in enumerate(free) if c not in columns]
        # Cells of different sockets or widths are told apart by their place.
        places = tuple(workspace.fleet.socket[row]) + tuple(workspace.fleet.threads_per_core[row])
        if len(columns) > 1:
            return row, columns
        return (
            host.cluster, host.rack, host.vrf, host.region, host.datacentre, host.prefixes, host.capabilities,
            tuple(sorted(host.labels.items())), tuple(sorted(host.pools)), places, tuple(sorted(taken)),
            tuple(sorted(left)), int(workspace.disk_free_mib[row]), row if host.pools else -1,
        )  # fmt: skip
