# SPDX-License-Identifier: Apache-2.0
"""Why a host can't take a VM."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class Reason(StrEnum):
    """Hosts are looked at in this order; each counts under the first reason that turns it away."""

    OUTSIDE_SCOPE = "outside-scope"
    ARCHITECTURE = "architecture"
    LABELS = "labels"
    SILENT = "silent"
    DRAINING = "draining"
    AGENT_TOO_OLD = "agent-too-old"
    NOT_SERVED = "not-served"
    NO_SIBLINGS = "no-siblings"
    NO_SHARED_CPUS = "no-shared-cpus"
    NO_DEDICATED_CPUS = "no-dedicated-cpus"
    NO_HUGE_PAGES = "no-huge-pages"
    NO_NVME = "no-nvme"
    NO_POOL = "no-pool"
    VM_LARGER_THAN_CELL = "vm-larger-than-cell"
    VM_LARGER_THAN_HOST = "vm-larger-than-host"
    FAILED_BEFORE = "failed-before"
    CONTENDED = "contended"
    ANTI_AFFINITY = "anti-affinity"
    AFFINITY = "affinity"
    CORES = "cores"
    SHARED_VCPUS = "shared-vcpus"
    MEMORY = "memory"
    HUGE_PAGES = "huge-pages"
    NVME = "nvme"
    NUMA_FIT = "numa-fit"
    NUMA_PARTS = "numa-parts"
    DISK = "disk"
    ADDRESSES = "addresses"
    N_PLUS_ONE = "n-plus-one"

    @property
    def words(self) -> str:
        """What is said of a host that this reason turns away: `3 hosts: 2 …, 1 …`."""
        return _WORDS[self]


_WORDS: Mapping[Reason, str] = {
    Reason.OUTSIDE_SCOPE: "outside the places asked for",
    Reason.ARCHITECTURE: "of another architecture",
    Reason.LABELS: "without the labels wanted, or with those avoided",
    Reason.SILENT: "silent",
    Reason.DRAINING: "draining",
    Reason.AGENT_TOO_OLD: "with an agent too old for what is asked",
    Reason.NOT_SERVED: "that the prefixes asked for do not serve",
    Reason.NO_SIBLINGS: "without SMT siblings",
    Reason.NO_SHARED_CPUS: "without CPUs set aside for sharing",
    Reason.NO_DEDICATED_CPUS: "all of whose CPUs are shared",
    Reason.NO_HUGE_PAGES: "without huge pages of that size",
    Reason.NO_NVME: "without that many NVMe drives near one cell",
    Reason.NO_POOL: "without that storage pool",
    Reason.VM_LARGER_THAN_CELL: "with NUMA cells smaller than the VM",
    Reason.VM_LARGER_THAN_HOST: "too small for the VM on any number of NUMA cells",
    Reason.FAILED_BEFORE: "where it failed before",
    Reason.CONTENDED: "where another request is just taking room",
    Reason.ANTI_AFFINITY: "beside VMs that it must stand apart from",
    Reason.AFFINITY: "away from VMs that it must stand with",
    Reason.CORES: "without enough free cores",
    Reason.SHARED_VCPUS: "without enough free vCPUs on shared CPUs",
    Reason.MEMORY: "without enough free memory",
    Reason.HUGE_PAGES: "without enough free huge pages",
    Reason.NVME: "without enough free NVMe drives",
    Reason.NUMA_FIT: "without a NUMA cell that has all of it free",
    Reason.NUMA_PARTS: "without NUMA cells that have equal parts of it free",
    Reason.DISK: "without enough free disk",
    Reason.ADDRESSES: "without a free address",
    Reason.N_PLUS_ONE: "after which a loss could not be made good (N+1)",
}
