# SPDX-License-Identifier: Apache-2.0
"""The fleet as it will be once a plan is carried out."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from uuid import UUID

from ppec_orchestrator.placement.addresses import grants
from ppec_orchestrator.placement.demand import CELL_RESOURCES, free_name
from ppec_orchestrator.placement.fleet import Fleet, HostState, SeatedVm
from ppec_orchestrator.placement.plan import Placement, Plan
from ppec_orchestrator.placement.request import PlanRequest, VmRequest


def settled(fleet: Fleet, request: PlanRequest, plan: Plan) -> Fleet:
    """Every placed VM holds its room, and an address of each family; the refused ones hold nothing."""
    asked = {vm.vm_id: vm for vm in request.vms}
    by_host: dict[str, list[Placement]] = defaultdict(list)
    for place in plan.placed:
        by_host[place.host].append(place)
    # In the order the plan took them: which prefix an address comes from depends on it.
    steps = {why.vm_id: why.step for why in plan.evidence}
    addresses = dict(fleet.free_addresses)
    for place in sorted(plan.placed, key=lambda each: steps.get(each.vm_id, 0)):
        host, networks = fleet.hosts[fleet.index[place.host]], asked[place.vm_id].profile.networks
        for prefix, count in (grants(host, networks, addresses) or {}).items():
            if prefix in addresses:
                addresses[prefix] -= count
    hosts = [_with(fleet.hosts[fleet.index[name]], places, asked) for name, places in by_host.items()]
    return replace(fleet.changed(hosts), free_addresses=addresses)


def _with(host: HostState, places: Sequence[Placement], asked: Mapping[UUID, VmRequest]) -> HostState:
    taken: dict[int, Counter[str]] = defaultdict(Counter)
    disk: Counter[str] = Counter()
    for place in places:
        for cell in place.cells:
            taken[cell].update({free_name(each): amount for each, amount in place.per_cell.items()})
        disk[asked[place.vm_id].profile.shape.pool] += place.disk_mib
    free = [free_name(each) for each in CELL_RESOURCES]
    cells = tuple(
        replace(cell, **{name: getattr(cell, name) - taken[cell.cell][name] for name in free}) for cell in host.cells
    )
    pools = {name: replace(pool, free_mib=pool.free_mib - disk[name]) for name, pool in host.pools.items()}
    seated = tuple(
        SeatedVm(place.vm_id, place.name, asked[place.vm_id].profile, place.cells, asked[place.vm_id].groups)
        for place in places
    )
    return replace(
        host, cells=cells, pools=pools, disk_free_mib=host.disk_free_mib - disk[""], vms=(*host.vms, *seated)
    )
