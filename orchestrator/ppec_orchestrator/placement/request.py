# SPDX-License-Identifier: Apache-2.0
"""What is asked of the planner, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from uuid import UUID

from ppec_contract.api import Policy
from ppec_contract.vm import NumaPolicy
from ppec_orchestrator.placement.addresses import ANY, Network
from ppec_orchestrator.placement.demand import CELL_RESOURCES, CellResource


@dataclass(frozen=True, slots=True)
class Shape:
    """The resources of one VM. A batch has one shape, so what is worked out for it is worked out once."""

    vcpus: int
    memory_mib: int
    disk_mib: int
    numa: NumaPolicy = field(default_factory=NumaPolicy)


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
    """A batch of equal VMs. `batch_hosts` says how many VMs of this batch already stand on a host (a replan).

    `capabilities` are what a host's agent must announce to be told of such VMs, `networks` of what each VM gets one of
    the free addresses, `fixed` which prefixes could give the addresses that are its already by number.
    """

    vms: tuple[VmRequest, ...]
    shape: Shape
    architecture: str
    policy: Policy = Policy.BALANCED
    where: Where = field(default_factory=Where)
    batch_hosts: Mapping[str, int] = field(default_factory=dict)
    capabilities: frozenset[str] = frozenset()
    networks: tuple[Network, ...] = ANY
    fixed: tuple[frozenset[int], ...] = ()


class Reason(StrEnum):
    """Why a host can't take a VM. Filters run in this order; a host counts under the first that turns it away."""

    OUTSIDE_SCOPE = "outside-scope"
    ARCHITECTURE = "architecture"
    FAILED_BEFORE = "failed-before"
    SILENT = "silent"
    DRAINING = "draining"
    AGENT_TOO_OLD = "agent-too-old"
    NOT_SERVED = "not-served"
    NO_SIBLINGS = "no-siblings"
    NO_SHARED_CPUS = "no-shared-cpus"
    NO_HUGE_PAGES = "no-huge-pages"
    VM_LARGER_THAN_CELL = "vm-larger-than-cell"
    VM_LARGER_THAN_HOST = "vm-larger-than-host"
    CORES = "cores"
    SHARED_VCPUS = "shared-vcpus"
    MEMORY = "memory"
    HUGE_PAGES = "huge-pages"
    NUMA_FIT = "numa-fit"
    NUMA_PARTS = "numa-parts"
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
    Reason.AGENT_TOO_OLD: "with an agent too old for the flavor's policy or maxima",
    Reason.NOT_SERVED: "that the prefixes asked for do not serve",
    Reason.NO_SIBLINGS: "without SMT siblings",
    Reason.NO_SHARED_CPUS: "without CPUs set aside for sharing",
    Reason.NO_HUGE_PAGES: "without huge pages of that size",
    Reason.VM_LARGER_THAN_CELL: "with NUMA cells smaller than the VM",
    Reason.VM_LARGER_THAN_HOST: "too small for the VM on any number of NUMA cells",
    Reason.CORES: "without enough free cores",
    Reason.SHARED_VCPUS: "without enough free vCPUs on shared CPUs",
    Reason.MEMORY: "without enough free memory",
    Reason.HUGE_PAGES: "without enough free huge pages",
    Reason.NUMA_FIT: "without a NUMA cell that has both cores and memory free",
    Reason.NUMA_PARTS: "without NUMA cells that have equal parts of its cores and memory free",
    Reason.DISK: "without enough free disk",
    Reason.ADDRESSES: "without a free address",
}


@dataclass(frozen=True, slots=True)
class Placement:
    """One VM's place: a host and the NUMA cells it fits in. All figures but the disk's are of each of these cells:
    whole physical cores or shared vCPUs, ordinary memory or huge pages."""

    vm_id: UUID
    name: str
    host_id: int
    host: str
    cells: tuple[int, ...]
    cores: int
    memory_mib: int
    disk_mib: int
    shared_vcpus: int = 0
    pages_2m: int = 0
    pages_1g: int = 0

    @property
    def per_cell(self) -> dict[CellResource, int]:
        """What it takes of each of its cells, by every resource that cells have."""
        return {resource: getattr(self, resource) for resource in CELL_RESOURCES}


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
