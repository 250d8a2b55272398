# SPDX-License-Identifier: Apache-2.0
"""Do the VMs of a host hold no more of it than it says is used?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from ppec_orchestrator.fleets.faults import FleetError, shown
from ppec_orchestrator.placement.demand import (
    CELL_RESOURCES,
    CellResource,
    cpu_part,
    cpu_resource,
    free_name,
    memory_part,
    memory_resource,
    nvme_part,
)
from ppec_orchestrator.placement.fleet import CellState, HostState
from ppec_orchestrator.placement.request import Profile

_Parts = tuple[tuple[CellResource, int], ...]


class Seats:
    """Checks hosts one by one, and remembers what a profile takes of a cell."""

    def __init__(self) -> None:
        self._parts: dict[tuple[int, int, int], _Parts] = {}

    def check(self, host: HostState, where: str) -> None:
        """Raises FleetError: a VM in a cell that isn't there, VMs that overlap, figures that can't be."""
        cells = {cell.cell: number for number, cell in enumerate(host.cells)}
        held: list[Counter[CellResource]] = [Counter() for _ in host.cells]
        disks: Counter[str] = Counter()
        for index, vm in enumerate(host.vms):
            if vm.profile.architecture != host.architecture:
                what = f"it is for {vm.profile.architecture}, and host {shown(host.name)} is of {host.architecture}"
                raise FleetError(f"{where}.vms[{index}].profile", what)
            for cell in vm.cells:
                number = cells.get(cell)
                if number is None:
                    raise FleetError(f"{where}.vms[{index}].cells", f"host {shown(host.name)} has no cell {cell}")
                for resource, amount in self._of(vm.profile, host.cells[number].threads_per_core, len(vm.cells)):
                    held[number][resource] += amount
            disks[vm.profile.shape.pool] += vm.profile.shape.disk_mib
        for number, state in enumerate(host.cells):
            _check_cell(state, held[number], f"{where}.cells[{number}]")
        unknown = next((name for name in disks if name and name not in host.pools), None)
        if unknown is not None:
            raise FleetError(where, f"its VMs have disks in pool {shown(unknown)}, which it doesn't have")
        _check_room("disk_free_mib", host.disk_mib, host.disk_free_mib, disks[""], where)
        for name, pool in host.pools.items():
            _check_room("free_mib", pool.size_mib, pool.free_mib, disks[name], f"{where}.pools.{name}")

    def _of(self, profile: Profile, threads: int, cells: int) -> _Parts:
        # By identity: there are few profiles, and hashing one takes longer than this lookup.
        key = (id(profile), threads, cells)
        found = self._parts.get(key)
        if found is None:
            shape = profile.shape
            taken: Mapping[CellResource, int] = {
                cpu_resource(shape): cpu_part(shape, threads, cells),
                memory_resource(shape): memory_part(shape, cells),
                "nvme": nvme_part(shape, cells),
            }
            found = self._parts[key] = tuple((each, amount) for each, amount in taken.items() if amount)
        return found


def _check_cell(cell: CellState, held: Mapping[CellResource, int], where: str) -> None:
    if cell.shared_vcpus and not cell.shared_cpus:
        raise FleetError(f"{where}.shared_cpus", f"{cell.shared_vcpus} vCPUs may share them, and there are none")
    for resource in CELL_RESOURCES:
        free = free_name(resource)
        _check_room(free, getattr(cell, resource), getattr(cell, free), held.get(resource, 0), where)


def _check_room(figure: str, whole: int, free: int, held: int, where: str) -> None:
    """Less than nothing may be free of what shrank under its VMs: but then they are there, and hold too much."""
    if free > whole:
        raise FleetError(f"{where}.{figure}", f"{free} are free of {whole}")
    if held > whole - free:
        raise FleetError(f"{where}.{figure}", f"its VMs overlap: they hold {held} of {whole}, of which {free} are free")
    if free < 0 and held <= whole:
        raise FleetError(f"{where}.{figure}", f"{free} are free, though its VMs hold no more than {held} of {whole}")
