# SPDX-License-Identifier: Apache-2.0
"""What a VM lacks on each host: how much would have to be freed there, at the least."""

from __future__ import annotations

import numpy as np

from ppec_orchestrator.placement.balance import Floats
from ppec_orchestrator.placement.changes import Room
from ppec_orchestrator.placement.demand import CellResource
from ppec_orchestrator.placement.fitting import Fitting
from ppec_orchestrator.placement.workspace import Workspace

# How much of each resource is as hard to free as one core: about what stands on it.
_AS_A_CORE: dict[CellResource, float] = {
    "cores": 1.0, "shared_vcpus": 4.0, "memory_mib": 4096.0, "pages_2m": 2048.0, "pages_1g": 4.0, "nvme": 0.125,
}  # fmt: skip
_DISK_MIB_AS_A_CORE = 32768.0


class Shortage:
    """`weights` per host, in cores' worth: what is lacking in the cells where least is, and of disk. Infinite where
    even an empty host would not do, or nothing is lacking."""

    def __init__(self, workspace: Workspace, fitting: Fitting) -> None:
        self._workspace = workspace
        self._fitting = fitting
        shape, hosts = fitting.shape, len(workspace.fleet.hosts)
        by_parts = {parts: self._lacking(parts) for parts in range(1, fitting.most + 1)}
        cheapest = np.full(hosts, np.inf)
        self._parts = np.ones(hosts, dtype=np.int64)
        self._order = {parts: np.argsort(lacking, axis=1, kind="stable") for parts, lacking in by_parts.items()}
        for parts, lacking in by_parts.items():
            weight = np.sort(lacking, axis=1)[:, :parts].sum(axis=1)
            self._parts = np.where(weight < cheapest, parts, self._parts)
            cheapest = np.minimum(weight, cheapest)
        whole = workspace.fleet.disk_mib if not shape.pool else _pool_sizes(workspace, shape.pool)
        self._disk_mib = np.maximum(shape.disk_mib - workspace.disk(shape.pool), 0)
        total: Floats = cheapest + self._disk_mib / _DISK_MIB_AS_A_CORE
        self.weights: Floats = np.where((whole >= shape.disk_mib) & (total > 0), total, np.inf)

    def room(self, row: int) -> Room:
        """What is to be freed on the host in `row`."""
        host, parts = self._workspace.fleet.hosts[row], int(self._parts[row])
        cells: dict[int, dict[CellResource, int]] = {}
        for column in self._order[parts][row, :parts]:
            lacking = {
                resource: amount - int(self._workspace.free[resource][row, column])
                for resource, amount in self._fitting.part(row, int(column), parts).by_resource.items()
            }
            cells[host.cells[int(column)].cell] = {each: amount for each, amount in lacking.items() if amount > 0}
        return Room(host.name, cells, int(self._disk_mib[row]), self._fitting.shape.pool)

    def _lacking(self, parts: int) -> Floats:
        """Per cell, in cores' worth, for one of so many parts; infinite in cells that are too small."""
        weights: Floats = np.zeros(self._workspace.fleet.threads_per_core.shape)
        for resource, needed in self._fitting.needs(parts).items():
            short = np.maximum(needed - self._workspace.free[resource], 0) / _AS_A_CORE[resource]
            weights += np.where(self._workspace.fleet.capacity(resource) >= needed, short, np.inf)
        return weights


def _pool_sizes(workspace: Workspace, pool: str) -> Floats:
    sizes = (host.pools[pool].size_mib if pool in host.pools else -1 for host in workspace.fleet.hosts)
    return np.fromiter(sizes, dtype=np.float64, count=len(workspace.fleet.hosts))
