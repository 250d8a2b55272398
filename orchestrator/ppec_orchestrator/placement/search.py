# SPDX-License-Identifier: Apache-2.0
"""A way to place a whole batch where the policy's own choices, taken one after the other, leave some of it without a
place.

Depth first over the VMs, those with the fewest hosts first, and over hosts and cells in the policy's order; if that
leads nowhere, once more in the order the VMs are planned in, the largest first. That is backtracking with a table of
dead positions; and what is only another name for what has been tried is not tried again (`looks.py`). Bounded: exact
for small batches and fleets, a fair try for large ones."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations, islice
from typing import Protocol

import numpy as np

from ppec_contract.api_placement import Policy
from ppec_orchestrator.placement.balance import Floats
from ppec_orchestrator.placement.candidates import Candidates
from ppec_orchestrator.placement.fleet import BoolArray
from ppec_orchestrator.placement.looks import Looks
from ppec_orchestrator.placement.neighbours import Neighbours
from ppec_orchestrator.placement.request import PlanRequest, Profile, VmRequest
from ppec_orchestrator.placement.workspace import Seat, Taken, Workspace

# VMs put somewhere for a try, in one search of up to so many VMs. A live fleet waits meanwhile: they take a second or
# two. Of larger batches fewer are tried: a way that is found at all is then found early.
MOST_TRIES, MOST_VMS = 8000, 24
# To bring so many hosts into the policy's order takes as long as one try.
HOSTS_PER_TRY = 1000
# Hosts tried for one VM, of those that are not alike; and sets of cells on one of them.
MOST_HOSTS, MOST_SETS = 256, 256


class CandidatesOf(Protocol):
    def __call__(self, profile: Profile, policy: Policy) -> Candidates: ...


class Search:
    """One search of one batch. The workspace is left as it was found."""

    def __init__(self, workspace: Workspace, candidates: CandidatesOf, request: PlanRequest) -> None:
        self.workspace = workspace
        self._candidates = candidates
        self._neighbours = Neighbours(workspace, request.contended_hosts)
        self._policy = request.policy
        self.lonely = not any(vm.groups for vm in request.vms)
        self.looks = Looks(workspace, request.vms, self._stands(request))
        several = any(vm.profile.shape.numa.multi_cell for vm in request.vms)
        # Who is there first decides over how many cells a VM spreads, of which prefix it has its address, and where
        # its group is.
        self._order_matters = not self.lonely or several or bool((self.looks.short >= 0).any())

    def seats(self, vms: Sequence[VmRequest]) -> list[Seat] | None:
        """A seat for each of the VMs, in their order; None where there is none, or none was found within the bound."""
        asked, fewest = list(range(len(vms))), self._fewest_first(vms)
        half = MOST_TRIES * MOST_VMS // max(len(vms), MOST_VMS) // 2
        descent = _Descent(self, [vms[index] for index in fewest], half)
        found = descent.run()
        if found is not None:
            seats = [seat for _, seat in sorted(zip(fewest, found, strict=True))]
            if fewest == asked or not self._order_matters or self._do_as_asked(vms, seats):
                return seats
        elif descent.left > 0 and not self._order_matters:
            return None
        return _Descent(self, vms, half + max(descent.left, 0)).run()

    # --- what the descent asks for -----------------------------------------------------------------------------------

    def candidates(self, vm: VmRequest) -> Candidates:
        return self._candidates(vm.profile, self._policy)

    def key(self, vm: VmRequest) -> Floats:
        return self._neighbours.open_scores(self.candidates(vm), vm)

    def take(self, vm: VmRequest, seat: Seat) -> Taken:
        row, columns = seat
        return self.workspace.take(row, columns, self.candidates(vm).fitting, vm)

    # -------------------------------------------------------------------------------------------------------------

    def _stands(self, request: PlanRequest) -> list[BoolArray]:
        """Per kind of VM: the hosts that nothing lasting closes to it."""
        kinds = {(vm.profile, vm.excluded_hosts): vm for vm in request.vms}.values()
        return [self._neighbours.stands(self.candidates(vm), vm) for vm in kinds]

    def _fewest_first(self, vms: Sequence[VmRequest]) -> list[int]:
        hosts = [int(np.count_nonzero(self.key(vm) < np.inf)) for vm in vms]
        return sorted(range(len(vms)), key=hosts.__getitem__)

    def _do_as_asked(self, vms: Sequence[VmRequest], seats: Sequence[Seat]) -> bool:
        """Whether each of the seats is open when its VM's turn comes, to as many cells."""
        taken: list[Taken] = []
        for vm, seat in zip(vms, seats, strict=True):
            row, columns = seat
            if not self.key(vm)[row] < np.inf or len(self.candidates(vm).cells(row)) != len(columns):
                break
            taken.append(self.take(vm, seat))
        for one in reversed(taken):
            self.workspace.give_back(one)
        return len(taken) == len(vms)


