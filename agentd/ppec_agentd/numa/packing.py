# SPDX-License-Identifier: Apache-2.0
"""Several dedicated VMs onto one host, on cells of the planner's choice: for plans over a whole host.

The blog's rule is to take VMs in descending order of cores and to pin each to the first socket that has room. Here that
is one way of two; the other puts each where it breaks up the least. The better outcome is taken, so the plan is never
worse than the blog's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ppec_agentd.numa.pins import granted, plan_pins, seated
from ppec_agentd.numa.plan import NumaPlan, PinRequest
from ppec_agentd.numa.pool import CpuPool, seats_of
from ppec_agentd.topology import Cell, Core
from ppec_contract.errors import PpecError
from ppec_contract.vm import SmtPolicy

Fit = Callable[[CpuPool, int], NumaPlan | None]


@dataclass(frozen=True, order=True, slots=True)
class Room:
    """What an outcome is judged by, the first difference deciding: vCPUs that found a place, then what is still whole,
    then the largest VM that still fits."""

    vcpus: int
    whole_sockets: int
    whole_cells: int
    largest_vcpus: int


@dataclass(frozen=True, slots=True)
class Packing:
    """A plan per VM in the order asked, None where there was no room, and the pool after them."""

    plans: tuple[NumaPlan | None, ...]
    pool: CpuPool

    @property
    def room(self) -> Room:
        placed = sum(len(plan.pins) for plan in self.plans if plan)
        return room_left(self.pool, placed)


def pack(pool: CpuPool, sizes: Sequence[int]) -> Packing:
    """Places VMs of these even numbers of vCPUs, largest first; one that finds no room doesn't stop the others."""
    return max((pack_by(pool, sizes, fit) for fit in (least_broken, first_socket)), key=lambda packing: packing.room)


def pack_by(pool: CpuPool, sizes: Sequence[int], fit: Fit) -> Packing:
    """The same by one way of choosing."""
    plans: dict[int, NumaPlan | None] = {}
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        plan = plans[index] = fit(pool, sizes[index])
        if plan:
            pool = pool.take(plan.cpus)
    return Packing(tuple(plans[index] for index in range(len(sizes))), pool)


def first_socket(pool: CpuPool, vcpus: int) -> NumaPlan | None:
    """The blog's choice: the first socket with room, its lowest-numbered free cores."""
    for socket in pool.topology.sockets:
        free = [core for cell in pool.topology.cells for core in pool.free_of(cell) if core.socket == socket]
        if seats_of(free, SmtPolicy.PREFER) >= vcpus:
            ordered = sorted(free, key=lambda core: core.cpus)
            return _on_cores(pool, ordered, vcpus)
    return None


def least_broken(pool: CpuPool, vcpus: int) -> NumaPlan | None:
    """The place, of those in one socket each, after which the most is whole and the least is left over beside it."""
    choices = [plan for cells in _places(pool) if (plan := _planned(pool, cells, vcpus))]
    return min(choices, key=lambda plan: _damage(pool, plan), default=None)


def room_left(pool: CpuPool, placed: int = 0) -> Room:
    topology = pool.topology
    whole_cells = [cell for cell in topology.cells if pool.is_whole(cell)]
    free: dict[int, int] = dict.fromkeys(topology.sockets, 0)
    usable: dict[int, int] = dict.fromkeys(topology.sockets, 0)
    for cell in topology.cells:
        for core in pool.usable_of(cell):
            usable[core.socket] += len(core.cpus)
            free[core.socket] += len(core.cpus) if pool.taken.isdisjoint(core.cpus) else 0
    whole_sockets = sum(1 for socket in usable if usable[socket] and free[socket] == usable[socket])
    return Room(placed, whole_sockets, len(whole_cells), max(free.values(), default=0))


def _places(pool: CpuPool) -> list[tuple[int, ...]]:
    by_socket: dict[int, list[int]] = {}
    for cell in pool.topology.cells:
        by_socket.setdefault(cell.socket, []).append(cell.cell)
    return [tuple(cells) for cells in by_socket.values()]


def _planned(pool: CpuPool, cells: tuple[int, ...], vcpus: int) -> NumaPlan | None:
    try:
        plan = plan_pins(pool, PinRequest(vcpus, cells))
    except PpecError:
        return None
    used = {pool.topology.cell_of_cpu[cpu] for cpu in plan.cpus}
    named = [cell for cell in pool.topology.cells if cell.cell in used]
    return replace(plan, cells=tuple(cell.cell for cell in named), emulator_cpus=pool.emulator_cpus(named))


def _damage(pool: CpuPool, plan: NumaPlan) -> tuple[int, int, int, int]:
    before, after = room_left(pool), room_left(pool.take(plan.cpus))
    cells = [pool.topology.by_cell[cell] for cell in plan.cells]
    left_over = seats_of((core for cell in cells for core in pool.free_of(cell)), SmtPolicy.PREFER) - len(plan.cpus)
    return (
        before.whole_sockets - after.whole_sockets,
        before.whole_cells - after.whole_cells,
        len(cells),
        left_over,
    )


def _on_cores(pool: CpuPool, cores: Sequence[Core], vcpus: int) -> NumaPlan:
    cpus = seated(cores, vcpus, SmtPolicy.PREFER)
    used = {pool.topology.cell_of_cpu[cpu] for cpu in cpus}
    cells: list[Cell] = [cell for cell in pool.topology.cells if cell.cell in used]
    return granted(pool, cells, cpus, PinRequest(vcpus, tuple(sorted(used))))
