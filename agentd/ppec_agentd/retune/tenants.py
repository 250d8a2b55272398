# SPDX-License-Identifier: Apache-2.0
"""The host as retune sees it, out of the ledger. Pure."""

from __future__ import annotations

from collections.abc import Collection
from uuid import UUID

from ppec_agentd.ledger import Holding, Ledger
from ppec_agentd.numa import CpuPool
from ppec_agentd.retune.plan import HostState, Tenant
from ppec_contract.host import CellReport
from ppec_contract.retune import RetuneSeat
from ppec_contract.vm import CpuPolicy


def host_state(ledger: Ledger, waiting: Collection[UUID] = ()) -> HostState:
    """`waiting` are VMs that get another size at their next start: they have two definitions, and stay.

    The looks at the ledger are not one: a plan is checked again when it is carried out.
    """
    pool = ledger.pool()
    tenants = (tenant_of(held, pool) for held in ledger.holdings() if held.vm_id not in waiting)
    return HostState(
        pool,
        {cell.cell: _memory_free_mib(cell) for cell in ledger.cells()},
        tuple(tenant for tenant in tenants if tenant is not None),
    )


def tenant_of(held: Holding, pool: CpuPool) -> Tenant | None:
    """None for a VM that can't move: not ours, shown host cells, on shared CPUs, in two cells, changing now, or with
    devices of the host: while it has them its memory is locked."""
    cells = {pool.topology.cell_of_cpu.get(cpu) for cpu in held.cpus} | {
        cell for cell, memory_mib in held.memory_by_cell_mib.items() if memory_mib
    }
    movable = (
        held.committed
        and not held.foreign
        and not held.pending
        and held.policy.cpus is CpuPolicy.DEDICATED
        and not held.plan.guest_cells
        and not held.locked
        # Found on other CPUs than it was granted: nobody knows why, so nobody moves it.
        and held.cpus == frozenset(held.plan.cpus)
        and len(held.plan.pins) == held.vcpus
        and cells == set(held.plan.cells)
        and len(cells) == 1
    )
    if not movable:
        return None
    return Tenant(held.vm_id, held.name, held.vcpus, held.memory_mib, held.policy, seat_of(held), held.cpus)


def seat_of(held: Holding) -> RetuneSeat:
    """Where it holds its place: of a VM in one cell."""
    return RetuneSeat(cell=held.plan.cells[0], pins=held.plan.pins, emulator_cpus=held.plan.emulator_cpus)


def _memory_free_mib(cell: CellReport) -> dict[int, int]:
    huge = {pages.size_kib: pages.pages_free * pages.size_kib // 1024 for pages in cell.huge_pages}
    return {0: cell.memory_free_mib, **huge}