class _Descent:
    """Through the VMs in one order, with so many tries `left`."""

    def __init__(self, search: Search, vms: Sequence[VmRequest], left: int) -> None:
        self.left = left
        self._search = search
        self._vms = vms
        self._found: list[Seat] = []
        self._numbers: dict[object, int] = {}
        self._kinds = [self._number(vm.kind) for vm in vms]
        self._first_looks = search.looks.of_row.copy()
        # What makes a position, each in a number: how the hosts in use look, or who sits where; and addresses used.
        self._touched: dict[int, int] = {}
        self._seated: list[int] = []
        self._addresses: Counter[int] = Counter()
        # Positions that came to nothing, by how many VMs were placed: equal VMs, and hosts, may trade places.
        self._dead: set[tuple[int, bytes]] = set()

    def run(self) -> list[Seat] | None:
        return self._found if self._place() else None

    def _place(self) -> bool:
        depth = len(self._found)
        if depth == len(self._vms):
            return True
        position = (depth, self._position())
        if position in self._dead:
            return False
        for seat in self._open_seats(self._vms[depth]):
            if self.left <= 0:
                return False
            self.left -= 1
            if self._try(depth, seat):
                return True
        self._dead.add(position)
        return False

    def _try(self, depth: int, seat: Seat) -> bool:
        """Whether all the others have a seat with this one taken, which is given back."""
        row, before = seat[0], self._touched.get(seat[0])
        taken = self._search.take(self._vms[depth], seat)
        self._found.append(seat)
        look = self._search.looks.look_again(row)
        self._note(depth, seat, taken)
        placed = self._place()
        self._search.workspace.give_back(taken)
        self._search.looks.back_to(row, look)
        if placed:
            return True
        self._found.pop()
        self._forget(row, before, taken)
        return False

    def _note(self, depth: int, seat: Seat, taken: Taken) -> None:
        row, looks = seat[0], self._search.looks
        if self._search.lonely:
            self._touched[row] = self._number((self._first_looks.item(row), looks.of_row.item(row)))
        else:
            # Where groups count, no two hosts are alike.
            self._seated.append(self._number((seat, self._kinds[depth])))
        self._addresses.update(dict(taken.addresses))

    def _forget(self, row: int, before: int | None, taken: Taken) -> None:
        if not self._search.lonely:
            self._seated.pop()
        elif before is None:
            del self._touched[row]
        else:
            self._touched[row] = before
        self._addresses.subtract(dict(taken.addresses))

    def _position(self) -> bytes:
        addresses = [self._number(("address", prefix, count)) for prefix, count in self._addresses.items() if count]
        return array("q", sorted([*self._touched.values(), *self._seated, *addresses])).tobytes()

    def _number(self, what: object) -> int:
        return self._numbers.setdefault(what, len(self._numbers))

    # --- where one VM could go -------------------------------------------------------------------------------------

    def _open_seats(self, vm: VmRequest) -> Iterator[Seat]:
        """Nothing else may be taken when the next is asked for."""
        for row in self._rows(vm):
            seen: set[tuple[int, ...]] = set()
            for columns in self._columns(self._search.candidates(vm), row):
                cells = self._search.looks.of_cell[row]
                look = tuple(sorted(cells.item(column) for column in columns))
                if look not in seen:
                    seen.add(look)
                    yield row, columns

    def _rows(self, vm: VmRequest) -> Iterator[int]:
        """In the policy's order, of those that look alike the first. Few are asked for the second."""
        key = self._search.key(vm)
        first = int(key.argmin())
        if not key[first] < np.inf:
            return
        yield first
        key = self._search.key(vm)
        self.left -= len(key) // HOSTS_PER_TRY
        rows = np.flatnonzero(key < np.inf)
        rows = rows[np.argsort(key[rows], kind="stable")]
        if self._search.lonely:
            _, firsts = np.unique(self._search.looks.of_row[rows], return_index=True)
            rows = rows[np.sort(firsts)]
        yield from rows[1:MOST_HOSTS].tolist()

    def _columns(self, candidates: Candidates, row: int) -> Iterator[tuple[int, ...]]:
        """All sets of cells that would do, the policy's first."""
        first = tuple(candidates.cells(row))
        yield first
        fitting, workspace = candidates.fitting, self._search.workspace
        can = fitting.able(workspace.free, row, len(first))
        threads, socket = workspace.fleet.threads_per_core[row], workspace.fleet.socket[row]
        near = len({int(socket[column]) for column in first}) == 1
        for columns in islice(combinations(can, len(first)), MOST_SETS):
            of_one_socket = len({int(socket[column]) for column in columns}) == 1
            if columns != first and len({int(threads[c]) for c in columns}) == 1 and (of_one_socket or not near):
                yield columns
