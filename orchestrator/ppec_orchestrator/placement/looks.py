# SPDX-License-Identifier: Apache-2.0
"""Which hosts are alike to a batch: where one of its VMs can or can't go, it can or can't go to those that look alike,
and all that comes after is the same.

What there is more of than the whole batch could take makes no difference, and neither does what none of it asks for.
In the literature's word, hosts of one look are a symmetry class, of which a search need try one alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ppec_contract.vm import CpuPolicy
from ppec_orchestrator.placement.demand import (
    CELL_RESOURCES,
    CellResource,
    cpu_resource,
    memory_part,
    memory_resource,
)
from ppec_orchestrator.placement.fleet import BoolArray, IntArray, Rows, at
from ppec_orchestrator.placement.request import Shape, VmRequest
from ppec_orchestrator.placement.workspace import Workspace

# Of one host: its number, and those of its cells.
Look = tuple[int, IntArray]


class Looks:
    """`of_row` and `of_cell` number what is alike, shapes (hosts,) and (hosts, cells). `stands` says for each kind of
    VM in the batch which hosts nothing lasting closes to it."""

    def __init__(self, workspace: Workspace, vms: Sequence[VmRequest], stands: Sequence[BoolArray]) -> None:
        self._workspace = workspace
        self._most = _most_taken([vm.profile.shape for vm in vms])
        self._most_disk = _most_disk([vm.profile.shape for vm in vms])
        self._shared = max((vm.profile.shape.vcpus for vm in vms if _shares(vm)), default=0)
        self._in_several = any(vm.profile.shape.numa.multi_cell for vm in vms)
        networks = sum(len(vm.profile.networks) for vm in vms)
        # Per host a number, -1 where no prefix could run out.
        self.short: IntArray = workspace.addresses.kinds_short_of(networks)
        self._lasting = _Numbers().of(np.packbits(np.stack(stands), axis=0).T)
        self._cell_numbers, self._row_numbers = _Numbers(), _Numbers()
        self.of_row, self.of_cell = self._look(None)

    def look_again(self, row: int) -> Look:
        """The host's room is another now: how it looked before."""
        before = (self.of_row.item(row), self.of_cell[row].copy())
        rows, cells = self._look(np.array([row]))
        self.back_to(row, (rows.item(), cells[0]))
        return before

    def back_to(self, row: int, look: Look) -> None:
        """The host's room is again as it was when it looked so."""
        self.of_row[row], self.of_cell[row] = look

    def _look(self, rows: Rows) -> tuple[IntArray, IntArray]:
        fleet, free = self._workspace.fleet, self._workspace.free
        figures = [np.minimum(at(free[each], rows), most) for each, most in self._most.items()]
        figures += [at(fleet.threads_per_core, rows), np.minimum(at(fleet.shared_cpus, rows), self._shared)]
        if self._in_several:
            figures.append(at(fleet.socket, rows))
        table = np.stack(figures, axis=-1)
        cells = self._cell_numbers.of(table.reshape(-1, len(figures))).reshape(table.shape[:2])
        # Which cell is which matters to VMs in several of them alone.
        columns = cells if self._in_several else np.sort(cells, axis=1)
        disks = [np.minimum(at(self._workspace.disk(pool), rows), most) for pool, most in self._most_disk.items()]
        whole = np.column_stack([at(self._lasting, rows), at(self.short, rows), *disks, columns])
        return self._row_numbers.of(whole), cells


class _Numbers:
    """Rows of a table that are equal get one number."""

    def __init__(self) -> None:
        self._known: dict[bytes, int] = {}

    def of(self, table: NDArray[Any]) -> IntArray:
        blob, known = table.tobytes(), self._known
        size = max(len(blob) // max(len(table), 1), 1)
        numbers = [known.setdefault(blob[start : start + size], len(known)) for start in range(0, len(blob), size)]
        return np.array(numbers, dtype=np.int64)


def _shares(vm: VmRequest) -> bool:
    return vm.profile.shape.numa.cpus is CpuPolicy.SHARED


def _most_taken(shapes: Sequence[Shape]) -> dict[CellResource, int]:
    """Of each resource that is asked for: all the batch could take of one cell."""
    most = dict.fromkeys(CELL_RESOURCES, 0)
    for shape in shapes:
        most[cpu_resource(shape)] += shape.vcpus
        most[memory_resource(shape)] += memory_part(shape)
        most["nvme"] += shape.nvme
    return {resource: amount for resource, amount in most.items() if amount}


def _most_disk(shapes: Sequence[Shape]) -> dict[str, int]:
    """By pool, "" the host's own disk."""
    most: dict[str, int] = {}
    for shape in shapes:
        most[shape.pool] = most.get(shape.pool, 0) + shape.disk_mib
    return most
