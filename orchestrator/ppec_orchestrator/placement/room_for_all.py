# SPDX-License-Identifier: Apache-2.0
"""What takes no search: that VMs are too many to all have room on some hosts."""

from __future__ import annotations

from collections.abc import Sequence

from ppec_orchestrator.placement.demand import CELL_RESOURCES, CellResource, memory_part
from ppec_orchestrator.placement.fitting import Fitting
from ppec_orchestrator.placement.fleet import IntArray
from ppec_orchestrator.placement.workspace import Workspace


def too_many(workspace: Workspace, fittings: Sequence[Fitting], rows: IntArray) -> bool:
    """Of some resource the VMs need more than all these hosts have; or of VMs that need a given amount in one cell
    there are more than cells hold. One fitting for each VM."""
    if not len(rows):
        return bool(fittings)
    free = {resource: workspace.free[resource].take(rows, axis=0) for resource in CELL_RESOURCES}
    total = dict.fromkeys(CELL_RESOURCES, 0)
    in_one_cell: dict[CellResource, list[int]] = {}
    disk: dict[str, int] = {}
    fewest = {fitting: int(fitting.fewest(rows).min()) for fitting in set(fittings)}
    for fitting in fittings:
        shape = fitting.shape
        for resource, amount in ((fitting.cpu, fewest[fitting]), (fitting.memory, memory_part(shape))):
            total[resource] += amount
            if fitting.most == 1:
                in_one_cell.setdefault(resource, []).append(amount)
        disk[shape.pool] = disk.get(shape.pool, 0) + shape.disk_mib
    if any(amount > int(free[resource].sum()) for resource, amount in total.items()):
        return True
    if any(amount > int(workspace.disk(pool).take(rows).sum()) for pool, amount in disk.items()):
        return True
    return any(
        amount > 0
        and sum(1 for other in amounts if other >= amount) > int((free[resource] // amount).clip(min=0).sum())
        for resource, amounts in in_one_cell.items()
        for amount in set(amounts)
    )
