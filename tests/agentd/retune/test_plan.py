# SPDX-License-Identifier: Apache-2.0
"""Retune plans: every one can be carried out as it stands, and what was wanted then fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from uuid import UUID

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ppec_agentd.numa import CpuPool, PinRequest, plan_pins
from ppec_agentd.retune.plan import HostState, Tenant, plan_retune
from ppec_agentd.topology import declare_topology
from ppec_contract.errors import PpecError
from ppec_contract.retune import RetuneBounds, RetunePlan, RetuneSeat, RetuneWant
from ppec_contract.vm import NumaPolicy

ORDINARY = NumaPolicy()


def empty_host(declaration: str, reserved_cores: int = 0) -> HostState:
    pool = CpuPool(declare_topology(declaration), reserved_cores)
    return HostState(pool, {cell.cell: {0: cell.memory_mib} for cell in pool.topology.cells}, ())


def with_vm(
    state: HostState, name: str, vcpus: int, cell: int, memory_mib: int, numa: NumaPolicy = ORDINARY
) -> HostState:
    """Raises `host.no_capacity`."""
    plan = plan_pins(state.pool, PinRequest(vcpus, (cell,), f"vm {name}", numa))
    seat = RetuneSeat(cell=cell, pins=plan.pins, emulator_cpus=plan.emulator_cpus)
    vm_id = UUID(int=len(state.tenants) + 1)
    tenant = Tenant(vm_id, name, vcpus, memory_mib, numa, seat, frozenset(plan.cpus))
    memory = {number: dict(by_page) for number, by_page in state.memory_free_mib.items()}
    memory[cell][numa.huge_page_kib] = memory[cell].get(numa.huge_page_kib, 0) - memory_mib
    return HostState(state.pool.take(plan.cpus), memory, (*state.tenants, tenant))


def carried_out(state: HostState, plan: RetunePlan) -> HostState:
    """The host after the moves, each looked at as it is made."""
    seats = {tenant.vm_id: tenant for tenant in state.tenants}
    memory = {cell: dict(by_page) for cell, by_page in state.memory_free_mib.items()}
    cell_of_cpu = state.pool.topology.cell_of_cpu
    core_of_cpu = {cpu: core for core in state.pool.topology.cores for cpu in core.cpus}
    others = state.pool.taken - frozenset().union(*(tenant.cpus for tenant in state.tenants))
    for move in plan.moves:
        tenant = seats[move.vm_id]
        assert move.before == tenant.seat
        wanted = {pin.pcpu for pin in move.after.pins}
        assert len(wanted) == len(move.after.pins) == tenant.vcpus
        assert {cell_of_cpu[cpu] for cpu in wanted} == {move.after.cell}
        cores = {cpu for pcpu in wanted for cpu in core_of_cpu[pcpu].cpus}
        taken = others.union(*(other.cpus for other in seats.values()))
        assert taken.isdisjoint(cores)
        page = tenant.numa.huge_page_kib
        memory[move.before.cell][page] += tenant.memory_mib
        memory[move.after.cell][page] = memory[move.after.cell].get(page, 0) - tenant.memory_mib
        assert memory[move.after.cell][page] >= 0
        seats[move.vm_id] = replace(tenant, seat=move.after, cpus=frozenset(cores))
    taken = others.union(*(tenant.cpus for tenant in seats.values()))
    return HostState(replace(state.pool, taken=taken), memory, tuple(seats.values()))


@st.composite
def busy_hosts(draw: st.DrawFn) -> HostState:
    sockets, cells, threads = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    cores, memory_mib = draw(st.integers(3, 6)), draw(st.sampled_from([100, 1000]))
    state = empty_host(
        f"sockets={sockets},cells={cells},cores={cores},threads={threads},memory_mib={memory_mib}",
        draw(st.integers(0, 1)),
    )
    policies = st.sampled_from([ORDINARY, NumaPolicy.model_validate({"smt": "isolate"})])
    # In turn over the cells: a host whose VMs are all in one place needs no retune.
    for number in range(draw(st.integers(sockets * cells, 2 * sockets * cells))):
        vcpus, cell = draw(st.sampled_from([2, 2, 4])), number % (sockets * cells)
        taken_mib = draw(st.integers(1, 60))
        numa = draw(policies)
        if state.memory_free_mib[cell][0] >= taken_mib:
            try:
                state = with_vm(state, f"vm{number}", vcpus, cell, taken_mib, numa)
            except PpecError:
                continue
    # Some hand-made domain that nobody moves.
    return replace(state, pool=state.pool.take(draw(st.sets(st.integers(0, cores - 1), max_size=1))))


WANTS = st.one_of(
    st.just(RetuneWant()),
    st.builds(RetuneWant, vcpus=st.sampled_from([2, 4, 8]), memory_mib=st.sampled_from([None, 64, 90, 150])),
)


def planned(state: HostState, want: RetuneWant, bounds: RetuneBounds) -> RetunePlan | PpecError:
    try:
        return plan_retune(state, want, bounds)
    except PpecError as refusal:
        return refusal


@given(state=busy_hosts(), want=WANTS, moves=st.integers(0, 4), mib=st.integers(0, 120))
def test_a_plan_can_be_carried_out_as_it_stands_and_opens_what_it_says(
    state: HostState, want: RetuneWant, moves: int, mib: int
) -> None:
    assume(state.pool.largest_socket() >= 2)
    bounds = RetuneBounds(moves=moves, memory_mib=mib)
    plan = planned(state, want, bounds)
    if isinstance(plan, PpecError):
        assert plan.code in ("retune.not_possible", "vm.exceeds_socket")
        if "moves" in plan.details:
            assert plan.details["moves"] > moves or plan.details["moved_mib"] > mib
        return
    assert len(plan.moves) <= moves
    assert plan.moved_mib <= mib
    after = carried_out(state, plan)
    rooms = {room.cell: room for room in plan.after}
    assert {cell.cell: len(after.pool.free_of(cell)) for cell in after.pool.topology.cells} == {
        cell: room.cores for cell, room in rooms.items()
    }
    assert {cell: max(0, by_page[0]) for cell, by_page in after.memory_free_mib.items()} == {
        cell: room.memory_mib for cell, room in rooms.items()
    }
    if want.vcpus is None:
        (opened,) = plan.opened
        assert rooms[opened].cores == len(after.pool.usable_of(after.pool.topology.by_cell[opened])) > 0
    else:
        assert set(plan_pins(after.pool, PinRequest(want.vcpus, plan.opened)).cells) <= set(plan.opened)
        assert sum(rooms[cell].memory_mib for cell in plan.opened) >= (want.memory_mib or 0)


@given(state=busy_hosts(), want=WANTS)
def test_equal_hosts_get_equal_plans(state: HostState, want: RetuneWant) -> None:
    turned = replace(state, tenants=tuple(reversed(state.tenants)))
    first, second = planned(state, want, RetuneBounds()), planned(turned, want, RetuneBounds())
    if isinstance(first, PpecError):
        assert isinstance(second, PpecError)
        assert second.problem() == first.problem()
    else:
        assert second == first


def two_cells(*vms: tuple[str, int, int, int]) -> HostState:
    """Two sockets of one cell each, four cores of two threads, 1000 MiB; the VMs as (name, vCPUs, cell, MiB)."""
    state = empty_host("sockets=2,cores=4,threads=2,memory_mib=1000")
    for name, vcpus, cell, memory_mib in vms:
        state = with_vm(state, name, vcpus, cell, memory_mib)
    return state


def _names(plan: RetunePlan) -> Sequence[tuple[str, int, int]]:
    return [(move.name, move.before.cell, move.after.cell) for move in plan.moves]


def test_the_issue_in_small_one_vm_leaves_and_the_cell_is_whole() -> None:
    state = two_cells(("a", 4, 0, 200), ("b", 2, 1, 300))
    plan = plan_retune(state, RetuneWant(vcpus=8, memory_mib=600), RetuneBounds())
    assert _names(plan) == [("a", 0, 1)]
    assert plan.opened == (0,)
    assert plan.moved_mib == 200
    assert [(room.cores, room.memory_mib) for room in plan.before] == [(2, 800), (3, 700)]
    assert [(room.cores, room.memory_mib) for room in plan.after] == [(4, 1000), (1, 500)]


def test_what_fits_already_needs_no_move() -> None:
    plan = plan_retune(two_cells(("a", 4, 0, 200)), RetuneWant(), RetuneBounds(moves=0, memory_mib=0))
    assert plan.moves == ()
    assert plan.opened == (1,)
    assert plan.before == plan.after


def test_only_the_cells_asked_for_are_opened() -> None:
    plan = plan_retune(two_cells(("a", 4, 0, 200)), RetuneWant(cells=(0,)), RetuneBounds())
    assert plan.opened == (0,)
    assert _names(plan) == [("a", 0, 1)]


def test_a_refusal_tells_what_it_would_take() -> None:
    state = two_cells(("a", 2, 0, 200), ("b", 2, 0, 300), ("c", 2, 1, 900))
    with pytest.raises(PpecError) as caught:
        plan_retune(state, RetuneWant(vcpus=8), RetuneBounds(moves=1, memory_mib=10))
    # The memory of c fits nowhere else; a and b don't fit beside it.
    assert caught.value.code == "retune.not_possible"
    assert "moves" not in caught.value.details
    roomy = two_cells(("a", 2, 0, 200), ("b", 2, 0, 300), ("c", 2, 1, 400))
    with pytest.raises(PpecError) as caught:
        plan_retune(roomy, RetuneWant(vcpus=8, cells=(1,)), RetuneBounds(moves=1, memory_mib=10))
    assert caught.value.details == {"vcpus": 8, "memory_mib": None, "moves": 1, "moved_mib": 400}


def test_a_domain_made_by_hand_stays_where_it_is() -> None:
    state = two_cells(("a", 2, 1, 100))
    pinned = replace(state, pool=state.pool.take((0, 8)))
    assert plan_retune(pinned, RetuneWant(), RetuneBounds()).opened == (1,)


@pytest.mark.parametrize(
    ("want", "code"),
    [
        ({"vcpus": 10}, "vm.exceeds_socket"),
        ({"vcpus": 2, "memory_mib": 1001}, "vm.exceeds_socket"),
        ({"vcpus": 8, "numa": {"smt": "isolate"}}, "vm.exceeds_socket"),
        ({"vcpus": 2, "numa": {"multi_cell": True}}, "request.invalid"),
        ({"vcpus": 2, "numa": {"cpus": "shared"}}, "request.invalid"),
        ({"cells": (7,)}, "request.invalid"),
    ],
    ids=str,
)
def test_what_no_retune_can_help_is_refused(want: dict[str, object], code: str) -> None:
    with pytest.raises(PpecError) as caught:
        plan_retune(two_cells(), RetuneWant.model_validate(want), RetuneBounds())
    assert caught.value.code == code


def test_a_vm_larger_than_a_cell_gets_cells_of_one_socket() -> None:
    state = empty_host("sockets=2,cells=2,cores=4,memory_mib=1000")
    for name, cell in (("a", 0), ("b", 2)):
        state = with_vm(state, name, 2, cell, 100)
    plan = plan_retune(state, RetuneWant(vcpus=8), RetuneBounds())
    assert plan.opened == (0, 1)
    assert len(plan.moves) == 1
    assert plan_pins(carried_out(state, plan).pool, PinRequest(8, plan.opened)).cells == (0, 1)


def test_siblings_required_are_looked_for_where_there_are_any() -> None:
    flat = empty_host("sockets=2,cores=4,memory_mib=1000")
    with pytest.raises(PpecError) as caught:
        plan_retune(flat, RetuneWant.model_validate({"vcpus": 2, "numa": {"smt": "require"}}), RetuneBounds())
    assert caught.value.code == "vm.exceeds_socket"
