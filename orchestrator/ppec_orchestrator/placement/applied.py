# SPDX-License-Identifier: Apache-2.0
"""A fleet with a plan carried out: its moves made, its VMs in their seats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from uuid import UUID

from ppec_orchestrator.placement.demand import CELL_RESOURCES, CellResource, free_name
from ppec_orchestrator.placement.fitting import Fitting
from ppec_orchestrator.placement.fleet import Fleet, HostState, SeatedVm
from ppec_orchestrator.placement.plan import Move, Placement, Plan
from ppec_orchestrator.placement.request import VmRequest
from ppec_orchestrator.placement.seats import columns_of

# By cell and resource: how much less is free.
_Used = Counter[tuple[int, CellResource]]


def applied(fleet: Fleet, vms: Iterable[VmRequest], plan: Plan) -> Fleet:
    """`vms` are those that the plan was made for. Free addresses are left as they are: which prefix an address comes
    from is decided when the plan is committed."""
    asked = {vm.vm_id: vm for vm in vms}
    moves: dict[str, list[Move]] = {}
    places: dict[str, list[Placement]] = {}
    for evidence in plan.evidence:
        for move in evidence.moves:
            moves.setdefault(move.host, []).append(move)
    for place in plan.placed:
        places.setdefault(place.host, []).append(place)
    return fleet.changed(
        _host(fleet, fleet.index[name], moves.get(name, []), places.get(name, []), asked)
        for name in moves.keys() | places.keys()
    )


def _host(
    fleet: Fleet, row: int, moves: Iterable[Move], places: Iterable[Placement], asked: Mapping[UUID, VmRequest]
) -> HostState:
    host = fleet.hosts[row]
    used: _Used = Counter()
    seated = {vm.vm_id: vm for vm in host.vms}
    for move in moves:
        vm = seated[move.vm_id]
        part = Fitting(fleet, vm.profile.shape).part(row, columns_of(host, move.cells_before)[0], 1)
        _count(used, move.cells_before, part, -1)
        _count(used, move.cells_after, part, 1)
        seated[move.vm_id] = replace(vm, cells=move.cells_after)
    disk: Counter[str] = Counter()
    for place in places:
        request = asked[place.vm_id]
        _count(used, place.cells, place.per_cell, 1)
        disk[request.profile.shape.pool] += place.disk_mib
        seated[place.vm_id] = SeatedVm(place.vm_id, place.name, request.profile, place.cells, request.groups)
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
