# SPDX-License-Identifier: Apache-2.0
"""Retune on simulated hosts: plans that empty a cell into the next one, and what is left when they are carried out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from uuid import UUID

from ppec_contract.agent import PlanRetune
from ppec_contract.errors import PpecError
from ppec_contract.retune import CellRoom, RetuneMove, RetunePlan, RetuneSeat
from ppec_contract.vm import CpuPolicy, VcpuPin, VmInfo

# Of each simulated cell.
_CORES, _MEMORY_MIB = 64, 256 * 1024
_CPUS_OF_A_CELL = 1000


def planned(vms: Collection[VmInfo], request: PlanRetune, cells: int) -> RetunePlan:
    """All VMs of the first wanted cell (0 unless any is) move to the cell after it. Raises `retune.not_possible`, and
    `request.invalid` for a VM that no host would open a cell for."""
    if request.want.numa.multi_cell or request.want.numa.cpus is CpuPolicy.SHARED:
        raise PpecError("request.invalid", "such a VM needs no open cell", subject="retune")
    cell = next(iter(request.want.cells), 0)
    target = (cell + 1) % cells
    leaving = sorted((vm for vm in vms if vm.cells == (cell,)), key=lambda vm: vm.name)
    if len(leaving) > request.bounds.moves or (leaving and target == cell):
        raise PpecError(
            "retune.not_possible",
            f"{len(leaving)} moves would open cell {cell}, {request.bounds.moves} are allowed",
            subject="retune",
        )
    moves = tuple(
        RetuneMove(
            vm_id=vm.vm_id, name=vm.name, before=_seat(vm, cell), after=_seat(vm, target), memory_mib=vm.memory_mib
        )
        for vm in leaving
    )
    after = {vm.vm_id: _moved(vm, target) for vm in leaving}
    return RetunePlan(
        opened=(cell,),
        moves=moves,
        before=_rooms(vms, cells),
        after=_rooms([after.get(vm.vm_id, vm) for vm in vms], cells),
    )


def carried_out(vms: Mapping[UUID, VmInfo], plan: RetunePlan) -> dict[UUID, VmInfo]:
    """The VMs of the plan as they are then. Raises `retune.outdated` when one is at neither end of its move."""
    after = {}
    for move in plan.moves:
        vm = vms.get(move.vm_id)
        if vm is None or vm.cells not in ((move.before.cell,), (move.after.cell,)):
            raise PpecError("retune.outdated", f"vm {move.name} can't be moved as planned", subject=f"vm {move.name}")
        after[move.vm_id] = _moved(vm, move.after.cell)
    return after


def _moved(vm: VmInfo, cell: int) -> VmInfo:
    return vm.model_copy(update={"cells": (cell,), "pins": _seat(vm, cell).pins})


def _seat(vm: VmInfo, cell: int) -> RetuneSeat:
    first = cell * _CPUS_OF_A_CELL
    return RetuneSeat(cell=cell, pins=tuple(VcpuPin(vcpu=n, pcpu=first + n) for n in range(vm.vcpus)))


def _rooms(vms: Collection[VmInfo], cells: int) -> tuple[CellRoom, ...]:
    cores, memory = Counter[int](), Counter[int]()
    for vm in vms:
        for cell in vm.cells:
            cores[cell] += vm.vcpus // 2 // len(vm.cells)
            memory[cell] += vm.memory_mib // len(vm.cells)
    return tuple(
        CellRoom(cell=cell, cores=_CORES - cores[cell], memory_mib=_MEMORY_MIB - memory[cell]) for cell in range(cells)
    )
