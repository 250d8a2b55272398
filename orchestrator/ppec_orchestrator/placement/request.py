# SPDX-License-Identifier: Apache-2.0
"""What is asked of the planner, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from uuid import UUID

from ppec_contract.api import Policy


@dataclass(frozen=True, slots=True)
class Shape:
    """The resources of one VM. A batch has one shape, so what is worked out for it is worked out once."""

    vcpus: int
    memory_mib: int
    disk_mib: int


@dataclass(frozen=True, slots=True)
class Where:
    """Narrows the hosts; None means anywhere."""

    datacentre: str | None = None
    cluster: str | None = None
    rack: str | None = None
    host: str | None = None
    vrf: str | None = None


@dataclass(frozen=True, slots=True)
class VmRequest:
    """One VM to place. `excluded_hosts` are those that failed it before."""

    vm_id: UUID
    name: str
    excluded_hosts: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """A batch of equal VMs. `batch_hosts` says how many VMs of this batch already stand on a host (a replan)."""

    vms: tuple[VmRequest, ...]
    shape: Shape
    architecture: str
    policy: Policy = Policy.BALANCED
    where: Where = field(default_factory=Where)
    batch_hosts: Mapping[str, int] = field(default_factory=dict)


class Reason(StrEnum):
    """Why a host can't take a VM. Filters run in this order; a host counts under the first that turns it away."""

    OUTSIDE_SCOPE = "outside-scope"
    ARCHITECTURE = "architecture"
    FAILED_BEFORE = "failed-before"
    SILENT = "silent"
    DRAINING = "draining"
    VM_LARGER_THAN_CELL = "vm-larger-than-cell"
    CORES = "cores"
    MEMORY = "memory"
    NUMA_FIT = "numa-fit"
    DISK = "disk"
    ADDRESSES = "addresses"

    @property
    def words(self) -> str:
        """What is said of a host that this reason turns away: `3 hosts: 2 …, 1 …`."""
        return _WORDS[self]


_WORDS: Mapping[Reason, str] = {
    Reason.OUTSIDE_SCOPE: "outside the places asked for",
    Reason.ARCHITECTURE: "of another architecture",
    Reason.FAILED_BEFORE: "where it failed before",
    Reason.SILENT: "silent",
    Reason.DRAINING: "draining",
    Reason.VM_LARGER_THAN_CELL: "with NUMA cells smaller than the VM",
    Reason.CORES: "without enough free cores",
    Reason.MEMORY: "without enough free memory",
    Reason.NUMA_FIT: "without a NUMA cell that has both cores and memory free",
    Reason.DISK: "without enough free disk",
    Reason.ADDRESSES: "without a free address",
}


@dataclass(frozen=True, slots=True)
class Placement:
    """One VM's place: a host and the NUMA cell it fits in, with the whole physical cores it takes there."""

    vm_id: UUID
    name: str
    host_id: int
    host: str
    cells: tuple[int, ...]
    cores: int
    memory_mib: int
    disk_mib: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """A VM that fits nowhere: every host counted under the reason that turned it away."""

    vm_id: UUID
    name: str
    reasons: Mapping[Reason, int]

    def sentence(self) -> str:
        """`12 hosts: 8 without enough free cores, 3 draining, 1 silent`"""
        counted = sorted(self.reasons.items(), key=lambda item: (-item[1], item[0]))
        total = sum(self.reasons.values())
        hosts = "1 host" if total == 1 else f"{total} hosts"
        return f"{hosts}: " + ", ".join(f"{count} {reason.words}" for reason, count in counted)


@dataclass(frozen=True, slots=True)
class Plan:
    """`placed` and `refused` together hold every VM of the request, each in the request's order."""

    placed: tuple[Placement, ...]
    refused: tuple[Refusal, ...]
