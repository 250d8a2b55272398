# SPDX-License-Identifier: Apache-2.0
"""A VM that is to grow where it stands, under the rule of its cluster about N+1: by as much less room there would be
for what is lost elsewhere, and it needs as much more itself when its own host is lost."""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID

from ppec_orchestrator.placement.demand import cpu_part, cpu_resource, free_name, memory_part, memory_resource
from ppec_orchestrator.placement.fleet import CellState, HostState
from ppec_orchestrator.placement.plan import Exposed
from ppec_orchestrator.placement.planner import Planner
from ppec_orchestrator.placement.request import NO_SPARE_RULE, Level, Shape, Spare
from ppec_orchestrator.placement.spare_rules import SpareRules


def grown(host: HostState, vm_id: UUID, vcpus: int, memory_mib: int) -> HostState | None:
    """The host, were this VM of it so large; None where a cell has not the room. Raises StopIteration for a VM that is
    not there."""
    vm = next(each for each in host.vms if each.vm_id == vm_id)
    before = vm.profile.shape
    after = replace(before, vcpus=vcpus, memory_mib=memory_mib)
    parts = len(vm.cells)
    cells = tuple(_resized(cell, before, after, parts) if cell.cell in vm.cells else cell for cell in host.cells)
    taken = (cpu_resource(after), memory_resource(after))
    if any(getattr(cell, free_name(each)) < 0 for cell in cells if cell.cell in vm.cells for each in taken):
        return None
    larger = replace(vm, profile=replace(vm.profile, shape=after))
    return replace(host, cells=cells, vms=tuple(larger if each is vm else each for each in host.vms))


def exposed_by(planner: Planner, host: HostState) -> Exposed | None:
    """What the cluster requires to be safe and would not be any more, were the fleet's host of this name like this:
    what it is lost with itself, or a domain that is safe now. None for nothing. The planner is on its fleet again
    afterwards."""
    fleet = planner.fleet
    row = fleet.index[host.name]
    rules = SpareRules.of(fleet, NO_SPARE_RULE)
    levels = [level for level in rules.levels if rules.mode(level, host.cluster) is Spare.REQUIRED]
    before = {level: {each.domain for each in _exposed(planner, level, host.cluster)} for level in levels}
    planner.follow(fleet.changed([host]), [row])
    try:
        for level in levels:
            before[level].discard(fleet.domain(row, level))
            for each in _exposed(planner, level, host.cluster):
                if each.domain not in before[level]:
                    return each
        return None
    finally:
        planner.follow(fleet, [row])


def _exposed(planner: Planner, level: Level, cluster: str) -> list[Exposed]:
    witnesses = planner.witnesses(level)
    witnesses.look_at_for_good(cluster)
    return witnesses.exposed(cluster)


def _resized(cell: CellState, before: Shape, after: Shape, parts: int) -> CellState:
    cpus, memory = free_name(cpu_resource(after)), free_name(memory_resource(after))
    more_cpus, more_mib = (
        cpu_part(after, cell.threads_per_core, parts) - cpu_part(before, cell.threads_per_core, parts),
        memory_part(after, parts) - memory_part(before, parts),
    )
    return replace(cell, **{cpus: getattr(cell, cpus) - more_cpus, memory: getattr(cell, memory) - more_mib})
