# SPDX-License-Identifier: Apache-2.0
"""Which host CPUs a VM gets. Pure.

The rules, as policy:

1. A VM takes whole physical cores: SMT siblings never serve two VMs.
2. vCPU counts are even, and no VM is larger than a socket, unless its policy lets it span cells.
3. The lowest-numbered cores of each cell are reserved for the host, for QEMU's own threads and for I/O threads; the
   next ones are for VMs that share.
4. Pins are disjoint, on one socket and inside the cells the plan chose; memory is bound to those cells.
5. Several VMs at once are planned largest first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ppec_agentd.numa import refusals
from ppec_agentd.numa.choose import in_cell, on_one_socket
from ppec_agentd.numa.guest_topology import mirror, threads_shown
from ppec_agentd.numa.plan import GuestCell, NumaPlan, PinRequest
from ppec_agentd.numa.pool import CpuPool, seats, seats_of
from ppec_agentd.numa.shared import plan_shared
from ppec_agentd.topology import Cell, Core
from ppec_contract.errors import PpecError
from ppec_contract.vm import SmtPolicy, VcpuPin


def plan_pins(pool: CpuPool, request: PinRequest) -> NumaPlan:
    """Choose cores for one VM, by its policy.

    Raises ``vm.odd_vcpus``, ``vm.exceeds_socket`` (this host never could), ``host.no_capacity`` (not now, or the
    plan names a cell this host doesn't have) and ``request.invalid`` (cells of several sockets, and the policy does not
    span them). `details` hold the figures: resource, wanted and free.
    """
    cells = named_cells(pool, request)
    if request.vcpus < 2 or request.vcpus % 2:
        raise refusals.odd_vcpus(request)
    if request.shared:
        return plan_shared(pool, cells, request)
    if request.policy.multi_cell:
        return _plan_across(pool, cells, request)
    cores = on_one_socket(pool, cells, request.vcpus, request.smt)
    if isinstance(cores, int):
        raise refusals.too_large(pool, request, cores)
    return granted(pool, cells, seated(cores, request.vcpus, request.smt), request)


def plan_largest_first(pool: CpuPool, requests: Sequence[PinRequest]) -> list[NumaPlan | PpecError]:
    """Plan several VMs on one host, in descending order of vCPUs; the answers are in the order of the requests.

    A refused VM does not stop the smaller ones after it.
    """
    answers: dict[int, NumaPlan | PpecError] = {}
    for index in sorted(range(len(requests)), key=lambda i: -requests[i].vcpus):
        try:
            plan = plan_pins(pool, requests[index])
        except PpecError as refusal:
            answers[index] = refusal
        else:
            answers[index] = plan
            pool = pool.take(plan.cpus)
            if plan.shared_cpus:
                pool = pool.share(dict.fromkeys(plan.cells[:1], requests[index].vcpus))
    return [answers[index] for index in range(len(requests))]


def named_cells(pool: CpuPool, request: PinRequest) -> list[Cell]:
    """The cells of a request, ascending. Raises as `plan_pins` does."""
    known = pool.topology.by_cell
    if not request.cells or not known.keys() >= set(request.cells):
        raise refusals.missing_cells(request, known)
    cells = [known[number] for number in sorted(set(request.cells))]
    sockets = {cell.socket for cell in cells}
    if len(sockets) > 1 and not request.policy.multi_cell:
        raise refusals.several_sockets(request, sockets)
    return cells


def seated(cores: Iterable[Core], vcpus: int, smt: SmtPolicy) -> list[int]:
    """The CPUs that so many vCPUs run on, core by core."""
    ordered = sorted(cores, key=lambda core: core.cpus)
    return [cpu for core in ordered for cpu in core.cpus[: seats(core, smt)]][:vcpus]


def granted(
    pool: CpuPool,
    cells: Sequence[Cell],
    seats_taken: Sequence[int],
    request: PinRequest,
    guest_cells: tuple[GuestCell, ...] = (),
) -> NumaPlan:
    """The plan of a dedicated VM whose vCPUs, in order, run on these CPUs. `guest_cells` are those it has already."""
    pins = tuple(VcpuPin(vcpu=vcpu, pcpu=cpu) for vcpu, cpu in enumerate(seats_taken))
    return NumaPlan(
        pins=pins,
        cpus=tuple(sorted(pool.whole(seats_taken))),
        cells=tuple(cell.cell for cell in cells),
        emulator_cpus=pool.emulator_cpus(cells),
        # A VM alone on its cores has no siblings to show.
        threads_per_core=1
        if request.smt is SmtPolicy.ISOLATE
        else threads_shown(pool.topology, pins, request.most_vcpus, guest_cells),
        guest_cells=guest_cells,
    )


def _plan_across(pool: CpuPool, cells: Sequence[Cell], request: PinRequest) -> NumaPlan:
    """Cores of several cells in equal parts, as far as what is free allows, a whole core at a time.

    Of the named cells those that give cores are used, and those that never have any: they give memory.
    """
    smt = request.smt
    free = {cell.cell: [core for core in pool.free_of(cell) if seats(core, smt)] for cell in cells}
    width = {number: seats_of(cores, smt) for number, cores in free.items() if cores}
    if sum(width.values()) < request.vcpus:
        raise refusals.too_few_cores(request, sum(width.values()))
    chosen: dict[int, list[int]] = {}
    left = request.vcpus
    order = sorted(width, key=lambda number: (width[number], number))
    for position, number in enumerate(order):
        core = max(seats(core, smt) for core in free[number])
        fair = -(-left // (core * (len(order) - position))) * core
        share = min(fair, width[number], left)
        if share:
            cores = in_cell(pool.topology.by_cell[number], free[number], share, smt)
            chosen[number] = seated(cores, share, smt)
            left -= share
    taken = [cpu for number in sorted(chosen) for cpu in chosen[number]]
    memory_only = [cell.cell for cell in cells if not cell.cores]
    used = [cell for cell in cells if cell.cell in chosen or not cell.cores]
    plan = granted(pool, used, taken, request)
    return replace(plan, guest_cells=mirror(pool.topology, plan.pins, request.most_vcpus, memory_only))
