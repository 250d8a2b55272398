# SPDX-License-Identifier: Apache-2.0
"""What a VM asks for, what it then holds, and in which amounts both are counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from uuid import UUID

from ppec_agentd.numa import NumaPlan, PinRequest
from ppec_contract.errors import PpecError
from ppec_contract.vm import NumaPolicy, VcpuPin

# Amounts are counted by these names, which refusals use too; huge pages by `pages_resource`, in pages.
Amounts = Mapping[str, int]
CORES, MEMORY, DISK, SHARED = "cores", "memory_mib", "disk_mib", "shared_vcpus"
NVME_DRIVES = "nvme_drives"
ORDINARY_PAGE = 0
# Of a disk: where the host keeps VMs by itself.
NO_POOL = ""


def pages_resource(page_kib: int) -> str:
    return f"huge_pages_{page_kib}_kib"


def memory_amount(memory_mib: int, page_kib: int) -> tuple[str, int]:
    """As what so much memory counts: huge pages are set aside at boot and are no part of ordinary memory."""
    if page_kib == ORDINARY_PAGE:
        return MEMORY, memory_mib
    return pages_resource(page_kib), -(-memory_mib * 1024 // page_kib)


def disk_resource(pool: str) -> str:
    """As what disks in this storage pool count: each pool is counted by itself."""
    return DISK if pool == NO_POOL else f"pool_{pool}_mib"


def added(one: Amounts, other: Amounts) -> dict[str, int]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in one.keys() | other.keys()}


def negated(amounts: Amounts) -> dict[str, int]:
    return {name: -amount for name, amount in amounts.items()}


@dataclass(frozen=True, slots=True)
class Claim:
    """What a VM asks for. Memory comes out of `cells` alone, its disk out of `pool`. NVMe drives come out of `cells` as
    well: as many near each, rounded up.

    Nothing is set aside for `max_vcpus` and `max_memory_mib` (0: no further than it starts with): a VM holds what it
    has, and asks again when it grows. A maximum held in advance would keep a host half empty for growth that may never
    come; the price is that growth can be refused.
    """

    vm_id: UUID
    name: str
    vcpus: int
    memory_mib: int
    disk_mib: int
    cells: tuple[int, ...]
    policy: NumaPolicy = field(default_factory=NumaPolicy)
    max_vcpus: int = 0
    max_memory_mib: int = 0
    pool: str = NO_POOL
    nvme_drives: int = 0

    @property
    def subject(self) -> str:
        return f"vm {self.name}"

    def request(self) -> PinRequest:
        return PinRequest(self.vcpus, self.cells, self.subject, self.policy, self.max_vcpus)


@dataclass(frozen=True, slots=True)
class Move:
    """Where a VM is to be from now on: a pin for each vCPU (none if it shares), and the cells of its memory."""

    vm_id: UUID
    pins: tuple[VcpuPin, ...]
    cells: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Holding:
    """What a VM holds. `foreign` marks a domain PPEC did not make: counted, never touched.

    `cpus` are whole cores: those of the plan, and any other that its domain was found pinned to. While a resize or a
    move is under way `before` is what the VM held until then, and it goes on holding that as well: nobody else gets
    what an undo may need back. `drives` are the PCI addresses of NVMe drives: those granted, and any other of the
    host's drives for VMs that its domain was found to have. `locked`: its domain has devices of the host, these or
    others, and so its memory can't move.
    """

    vm_id: UUID
    name: str
    plan: NumaPlan
    cpus: frozenset[int]
    memory_by_cell_mib: Mapping[int, int]
    disk_mib: int
    committed: bool
    foreign: bool = False
    policy: NumaPolicy = field(default_factory=NumaPolicy)
    vcpus: int = 0
    max_vcpus: int = 0
    max_memory_mib: int = 0
    shared_by_cell: Mapping[int, int] = field(default_factory=dict)
    before: Holding | None = None
    pool: str = NO_POOL
    drives: frozenset[str] = frozenset()
    locked: bool = False

    @property
    def subject(self) -> str:
        return f"vm {self.name}"

    @property
    def memory_mib(self) -> int:
        return sum(self.memory_by_cell_mib.values())

    @property
    def page_kib(self) -> int:
        return self.policy.huge_page_kib

    @property
    def pending(self) -> bool:
        """Whether a resize or a move awaits `commit` or `revert`."""
        return self.before is not None

    def kept(self) -> Holding:
        """All that it keeps from others now: what it holds and, during a change, what it held before."""
        if self.before is None:
            return self
        return replace(
            self,
            cpus=self.cpus | self.before.cpus,
            memory_by_cell_mib=_larger(self.memory_by_cell_mib, self.before.memory_by_cell_mib),
            shared_by_cell=_larger(self.shared_by_cell, self.before.shared_by_cell),
            drives=self.drives | self.before.drives,
            before=None,
        )


def _larger(one: Mapping[int, int], other: Mapping[int, int]) -> dict[int, int]:
    return {cell: max(one.get(cell, 0), other.get(cell, 0)) for cell in sorted(one.keys() | other.keys())}


@dataclass(frozen=True, slots=True)
class Totals:
    """Free and whole amounts of the host; cores are whole physical ones, memory is on ordinary pages.

    `amounts` and `free` are all there are, by the names that refusals use.
    """

    amounts: Amounts
    free: Amounts

    @property
    def cores(self) -> int:
        return self.amounts[CORES]

    @property
    def cores_free(self) -> int:
        return self.free[CORES]

    @property
    def memory_mib(self) -> int:
        return self.amounts[MEMORY]

    @property
    def memory_free_mib(self) -> int:
        return self.free[MEMORY]

    @property
    def disk_mib(self) -> int:
        return self.amounts[DISK]

    @property
    def disk_free_mib(self) -> int:
        return self.free[DISK]

    @property
    def shared_vcpus(self) -> int:
        return self.amounts[SHARED]

    @property
    def shared_vcpus_free(self) -> int:
        return self.free[SHARED]


def no_capacity(subject: str, resource: str, wanted: int, free: int, cells: tuple[int, ...] | None = None) -> PpecError:
    where = f"NUMA cells {list(cells)}" if cells else "this host"
    return PpecError(
        "host.no_capacity",
        f"{subject} asks for {wanted} {resource}; {free} are free on {where}",
        hint="Plan again: the host has given it to somebody else since.",
        subject=subject,
        details={"resource": resource, "wanted": wanted, "free": free, **({"cells": list(cells)} if cells else {})},
    )
