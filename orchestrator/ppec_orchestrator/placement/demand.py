# SPDX-License-Identifier: Apache-2.0
"""What one VM takes of a NUMA cell, counted as the host itself counts it.

A VM takes one cell; with `multi_cell` as few as can take it in equal parts. Equal, because a host deals cores and
memory out as evenly as what is free at that moment allows: of equal parts it makes the same whatever else it was asked
for meanwhile, and so the record knows what each cell gave. What doesn't divide is counted on every cell, rounded up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

from ppec_contract.vm import CpuPolicy, SmtPolicy

if TYPE_CHECKING:
    from ppec_orchestrator.placement.fleet import BoolArray, Fleet, IntArray
    from ppec_orchestrator.placement.request import Shape

CellResource = Literal["cores", "memory_mib", "shared_vcpus", "pages_2m", "pages_1g", "nvme"]
CELL_RESOURCES: tuple[CellResource, ...] = ("cores", "memory_mib", "shared_vcpus", "pages_2m", "pages_1g", "nvme")
# What counts as memory (in MiB) and as CPU in the balance of a fleet, and how much of it one unit is.
MEMORY: Mapping[CellResource, int] = {"memory_mib": 1, "pages_2m": 2, "pages_1g": 1024}
CPU: Mapping[CellResource, int] = {"cores": 1, "shared_vcpus": 1}
# By the size of page in KiB, 0 the ordinary one.
_MEMORY: dict[int, CellResource] = {0: "memory_mib", 2048: "pages_2m", 1024 * 1024: "pages_1g"}
# What a `VmSpec` can name.
MOST_CELLS = 16
_Count = TypeVar("_Count", int, "IntArray")


class CellPart(NamedTuple):
    """What a VM takes of each of its cells: of all that cells have, in the order of `CELL_RESOURCES`; by resource what
    it takes any of; and what that counts in the balance."""

    each: tuple[int, ...]
    by_resource: Mapping[CellResource, int]
    memory_mib: int
    cpus: int

    @classmethod
    def of(cls, amounts: Mapping[CellResource, int]) -> CellPart:
        return cls(
            tuple(amounts.get(each, 0) for each in CELL_RESOURCES),
            amounts,
            sum(amount * MEMORY.get(each, 0) for each, amount in amounts.items()),
            sum(amount * CPU.get(each, 0) for each, amount in amounts.items()),
        )


def free_name(resource: CellResource) -> str:
    """What the free part of a resource is called in a cell's state."""
    return "memory_free_mib" if resource == "memory_mib" else f"{resource}_free"


def cpu_resource(shape: Shape) -> CellResource:
    return "shared_vcpus" if shape.numa.cpus is CpuPolicy.SHARED else "cores"


def memory_resource(shape: Shape) -> CellResource:
    """Huge pages are set aside when a host boots, and are no part of ordinary memory."""
    return _MEMORY[shape.numa.huge_page_kib]


def cpu_part(shape: Shape, threads_per_core: _Count, parts: int = 1) -> _Count:
    """Of `cpu_resource`, for each of the VM's cells: whole physical cores, as SMT siblings never serve two VMs."""
    if shape.numa.cpus is CpuPolicy.SHARED:
        return threads_per_core * 0 + shape.vcpus
    if shape.numa.smt is SmtPolicy.ISOLATE:
        return threads_per_core * 0 - (-shape.vcpus // parts)
    return -(-shape.vcpus // (threads_per_core * parts))


def memory_part(shape: Shape, parts: int = 1) -> int:
    """Of `memory_resource`, for each of the VM's cells."""
    return -(-_memory_units(shape) // parts)


def nvme_part(shape: Shape, parts: int = 1) -> int:
    """NVMe drives for each of the VM's cells."""
    return -(-shape.nvme // parts)


def usable_cells(fleet: Fleet, shape: Shape) -> BoolArray:
    """Cells that could ever serve such a VM, were they only large enough."""
    if shape.numa.cpus is CpuPolicy.SHARED:
        # A VM with more vCPUs than there are CPUs to share would wait for nobody but itself.
        shareable: BoolArray = fleet.shared_cpus >= shape.vcpus
        return shareable
    fewest_threads = 2 if shape.numa.smt is SmtPolicy.REQUIRE else 1
    usable: BoolArray = fleet.threads_per_core >= fewest_threads
    return usable


def most_parts(shape: Shape, cells: int) -> int:
    """Over how many of a host's `cells` the VM may spread: each part has a core and memory of its own."""
    if not shape.numa.multi_cell:
        return 1
    return max(1, min(cells, MOST_CELLS, shape.vcpus, _memory_units(shape)))


def _memory_units(shape: Shape) -> int:
    page_kib = shape.numa.huge_page_kib
    return shape.memory_mib * 1024 // page_kib if page_kib else shape.memory_mib
