# SPDX-License-Identifier: Apache-2.0
"""From a host's present state and what is wanted to a retune plan. Pure.

`search.py` finds which shapes move where; here each of its moves gets a VM and pins. VMs that can move are those with
cores and memory of their own in one cell: a VM on shared CPUs needs no cell, one that spans cells has guest cells
that mirror the host's, and a domain made by hand is not ours to touch.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from uuid import UUID

from ppec_agentd.numa import CpuPool, PinRequest, plan_pins
from ppec_agentd.retune.search import EXPANSIONS, Bin, Bounds, Found, Goal, Shape, cheapest_moves
from ppec_agentd.topology import Cell, format_cpu_list
from ppec_contract.errors import PpecError
from ppec_contract.retune import MAX_MOVES, CellRoom, RetuneBounds, RetuneMove, RetunePlan, RetuneSeat, RetuneWant
from ppec_contract.vm import CpuPolicy, NumaPolicy, SmtPolicy

SUBJECT = "retune"
_UNBOUNDED = Bounds(MAX_MOVES, 2**62)


@dataclass(frozen=True, slots=True)
class Tenant:
    """A VM that can move: `cpus` are all logical CPUs of its cores, which are all of `seat.cell`, as is its memory."""

    vm_id: UUID
    name: str
    vcpus: int
    memory_mib: int
    numa: NumaPolicy
    seat: RetuneSeat
    cpus: frozenset[int]


@dataclass(frozen=True, slots=True)
class HostState:
    """The host now. `memory_free_mib` is by cell, then by page size in KiB, 0 the ordinary pages."""

    pool: CpuPool
    memory_free_mib: Mapping[int, Mapping[int, int]]
    tenants: tuple[Tenant, ...]


def plan_retune(state: HostState, want: RetuneWant, bounds: RetuneBounds) -> RetunePlan:
    """The plan that copies the least memory, then makes the fewest moves.

    Raises ``request.invalid`` for what no retune can help, ``vm.exceeds_socket`` when the wanted VM would not fit on
    the empty host, and ``retune.not_possible`` with what it would take if the bounds were higher.
    """
    goals = _goals(state, want)
    bins = _bins(state)
    best = _best(bins, goals, Bounds(bounds.moves, bounds.memory_mib))
    if best is None:
        raise _not_possible(want, bounds, _best(bins, goals, _UNBOUNDED))
    found, goal = best
    moves, after = _seated(state, found)
    return RetunePlan(
        opened=tuple(sorted(goal.cells)),
        moves=moves,
        before=_rooms(state, goal.page_kib),
        after=_rooms(after, goal.page_kib),
        cheapest=found.cheapest,
    )


def _best(bins: Sequence[Bin], goals: Sequence[Goal], bounds: Bounds) -> tuple[Found, Goal] | None:
    best: tuple[Found, Goal] | None = None
    # A host of many cells must not take many times as long: the goals share what may be tried, and to expand is to look
    # at a move from each cell to each other.
    expansions = max(1, 4 * EXPANSIONS // len(bins) ** 2 // len(goals))
    for goal in goals:
        found = cheapest_moves(bins, goal, bounds, min(EXPANSIONS, expansions))
        if found is None:
            continue
        if best is None or _cost(found) < _cost(best[0]):
            best = (found, goal)
            # Others are worth their search only if they cost less.
            bounds = replace(bounds, memory_mib=found.moved_mib)
        if not found.moves:
            break
    return best


def _cost(found: Found) -> tuple[int, int]:
    return found.moved_mib, len(found.moves)


# --- what would do ----------------------------------------------------------------------------------------------------


def _goals(state: HostState, want: RetuneWant) -> list[Goal]:
    """The cells, or the smallest sets of cells of one socket, in which the wanted would fit on an empty host."""
    _refuse_pointless(want)
    cells = [cell for cell in _asked(state.pool, want) if _width(state.pool, cell) is not None]
    for size in range(1, 1 + (1 if want.vcpus is None else len(cells))):
        goals = [goal for chosen in combinations(cells, size) if (goal := _goal(state.pool, want, chosen)) is not None]
        if goals:
            return goals
    raise PpecError(
        "vm.exceeds_socket",
        f"{_wanted(want)} fits in no socket's cells{_among(want)}, were they all empty",
        hint="Choose a smaller flavor, or a host with larger sockets.",
        subject=SUBJECT,
        details={"vcpus": want.vcpus, "memory_mib": want.memory_mib, "cells": list(want.cells)},
    )


def _refuse_pointless(want: RetuneWant) -> None:
    if want.numa.cpus is CpuPolicy.SHARED or want.numa.multi_cell:
        raise PpecError(
            "request.invalid",
            "a VM on shared CPUs, or one that may span cells, needs no open cell",
            hint="Ask for a VM with cores of its own on one socket.",
            subject=SUBJECT,
        )


def _asked(pool: CpuPool, want: RetuneWant) -> tuple[Cell, ...]:
    known = pool.topology.by_cell
    missing = sorted(set(want.cells) - known.keys())
    if missing:
        raise PpecError(
            "request.invalid",
            f"NUMA cells {format_cpu_list(missing)} are wanted; this host has {format_cpu_list(known)}",
            subject=SUBJECT,
            details={"wanted": list(want.cells), "found": sorted(known)},
        )
    return tuple(known[number] for number in sorted(want.cells or known))


def _goal(pool: CpuPool, want: RetuneWant, cells: tuple[Cell, ...]) -> Goal | None:
    """What has to be free in these cells; None if they could never hold it, or are not of one socket and one kind."""
    widths = {_width(pool, cell) for cell in cells}
    width = next(iter(widths))
    if len(widths) > 1 or width is None or len({cell.socket for cell in cells}) > 1:
        return None
    usable = sum(len(pool.usable_of(cell)) for cell in cells)
    cores = usable if want.vcpus is None else _cores(want.vcpus, want.numa, width)
    if cores is None or cores > usable:
        return None
    memory_mib = want.memory_mib or 0
    if memory_mib > sum(cell.memory_mib for cell in cells):
        return None
    return Goal(frozenset(cell.cell for cell in cells), cores, memory_mib, want.numa.huge_page_kib)


def _cores(vcpus: int, numa: NumaPolicy, width: int) -> int | None:
    """Whole cores under so many vCPUs; None if such cores won't do."""
    if numa.smt is SmtPolicy.ISOLATE:
        return vcpus
    if numa.smt is SmtPolicy.REQUIRE and width == 1:
        return None
    return -(-vcpus // width)


def _width(pool: CpuPool, cell: Cell) -> int | None:
    """Threads of the cell's cores; None if they differ, or if VMs can't have any."""
    widths = {len(core.cpus) for core in pool.usable_of(cell)}
    return widths.pop() if len(widths) == 1 else None


# --- from shapes to VMs -----------------------------------------------------------------------------------------------


def _bins(state: HostState) -> list[Bin]:
    residents: dict[int, Counter[Shape]] = defaultdict(Counter)
    for tenant in state.tenants:
        shape = _shape(state.pool, tenant)
        if shape is not None:
            residents[tenant.seat.cell][shape] += 1
    return [
        Bin(
            cell.cell,
            len(state.pool.free_of(cell)),
            state.memory_free_mib.get(cell.cell, {}),
            _width(state.pool, cell),
            residents[cell.cell],
        )
        for cell in state.pool.topology.cells
    ]


def _shape(pool: CpuPool, tenant: Tenant) -> Shape | None:
    """None if the VM sits on cores of several widths: where else would its guest find its siblings?"""
    width = _width(pool, pool.topology.by_cell[tenant.seat.cell])
    if width is None:
        return None
    return Shape(len(tenant.cpus) // width, tenant.memory_mib, tenant.numa.huge_page_kib, width)


def _seated(state: HostState, found: Found) -> tuple[tuple[RetuneMove, ...], HostState]:
    """Each move with a VM and its new pins, and the host as it is then."""
    waiting = _by_place(state)
    moves = []
    for step in found.moves:
        tenant = waiting[step.source, step.shape].pop(0)
        plan = plan_pins(state.pool, PinRequest(tenant.vcpus, (step.target,), f"vm {tenant.name}", tenant.numa))
        seat = RetuneSeat(cell=step.target, pins=plan.pins, emulator_cpus=plan.emulator_cpus)
        moves.append(
            RetuneMove(
                vm_id=tenant.vm_id, name=tenant.name, before=tenant.seat, after=seat, memory_mib=tenant.memory_mib
            )
        )
        moved = replace(tenant, seat=seat, cpus=frozenset(plan.cpus))
        state = _after(state, tenant, moved)
        waiting[step.target, step.shape].append(moved)
    return tuple(moves), state


def _by_place(state: HostState) -> defaultdict[tuple[int, Shape], list[Tenant]]:
    waiting: defaultdict[tuple[int, Shape], list[Tenant]] = defaultdict(list)
    for tenant in sorted(state.tenants, key=lambda tenant: (tenant.name, tenant.vm_id)):
        shape = _shape(state.pool, tenant)
        if shape is not None:
            waiting[tenant.seat.cell, shape].append(tenant)
    return waiting


def _after(state: HostState, tenant: Tenant, moved: Tenant) -> HostState:
    memory = {cell: dict(by_page) for cell, by_page in state.memory_free_mib.items()}
    page_kib = tenant.numa.huge_page_kib
    for cell, sign in ((tenant.seat.cell, 1), (moved.seat.cell, -1)):
        of_cell = memory.setdefault(cell, {})
        of_cell[page_kib] = of_cell.get(page_kib, 0) + sign * tenant.memory_mib
    pool = replace(state.pool, taken=(state.pool.taken - tenant.cpus) | moved.cpus)
    others = tuple(other for other in state.tenants if other.vm_id != tenant.vm_id)
    return HostState(pool, memory, (*others, moved))


def _rooms(state: HostState, page_kib: int) -> tuple[CellRoom, ...]:
    return tuple(
        CellRoom(
            cell=cell.cell,
            cores=len(state.pool.free_of(cell)),
            memory_mib=max(0, state.memory_free_mib.get(cell.cell, {}).get(page_kib, 0)),
        )
        for cell in state.pool.topology.cells
    )


# --- refusals ---------------------------------------------------------------------------------------------------------


def _not_possible(want: RetuneWant, bounds: RetuneBounds, unbounded: tuple[Found, Goal] | None) -> PpecError:
    what = f"{_wanted(want)}{_among(want)} can't be given room"
    if unbounded is None:
        return PpecError(
            "retune.not_possible",
            f"{what} by moving VMs between the cells of this host",
            hint="Free cores or memory on the host first, or place the VM elsewhere.",
            subject=SUBJECT,
            details={"vcpus": want.vcpus, "memory_mib": want.memory_mib},
        )
    found, _ = unbounded
    return PpecError(
        "retune.not_possible",
        f"{what} within {bounds.moves} moves and {bounds.memory_mib} MiB: it takes {len(found.moves)} moves of "
        f"{found.moved_mib} MiB in all",
        hint="Allow more moves or more memory to be copied.",
        subject=SUBJECT,
        details={
            "vcpus": want.vcpus,
            "memory_mib": want.memory_mib,
            "moves": len(found.moves),
            "moved_mib": found.moved_mib,
        },
    )


def _wanted(want: RetuneWant) -> str:
    if want.vcpus is None:
        return "a whole cell" + (f" with {want.memory_mib} MiB free" if want.memory_mib else "")
    return f"a VM of {want.vcpus} vCPUs and {want.memory_mib or 0} MiB"


def _among(want: RetuneWant) -> str:
    return f" in cells {format_cpu_list(want.cells)}" if want.cells else ""
