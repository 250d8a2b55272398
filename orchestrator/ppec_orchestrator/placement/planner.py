# SPDX-License-Identifier: Apache-2.0
"""The planner: places a batch of equal VMs one after the other and says of every other VM why not.

>>> plan(fleet, request).placed[0]
Placement(vm_id=…, name='web-1', host_id=3, host='h3', cells=(1,), cores=4, memory_mib=8192, disk_mib=20480)
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from ppec_orchestrator.placement.demand import CELL_RESOURCES
from ppec_orchestrator.placement.filters import STANDING
from ppec_orchestrator.placement.fleet import BoolArray, Fleet
from ppec_orchestrator.placement.policies import Ranking
from ppec_orchestrator.placement.request import Placement, Plan, PlanRequest, Reason, Refusal, VmRequest
from ppec_orchestrator.placement.room import Room


def plan(fleet: Fleet, request: PlanRequest) -> Plan:
    """Never raises for want of room: what does not fit is refused with counted reasons. The fleet is not changed."""
    return _Batch(fleet, request).run()


class _Batch:
    def __init__(self, fleet: Fleet, request: PlanRequest) -> None:
        self.fleet = fleet
        self.request = request
        self.room = Room(fleet, request.shape, request.networks)
        known = ((fleet.index[name], n) for name, n in request.batch_hosts.items() if name in fleet.index)
        self.ranking = Ranking(self.room, request.policy, known)
        self.standing = [(reason, passes(fleet, request)) for reason, passes in STANDING]
        self.eligible: BoolArray = np.ones(len(fleet.hosts), dtype=np.bool_)
        for _, mask in self.standing:
            self.eligible &= mask

    def run(self) -> Plan:
        placed: list[Placement] = []
        refused: list[Refusal] = []
        for vm in self.request.vms:
            found = self._place(vm)
            if found is None:
                refused.append(Refusal(vm.vm_id, vm.name, self._reasons(vm)))
            else:
                placed.append(found)
        return Plan(tuple(placed), tuple(refused))

    def _place(self, vm: VmRequest) -> Placement | None:
        allowed = self.eligible & self.room.fits
        for name in vm.excluded_hosts & self.fleet.index.keys():
            allowed[self.fleet.index[name]] = False
        row = self.ranking.best(allowed)
        if row is None:
            return None
        columns = self.room.best_cells(row)
        per_cell = dict.fromkeys(CELL_RESOURCES, 0) | self.room.take(row, columns)
        self.ranking.placed(row)
        host = self.fleet.hosts[row]
        return Placement(
            vm_id=vm.vm_id,
            name=vm.name,
            host_id=host.host_id,
            host=host.name,
            cells=tuple(host.cells[column].cell for column in columns),
            disk_mib=self.request.shape.disk_mib,
            **per_cell,
        )

    def _reasons(self, vm: VmRequest) -> dict[Reason, int]:
        counted: Counter[Reason] = Counter()
        for row, host in enumerate(self.fleet.hosts):
            standing = next((reason for reason, mask in self.standing if not mask[row]), None)
            if standing is not None:
                counted[standing] += 1
            elif host.name in vm.excluded_hosts:
                counted[Reason.FAILED_BEFORE] += 1
            else:
                counted[self.room.reason(row)] += 1
        return dict(counted)
