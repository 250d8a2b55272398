# SPDX-License-Identifier: Apache-2.0
"""Another number of vCPUs for a VM that is there. Those that stay keep their CPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ppec_agentd.numa import refusals
from ppec_agentd.numa.choose import in_cell, on_one_socket
from ppec_agentd.numa.guest_topology import regrown
from ppec_agentd.numa.pins import granted, named_cells, seated
from ppec_agentd.numa.plan import GuestCell, NumaPlan, PinRequest
from ppec_agentd.numa.pool import CpuPool, seats, seats_of
from ppec_agentd.numa.shared import plan_shared
from ppec_agentd.topology import Cell, Core
from ppec_contract.vm import SmtPolicy


def replan(pool: CpuPool, plan: NumaPlan, request: PinRequest) -> NumaPlan:
    """The plan of `plan`'s VM with `request.vcpus`, on the cells it has.

    In `pool` the VM's own cores are taken, and its own shared vCPUs are not. Growing fills the idle threads of its own
    cores first; shrinking gives up the last vCPUs, and the cores that then serve none. Raises as `plan_pins` does.
    """
    cells = named_cells(pool, request)
    if request.vcpus < 2 or request.vcpus % 2:
        raise refusals.odd_vcpus(request)
    if request.shared:
        return plan_shared(pool, cells, request)
    pinned = [pin.pcpu for pin in plan.pins]
    if request.vcpus <= len(pinned):
        return granted(pool, cells, pinned[: request.vcpus], request, _mirrored(pool, plan, request))
    if plan.guest_cells:
        return _grow_across(pool, cells, plan, request)
    idle = _idle(pool, pinned, request.smt)
    wanted = request.vcpus - len(pinned)
    missing = wanted - len(idle)
    if missing <= 0:
        return granted(pool, cells, pinned + idle[:wanted], request)
    socket = next((core.socket for core in _own(pool, pinned)), None)
    more = on_one_socket(pool, cells, missing, request.smt, socket)
    if isinstance(more, int):
        raise refusals.too_large(pool, request, more + len(idle) + len(pinned))
    return granted(pool, cells, pinned + idle + seated(more, missing, request.smt), request)


def _grow_across(pool: CpuPool, cells: Sequence[Cell], plan: NumaPlan, request: PinRequest) -> NumaPlan:
    """Each new vCPU goes to the host cell that its guest cell mirrors: the guest was told so at its start."""
    guest_cells = regrown(pool.topology, plan.guest_cells, request.most_vcpus, plan.threads_per_core)
    pinned = [pin.pcpu for pin in plan.pins]
    seat: dict[int, int] = dict(enumerate(pinned))
    for guest in guest_cells:
        new = [vcpu for vcpu in guest.vcpus if len(pinned) <= vcpu < request.vcpus]
        seat |= zip(new, _more_in_cell(pool, guest, pinned, len(new), request), strict=True)
    return granted(pool, cells, [seat[vcpu] for vcpu in range(request.vcpus)], request, guest_cells)


def _more_in_cell(
    pool: CpuPool, guest: GuestCell, pinned: Sequence[int], wanted: int, request: PinRequest
) -> list[int]:
    cell = pool.topology.by_cell[guest.cell]
    idle = [cpu for cpu in _idle(pool, pinned, request.smt) if pool.topology.cell_of_cpu[cpu] == cell.cell]
    free = [core for core in pool.free_of(cell) if seats(core, request.smt)]
    missing = max(0, wanted - len(idle))
    if missing > seats_of(free, request.smt):
        own = sum(1 for cpu in pinned if pool.topology.cell_of_cpu[cpu] == cell.cell)
        short = replace(request, vcpus=own + wanted, cells=(cell.cell,))
        raise refusals.too_few_cores(short, own + len(idle) + seats_of(free, request.smt))
    more = seated(in_cell(cell, free, missing, request.smt), missing, request.smt) if missing else []
    return [*idle, *more][:wanted]


def _mirrored(pool: CpuPool, plan: NumaPlan, request: PinRequest) -> tuple[GuestCell, ...]:
    if not plan.guest_cells:
        return ()
    return regrown(pool.topology, plan.guest_cells, request.most_vcpus, plan.threads_per_core)


def _own(pool: CpuPool, pinned: Sequence[int]) -> list[Core]:
    known = pool.topology.core_of_cpu
    return list(dict.fromkeys(known[cpu] for cpu in pinned if cpu in known))


def _idle(pool: CpuPool, pinned: Sequence[int], smt: SmtPolicy) -> list[int]:
    """The threads of its own cores that none of its vCPUs runs on, and may."""
    used = set(pinned)
    return [cpu for core in _own(pool, pinned) for cpu in core.cpus[: seats(core, smt)] if cpu not in used]
