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


def refuse_overfull(vms: Collection[VmInfo], cores: int | None, code: str) -> None:
    """Raises the problem of this code where a cell would hold more than so many cores; None: there are enough."""
    held = _cores_held(vms)
    over = [cell for cell in sorted(held) if cores is not None and held[cell] > cores]
    if over:
        raise PpecError(code, f"cell {over[0]} would hold {held[over[0]]} cores, it has {cores}", subject="host")


def planned(vms: Collection[VmInfo], request: PlanRetune, cells: int, cores: int | None = None) -> RetunePlan:
    """All VMs of the first wanted cell (0 unless any is) move to the cell after it. Raises `retune.not_possible`, also
    where that has not the `cores`, and `request.invalid` for a VM that no host would open a cell for."""
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
    then = [after.get(vm.vm_id, vm) for vm in vms]
    refuse_overfull(then, cores if leaving else None, "retune.not_possible")
    return RetunePlan(opened=(cell,), moves=moves, before=_rooms(vms, cells), after=_rooms(then, cells))


def carried_out(vms: Mapping[UUID, VmInfo], plan: RetunePlan, cores: int | None = None) -> dict[UUID, VmInfo]:
    """The VMs of the plan as they are then. Raises `retune.outdated` when one is at neither end of its move, or of
    another size, or a cell has not the `cores`."""
    after = {}
    for move in plan.moves:
        vm = vms.get(move.vm_id)
        at_an_end = vm is not None and vm.cells in ((move.before.cell,), (move.after.cell,))
        if vm is None or not at_an_end or vm.vcpus != len(move.after.pins):
            raise PpecError("retune.outdated", f"vm {move.name} can't be moved as planned", subject=f"vm {move.name}")
        after[move.vm_id] = _moved(vm, move.after.cell)
    refuse_overfull([after.get(vm_id, vm) for vm_id, vm in vms.items()], cores, "retune.outdated")
    return after


def _moved(vm: VmInfo, cell: int) -> VmInfo:
    return vm.model_copy(update={"cells": (cell,), "pins": _seat(vm, cell).pins})


def _seat(vm: VmInfo, cell: int) -> RetuneSeat:
    first = cell * _CPUS_OF_A_CELL
    return RetuneSeat(cell=cell, pins=tuple(VcpuPin(vcpu=n, pcpu=first + n) for n in range(vm.vcpus)))


def _rooms(vms: Collection[VmInfo], cells: int) -> tuple[CellRoom, ...]:
    cores, memory = _cores_held(vms), Counter[int]()
    for vm in vms:
        for cell in vm.cells:
            memory[cell] += vm.memory_mib // len(vm.cells)
    return tuple(
        CellRoom(cell=cell, cores=_CORES - cores[cell], memory_mib=_MEMORY_MIB - memory[cell]) for cell in range(cells)
    )


def _cores_held(vms: Collection[VmInfo]) -> Counter[int]:
    cores = Counter[int]()
    for vm in vms:
        for cell in vm.cells:
            cores[cell] += vm.vcpus // 2 // len(vm.cells)
    return cores
