# SPDX-License-Identifier: Apache-2.0
"""What goes before the score: the order that a batch's VMs are placed in, and the ranks of hosts for each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ppec_orchestrator.placement.balance import Floats
from ppec_orchestrator.placement.fleet import Fleet, IntArray
from ppec_orchestrator.placement.policies import POLICIES
from ppec_orchestrator.placement.request import PlanRequest, VmRequest
from ppec_orchestrator.placement.workspace import Workspace

# A VM more on the host outweighs all on the rack, a soft group broken outweighs both: no batch has as many VMs.
_HOST, _GROUP = 1 << 20, 1 << 40
# For how many ranks, from the lowest on, it is kept which hosts have them.
_LEVELS = 3
# Of hosts that don't take the VM: above all others.
_NO_RANK = np.iinfo(np.int64).max


class Ranks:
    """What comes before the score: fewest soft groups broken, then (where the policy keeps a batch apart) the fewest
    VMs of the batch on the host, then the fewest in the rack."""

    def __init__(self, fleet: Fleet, request: PlanRequest) -> None:
        self._fleet = fleet
        self.matter = POLICIES[request.policy].apart
        # How many VMs of the batch are on a host, and in a rack.
        self._on_host = np.zeros(len(fleet.hosts), dtype=np.int64)
        self._in_rack = np.zeros(len(fleet.racks), dtype=np.int64)
        # By level: 0 for hosts whose rank is the lowest there is, or above it by no more than the level; infinite for
        # all others. Ranks only grow: a VM that is placed takes its whole rack up a level, and who is left stays
        # lowest. `_racks` are by level the racks that have hosts of just that; once none has any of the lowest, that is
        # looked for again.
        self._above: list[Floats] = [np.zeros(len(fleet.hosts)) for _ in range(_LEVELS if self.matter else 0)]
        self._racks = [set(range(len(fleet.racks))), *(set[int]() for _ in range(1, _LEVELS))]
        self._scratch: Floats = np.empty(len(fleet.hosts))
        if self.matter and request.batch_hosts:
            self._count_before(request.batch_hosts)

    def placed(self, row: int) -> None:
        rack = self._fleet.rack_numbers.item(row)
        self._on_host[row] += 1
        self._in_rack[rack] += 1
        for level, racks in enumerate(self._racks):
            if rack in racks:
                racks.remove(rack)
                self._take_up(row, rack, level)
                break

    def best(self, key: Floats, workspace: Workspace, vm: VmRequest) -> tuple[int, int]:
        """Of the hosts with a finite key, of which there are some, the one that is best by rank and key; and how many
        of the VM's soft groups it breaks."""
        broken = self._broken(workspace, vm)
        if broken is not None:
            row = self._first(key, broken)
            return row, int(broken[row])
        if not self.matter:
            return int(key.argmin()), 0
        if not self._racks[0]:
            self._look_for_lowest()
        # As a rule some host of the lowest ranks takes the VM: then no ranks need be worked out.
        for above in self._above:
            keys = np.add(key, above, out=self._scratch)
            row = int(keys.argmin())
            if keys.item(row) < np.inf:
                return row, 0
        return self._first(key, None), 0

    def broken(self, workspace: Workspace, vm: VmRequest, row: int) -> int:
        """How many of the VM's soft groups this host breaks."""
        broken = self._broken(workspace, vm)
        return int(broken[row]) if broken is not None else 0

    def _look_for_lowest(self) -> None:
        """Which hosts are of the lowest rank, now that none has the one that was lowest."""
        higher = self._apart()
        higher -= higher.min()
        for level, racks in enumerate(self._racks):
            self._above[level] = np.where(higher <= level, 0.0, np.inf)
            racks.clear()
            racks.update(np.flatnonzero(np.bincount(self._fleet.rack_numbers[higher == level])).tolist())

    def _first(self, key: Floats, broken: IntArray | None) -> int:
        """Of the hosts with a finite key: the lowest rank, of those the lowest key."""
        ranks = self._apart()
        if broken is not None:
            ranks += broken * _GROUP
        ranks = np.where(key < np.inf, ranks, _NO_RANK)
        rows = np.flatnonzero(ranks == ranks.min())
        return rows.item(key.take(rows).argmin())

    def _broken(self, workspace: Workspace, vm: VmRequest) -> IntArray | None:
        """Per host; None where the VM has no soft groups."""
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
        return broken

    def _apart(self) -> IntArray:
        """What the VMs of the batch on the hosts and in their racks make their ranks."""
        return self._on_host * _HOST + self._in_rack.take(self._fleet.rack_numbers)

    def _count_before(self, batch_hosts: Mapping[str, int]) -> None:
        """VMs of the batch that stood there before the plan."""
        for name, count in batch_hosts.items():
            if name in self._fleet.index:
                row = self._fleet.index[name]
                self._on_host[row] += count
                self._in_rack[self._fleet.rack_numbers[row]] += count
        self._racks[0].clear()

    def _take_up(self, row: int, rack: int, level: int) -> None:
        """A rack left its level for the next; the host that was placed on is above them all."""
        self._above[level][self._fleet.racks[rack]] = np.inf
        if level + 1 < _LEVELS:
            self._racks[level + 1].add(rack)
            for above in self._above[level + 1 :]:
                above[row] = np.inf


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
