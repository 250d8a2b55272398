# SPDX-License-Identifier: Apache-2.0
"""One host with every kind of core and page, its ledger, and what VMs ask of it."""

from __future__ import annotations

import itertools
import uuid
from dataclasses import replace

from ppec_agentd.hypervisor import Domain, DomainMetadata
from ppec_agentd.ledger import Claim, DriveState, Holding, Ledger
from ppec_agentd.topology import declare_topology
from ppec_contract.vm import NumaPolicy, VmState

TOPOLOGY = declare_topology("sockets=2,cells=2,cores=5,threads=2,memory_mib=4000,huge_2m=500,huge_1g=1")
ORDINARY_MIB = 4000 - 1000 - 1024 - 100
DISK_MIB = 5000
POOLS_MIB = {"fast": 100}
# Two near each of the first three cells, none near the last.
CELL_BY_DRIVE = {f"0000:{bus:02x}:00.0": bus // 2 for bus in range(6)}

_numbers = itertools.count(1)


def new_ledger() -> Ledger:
    return Ledger(
        TOPOLOGY,
        DISK_MIB,
        reserved_cores_per_cell=1,
        reserved_memory_per_cell_mib=100,
        shared_cores_per_cell=1,
        shared_vcpus_per_cpu=3,
        pools_mib=POOLS_MIB,
        cell_by_drive=CELL_BY_DRIVE,
    )


def with_free_drives(ledger: Ledger) -> Ledger:
    for drive in CELL_BY_DRIVE:
        ledger.mark_drive(drive, DriveState.FREE)
    return ledger


def claim(cells: tuple[int, ...] = (0,), policy: NumaPolicy | None = None, pool: str = "", **sizes: int) -> Claim:
    number = next(_numbers)
    amounts = {"vcpus": 2, "memory_mib": 100, "disk_mib": 10} | sizes
    policy = policy or NumaPolicy()
    return Claim(uuid.UUID(int=number), f"vm-{number}", cells=cells, policy=policy, pool=pool, **amounts)


def domain_of(held: Holding) -> Domain:
    """The domain that a VM's definition and metadata make, as it is after a crash."""
    plan = held.plan
    metadata = DomainMetadata(
        held.vm_id, held.name, "op", plan.cells, held.vcpus, held.memory_mib, held.disk_mib, "", plan.pins,
        held.policy, held.max_vcpus, held.max_memory_mib, plan.guest_cells, pool=held.pool,
        nvme_drives=tuple(sorted(held.drives)),
    )  # fmt: skip
    seen = Domain(held.vm_id, held.name, VmState.RUNNING, held.vcpus, held.memory_mib, plan.pins, plan.cells, metadata)
    return replace(seen, host_devices=metadata.nvme_drives)
