# SPDX-License-Identifier: Apache-2.0
"""What goes before the score: the order that a batch's VMs are placed in, and the ranks of hosts for each of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ppec_orchestrator.placement.fleet import Fleet, IntArray
from ppec_orchestrator.placement.policies import POLICIES
from ppec_orchestrator.placement.request import PlanRequest, VmRequest
from ppec_orchestrator.placement.workspace import Workspace


class Ranks:
    """What comes before the score: fewest soft groups broken, then (where the policy keeps a batch apart) the fewest
    VMs of the batch on the host, then the fewest in the rack."""

    def __init__(self, fleet: Fleet, request: PlanRequest) -> None:
        self._fleet = fleet
        self.matter = POLICIES[request.policy].apart
        self._on_host: IntArray = np.zeros(len(fleet.hosts), dtype=np.int64)
        self._on_rack: IntArray = np.zeros(len(fleet.hosts), dtype=np.int64)
        if self.matter:
            for name, count in request.batch_hosts.items():
                if name in fleet.index:
                    self._count(fleet.index[name], count)

    def placed(self, row: int) -> None:
        self._count(row, 1)

    def of(self, workspace: Workspace, vm: VmRequest) -> tuple[IntArray, IntArray | None]:
        """Per host: its rank, and how many of the VM's soft groups it breaks (None where the VM has none)."""
        broken: IntArray | None = None
        for group in vm.groups:
            rows = None if group.hard else workspace.groups.rows(group)
            if rows is None:
                continue
            if broken is None:
                broken = np.zeros(len(self._on_host), dtype=np.int64)
            if group.apart:
                broken[rows] += 1
            else:
                broken += 1
                broken[rows] -= 1
        # No batch has as many VMs as the next factor.
        apart = (self._on_host << 20) + self._on_rack
        return apart + ((broken << 40) if broken is not None else 0), broken

    def broken(self, workspace: Workspace, vm: VmRequest, row: int) -> int:
        """How many of the VM's soft groups this host breaks."""
        broken = self.of(workspace, vm)[1]
        return int(broken[row]) if broken is not None else 0

    def _count(self, row: int, count: int) -> None:
        self._on_host[row] += count
        self._on_rack[self._fleet.places["rack"][self._fleet.hosts[row].rack]] += count


def order(request: PlanRequest) -> Sequence[int]:
    """The order VMs are placed in. All or nothing: the largest first, so that the plan is the same whatever order they
    came in; otherwise as they came. The priority goes before both."""
    vms = request.vms
    if not request.all_or_nothing:
        if all(not vm.priority for vm in vms):
            return range(len(vms))
        return sorted(range(len(vms)), key=lambda index: -vms[index].priority)

    def size(index: int) -> tuple[object, ...]:
        vm, shape = vms[index], vms[index].profile.shape
        return (-vm.priority, -shape.vcpus, -shape.memory_mib, -shape.disk_mib, len(vm.name), vm.name)

    return sorted(range(len(vms)), key=size)
