# SPDX-License-Identifier: Apache-2.0
"""A fleet with a plan carried out: its moves made, its VMs in their seats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from uuid import UUID

from ppec_orchestrator.placement.addresses import grants
from ppec_orchestrator.placement.demand import CellResource, free_name
from ppec_orchestrator.placement.fitting import Fitting
from ppec_orchestrator.placement.fleet import CellState, Fleet, HostState, SeatedVm
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
    steps = {why.vm_id: why.step for why in plan.evidence}
    return less_granted(fleet, sorted(plan.placed, key=lambda each: steps.get(each.vm_id, 0)), asked)


def less_granted(fleet: Fleet, placements: Iterable[Placement], asked: Mapping[UUID, VmRequest]) -> Mapping[int, int]:
    """The free addresses without those that these VMs got, in the order they got them: of which prefix an address is
    depends on it."""
    left = dict(fleet.free_addresses)
    for place in placements:
        host = fleet.hosts[fleet.index[place.host]]
        for prefix, count in (grants(host, asked[place.vm_id].profile.networks, left) or {}).items():
            if prefix in left:
                left[prefix] -= count
    return left


def with_room_taken(host: HostState, placements: Iterable[Placement], vms: Iterable[SeatedVm]) -> HostState:
    """The host without the room of these places; `vms` are all that it then has."""
    used: _Used = Counter()
    disk: Counter[str] = Counter()
    for place in placements:
        _count(used, place.cells, place.per_cell, 1)
        disk[place.pool] += place.disk_mib
    pools = {name: replace(pool, free_mib=pool.free_mib - disk[name]) for name, pool in host.pools.items()}
    free_mib = host.disk_free_mib - disk[""]
    return replace(host, cells=_less(host.cells, used), vms=tuple(vms), disk_free_mib=free_mib, pools=pools)


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
    for place in places:
        request = asked[place.vm_id]
        profile = seated_profile(request.profile, host.vrf)
        seated[place.vm_id] = SeatedVm(place.vm_id, place.name, profile, place.cells, request.groups)
    return with_room_taken(replace(host, cells=_less(host.cells, used)), places, seated.values())


def _less(cells: Sequence[CellState], used: _Used) -> tuple[CellState, ...]:
    by_cell: dict[int, dict[CellResource, int]] = {}
    for (cell, resource), amount in used.items():
        by_cell.setdefault(cell, {})[resource] = amount
    return tuple(
        replace(each, **{free_name(what): getattr(each, free_name(what)) - n for what, n in by_cell[each.cell].items()})
        if each.cell in by_cell
        else each
        for each in cells
    )


def _count(used: _Used, cells: Iterable[int], part: Mapping[CellResource, int], sign: int) -> None:
    for cell in cells:
        for resource, amount in part.items():
            used[cell, resource] += sign * amount
