# SPDX-License-Identifier: Apache-2.0
"""VMs that share: nothing is pinned, but how many vCPUs float over a cell's shared CPUs is bounded."""

from __future__ import annotations

from collections.abc import Sequence

from ppec_agentd.numa import refusals
from ppec_agentd.numa.plan import NumaPlan, PinRequest
from ppec_agentd.numa.pool import CpuPool, cpus_of
from ppec_agentd.numa.shares import even_shares
from ppec_agentd.topology import Cell


def plan_shared(pool: CpuPool, cells: Sequence[Cell], request: PinRequest) -> NumaPlan:
    """Raises `host.no_capacity` and, as no VM overcommits against itself, `vm.exceeds_socket`.

    A VM with more vCPUs than the CPUs it floats over would wait for nobody but itself.
    """
    largest = _largest(pool)
    if request.vcpus > largest:
        raise refusals.exceeds_socket(request, largest) if largest else refusals.too_few_shared(request, 0)
    plan = shared_plan(pool, cells)
    free = sum(max(0, pool.shared_free(cell)) for cell in cells)
    if request.vcpus > min(free, len(plan.shared_cpus)):
        raise refusals.too_few_shared(request, min(free, len(plan.shared_cpus)))
    return plan


def shared_plan(pool: CpuPool, cells: Sequence[Cell]) -> NumaPlan:
    """Where a VM on these cells floats, room or not."""
    return NumaPlan(
        pins=(),
        cpus=(),
        cells=tuple(cell.cell for cell in cells),
        emulator_cpus=pool.emulator_cpus(cells),
        threads_per_core=1,
        shared_cpus=cpus_of(core for cell in cells for core in pool.shared_of(cell)),
    )


def shared_by_cell(pool: CpuPool, cells: Sequence[int], vcpus: int) -> dict[int, int]:
    """So many vCPUs over these cells, evenly as far as there is room; what finds none counts on the first."""
    free = {cell: max(0, pool.shared_free(pool.topology.by_cell[cell])) for cell in cells}
    shares = even_shares(vcpus, free)
    shares[cells[0]] += vcpus - sum(shares.values())
    return shares


def _largest(pool: CpuPool) -> int:
    per_socket = dict.fromkeys(pool.topology.sockets, 0)
    for cell in pool.topology.cells:
        for core in pool.shared_of(cell):
            per_socket[core.socket] += len(core.cpus)
    return max(per_socket.values(), default=0)
