# SPDX-License-Identifier: Apache-2.0
"""A fleet with a plan carried out: its moves made, its VMs in their seats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from uuid import UUID

from ppec_orchestrator.placement.addresses import grants
from ppec_orchestrator.placement.demand import CELL_RESOURCES, CellResource, free_name
from ppec_orchestrator.placement.fitting import Fitting
from ppec_orchestrator.placement.fleet import Fleet, HostState, SeatedVm
from ppec_orchestrator.placement.havens import seated_profile
from ppec_orchestrator.placement.plan import Move, Placement, Plan
from ppec_orchestrator.placement.request import VmRequest
from ppec_orchestrator.placement.seats import columns_of

# By cell and resource: how much less is free.
_Used = Counter[tuple[int, CellResource]]


def applied(fleet: Fleet, vms: Iterable[VmRequest], plan: Plan) -> Fleet:
    """`vms` are those that the plan was made for. Every placed VM holds its room and its addresses, as the plan took
    them; the refused ones hold nothing."""
    asked = {vm.vm_id: vm for vm in vms}
    moves: dict[str, list[Move]] = {}
    places: dict[str, list[Placement]] = {}
    for evidence in plan.evidence:
        for move in evidence.moves:
            moves.setdefault(move.host, []).append(move)
    for place in plan.placed:
        places.setdefault(place.host, []).append(place)
    hosts = [
        _host(fleet, fleet.index[name], moves.get(name, []), places.get(name, []), asked)
        for name in sorted(moves.keys() | places.keys())
    ]
    return fleet.changed(hosts, _free_addresses(fleet, plan, asked))


def _free_addresses(fleet: Fleet, plan: Plan, asked: Mapping[UUID, VmRequest]) -> Mapping[int, int]:
    """In the order the plan took them: which prefix an address comes from depends on it."""
    steps = {why.vm_id: why.step for why in plan.evidence}
    left = dict(fleet.free_addresses)
    for place in sorted(plan.placed, key=lambda each: steps.get(each.vm_id, 0)):
        host = fleet.hosts[fleet.index[place.host]]
        for prefix, count in (grants(host, asked[place.vm_id].profile.networks, left) or {}).items():
            if prefix in left:
                left[prefix] -= count
    return left


def _host(
    fleet: Fleet, row: int, moves: Iterable[Move], places: Iterable[Placement], asked: Mapping[UUID, VmRequest]
) -> HostState:
    host = fleet.hosts[row]
    used: _Used = Counter()
    seated = {vm.vm_id: vm for vm in host.vms}
    for move in moves:
        vm = seated[move.vm_id]
        part = Fitting(fleet, vm.profile.shape).part(row, columns_of(host, move.cells_before)[0], 1).by_resource
        _count(used, move.cells_before, part, -1)
        _count(used, move.cells_after, part, 1)
        seated[move.vm_id] = replace(vm, cells=move.cells_after)
    disk: Counter[str] = Counter()
    for place in places:
        request = asked[place.vm_id]
        _count(used, place.cells, place.per_cell, 1)
        disk[place.pool] += place.disk_mib
        profile = seated_profile(request.profile, host.vrf)
        seated[place.vm_id] = SeatedVm(place.vm_id, place.name, profile, place.cells, request.groups)
    cells = tuple(
        replace(
            cell, **{free_name(each): getattr(cell, free_name(each)) - used[cell.cell, each] for each in CELL_RESOURCES}
        )
        for cell in host.cells
    )
    pools = {name: replace(pool, free_mib=pool.free_mib - disk[name]) for name, pool in host.pools.items()}
    return replace(
        host, cells=cells, vms=tuple(seated.values()), disk_free_mib=host.disk_free_mib - disk[""], pools=pools
    )


def _count(used: _Used, cells: Iterable[int], part: Mapping[CellResource, int], sign: int) -> None:
    for cell in cells:
        for resource, amount in part.items():
            used[cell, resource] += sign * amount
