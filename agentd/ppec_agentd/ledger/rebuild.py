# SPDX-License-Identifier: Apache-2.0
"""What a domain that is there holds, whatever it should hold: the ledger is rebuilt from these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ppec_agentd.hypervisor import Domain, DomainMetadata
from ppec_agentd.ledger.claims import NO_POOL, Holding
from ppec_agentd.ledger.drives import CellDrives
from ppec_agentd.ledger.memory import CellMemory
from ppec_agentd.numa import CpuPool, GuestCell, NumaPlan, PinRequest
from ppec_agentd.numa.guest_topology import mirror, threads_shown
from ppec_agentd.numa.shared import shared_by_cell, shared_plan
from ppec_contract.vm import NumaPolicy, SmtPolicy, VcpuPin


def holding_of(domain: Domain, pool: CpuPool, memory: CellMemory, drives: CellDrives) -> Holding:
    """Ours holds what its metadata says, and the CPUs and drives that it was found to have besides.

    A foreign one holds the CPUs it is pinned to, if any; its memory counts on the cells it is bound to, or else on the
    cell with the most left.
    """
    ours = domain.metadata
    named = ours.cells if ours else domain.memory_cells
    cells = tuple(cell for cell in named if cell in pool.topology.by_cell) or (_emptiest(pool, memory),)
    policy = ours.numa if ours else NumaPolicy()
    vcpus = ours.vcpus if ours else domain.vcpus
    request = PinRequest(vcpus, cells, f"vm {domain.name}", policy, ours.max_vcpus if ours else 0)
    plan = plan_of(pool, request, ours.pins if ours else domain.pins, ours.guest_cells if ours else ())
    shares = memory.forced(ours.memory_mib if ours else domain.memory_mib, cells, policy.huge_page_kib)
    if ours and ours.guest_cells:
        shares = _as_shown(ours, shares)
    return Holding(
        vm_id=domain.vm_id,
        name=domain.name,
        plan=plan,
        cpus=pool.whole([*plan.cpus, *(pin.pcpu for pin in domain.pins)]),
        memory_by_cell_mib=shares,
        disk_mib=ours.disk_mib if ours else 0,
        committed=True,
        foreign=ours is None,
        policy=policy,
        vcpus=vcpus,
        max_vcpus=ours.max_vcpus if ours else 0,
        max_memory_mib=ours.max_memory_mib if ours else 0,
        shared_by_cell=shared_by_cell(pool, cells, vcpus) if ours and request.shared else {},
        pool=ours.pool if ours else NO_POOL,
        drives=_drives(domain, drives),
        locked=_locked(domain),
    )


def as_held(domain: Domain, held: Holding, pool: CpuPool, drives: CellDrives) -> bool:
    """Whether the domain uses what its holding says, as far as the ledger counts it.

    Of ours only pins and devices can differ, its metadata says the rest; a foreign one may have changed in any way.
    """
    if held.cpus != _used(domain, held, pool) or held.drives != _drives(domain, drives):
        return False
    if held.locked != _locked(domain):
        return False
    if not held.foreign:
        return True
    bound = frozenset(domain.memory_cells) & pool.topology.by_cell.keys()
    return held.memory_mib == domain.memory_mib and (not bound or bound == set(held.plan.cells))


def observed(domain: Domain, held: Holding, pool: CpuPool, memory: CellMemory, drives: CellDrives) -> Holding:
    """What it holds now that it is seen to use other CPUs, drives or memory than before."""
    if held.foreign:
        return holding_of(domain, pool, memory, drives)
    return replace(held, cpus=_used(domain, held, pool), drives=_drives(domain, drives), locked=_locked(domain))


def _locked(domain: Domain) -> bool:
    """Also by drives that are none of the settings' any more."""
    granted = domain.metadata.nvme_drives if domain.metadata else ()
    return bool(granted or domain.host_devices)


def _drives(domain: Domain, drives: CellDrives) -> frozenset[str]:
    granted = domain.metadata.nvme_drives if domain.metadata else ()
    return drives.known((*granted, *domain.host_devices))


def _used(domain: Domain, held: Holding, pool: CpuPool) -> frozenset[int]:
    granted = () if held.foreign else held.plan.cpus
    return pool.whole([*granted, *(pin.pcpu for pin in domain.pins)])


def plan_of(
    pool: CpuPool, request: PinRequest, pins: Sequence[VcpuPin], guest_cells: tuple[GuestCell, ...] = ()
) -> NumaPlan:
    """The plan that these pins are, on cells that the host has. The guest's cells, where it isn't known what it was
    shown, are those that the pins make."""
    cells = [pool.topology.by_cell[number] for number in sorted(set(request.cells))]
    if request.shared:
        return replace(shared_plan(pool, cells), guest_cells=guest_cells)
    ordered = tuple(sorted(pins, key=lambda pin: pin.vcpu))
    threads = threads_shown(pool.topology, ordered, request.most_vcpus, guest_cells)
    known = bool(ordered) and all(pin.pcpu in pool.topology.cell_of_cpu for pin in ordered)
    if request.policy.multi_cell and known and not guest_cells:
        memory_only = (cell.cell for cell in cells if not cell.cores)
        guest_cells = mirror(pool.topology, ordered, request.most_vcpus, memory_only)
    return NumaPlan(
        pins=ordered,
        cpus=tuple(sorted(pool.whole(pin.pcpu for pin in ordered))),
        cells=tuple(cell.cell for cell in cells),
        emulator_cpus=pool.emulator_cpus(cells),
        threads_per_core=1 if request.smt is SmtPolicy.ISOLATE else threads,
        guest_cells=guest_cells,
    )


def _as_shown(ours: DomainMetadata, even: dict[int, int]) -> dict[int, int]:
    """The memory of a guest's cells lies where it was told, as far as that adds up to what the VM holds."""
    shown = {cell.cell: cell.memory_mib for cell in ours.guest_cells}
    return shown if sum(shown.values()) == ours.memory_mib else even


def _emptiest(pool: CpuPool, memory: CellMemory) -> int:
    return max(pool.topology.by_cell, key=lambda cell: (memory.free_mib(cell), -cell))
