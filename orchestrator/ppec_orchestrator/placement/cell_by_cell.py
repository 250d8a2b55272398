# SPDX-License-Identifier: Apache-2.0
"""Seats for a whole batch by filling its cells (`filling.py`), where each VM takes one cell and minds no other: of the
policy, nothing is kept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from ppec_orchestrator.placement.demand import CELL_RESOURCES
from ppec_orchestrator.placement.filling import Cells, Filling
from ppec_orchestrator.placement.fleet import IntArray
from ppec_orchestrator.placement.neighbours import Neighbours
from ppec_orchestrator.placement.request import PlanRequest, VmRequest
from ppec_orchestrator.placement.search import CandidatesOf, Seat
from ppec_orchestrator.placement.workspace import Workspace

# Of more kinds a cell has more fillings than can be looked at.
MOST_KINDS = 32
# More than there is of anything.
_NEVER = np.int64(1) << 40


class CellByCell:
    """One batch. The workspace is not changed. `exhausted` as of `Filling`."""

    def __init__(self, workspace: Workspace, candidates: CandidatesOf, request: PlanRequest) -> None:
        self.exhausted = False
        self._workspace = workspace
        self._candidates_of = candidates
        self._neighbours = Neighbours(workspace, request.contended_hosts)
        self._policy = request.policy

    def applies(self, vms: Sequence[VmRequest]) -> bool:
        """Whether who is there first makes no difference to who comes next."""
        networks = sum(len(vm.profile.networks) for vm in vms)
        return (
            len({vm.kind for vm in vms}) <= MOST_KINDS
            and not any(vm.groups or vm.profile.shape.numa.multi_cell for vm in vms)
            and not (self._workspace.addresses.kinds_short_of(networks) >= 0).any()
        )

    def seats(self, vms: Sequence[VmRequest]) -> list[Seat] | None:
        """A seat for each of the VMs, in their order; None where that is not found."""
        numbers: defaultdict[object, list[int]] = defaultdict(list)
        for number, vm in enumerate(vms):
            numbers[vm.kind].append(number)
        of_kinds = [vms[mine[0]] for mine in numbers.values()]
        cells, rows, columns = self._cells(of_kinds)
        filling = Filling(cells, [len(mine) for mine in numbers.values()])
        found = filling.run()
        self.exhausted = filling.exhausted
        if found is None:
            return None
        seats: dict[int, Seat] = {}
        waiting: list[Iterator[int]] = [iter(mine) for mine in numbers.values()]
        for cell, kind in found:
            seats[next(waiting[kind])] = rows.item(cell), (columns.item(cell),)
        return [seats[number] for number in range(len(vms))]

    def _cells(self, vms: Sequence[VmRequest]) -> tuple[Cells, IntArray, IntArray]:
        """Those that any of these VMs fits, and their rows and columns."""
        all_of_it = [self._candidates_of(vm.profile, self._policy) for vm in vms]
        resources = [each for each in CELL_RESOURCES if any(each in one.fitting.resources for one in all_of_it)]
        room: IntArray = np.stack([self._workspace.free[each] for each in resources], axis=-1).clip(min=0)
        needs: IntArray = np.zeros((*room.shape[:2], len(vms), len(resources)), dtype=np.int64)
        for kind, (vm, candidates) in enumerate(zip(vms, all_of_it, strict=True)):
            for resource, amount in candidates.fitting.needs(1).items():
                needs[:, :, kind, resources.index(resource)] = amount
            needs[~self._neighbours.stands(candidates, vm), :, kind] = _NEVER
        rows, columns = np.nonzero(np.any(np.all(room[:, :, None] >= needs, axis=3), axis=2))
        hosts, host = np.unique(rows, return_inverse=True)
        pools = list(dict.fromkeys(vm.profile.shape.pool for vm in vms))
        disk: IntArray = np.stack([self._workspace.disk(pool)[hosts] for pool in pools], axis=-1)
        disk_needs = [[vm.profile.shape.disk_mib * (vm.profile.shape.pool == pool) for pool in pools] for vm in vms]
        cells = Cells(room[rows, columns], needs[rows, columns], host, disk, np.array(disk_needs, dtype=np.int64))
        return cells, rows, columns
