# SPDX-License-Identifier: Apache-2.0
"""Each policy's promise, on hosts of many shapes: SMT, sharing, several cells, growth."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppec_agentd.numa import CpuPool, NumaPlan, PinRequest, plan_pins, replan
from ppec_agentd.topology import Cell, Core, Topology, declare_topology, parse_capabilities
from ppec_contract.errors import PpecError
from ppec_contract.vm import CpuPolicy, NumaPolicy, SmtPolicy

FOLDER = Path(__file__).parent / "fixtures" / "capabilities"
SHAPES = {path.stem: parse_capabilities(path.read_text()) for path in sorted(FOLDER.glob("*.xml"))}
ISOLATE, REQUIRE = NumaPolicy(smt=SmtPolicy.ISOLATE), NumaPolicy(smt=SmtPolicy.REQUIRE)
SHARED, ACROSS = NumaPolicy(cpus=CpuPolicy.SHARED), NumaPolicy(multi_cell=True)


def pool(declaration: str, reserved: int = 0, shared: int = 0) -> CpuPool:
    return CpuPool(declare_topology(declaration), reserved, shared_cores=shared)


def mixed() -> CpuPool:
    """Cores 0 and 1 without a sibling, 2 and 3 with one."""
    cores = (Core((0,), 0), Core((1,), 0), Core((2, 4), 0), Core((3, 5), 0))
    return CpuPool(Topology((Cell(0, 0, 1024, cores),)), 0)


def pcpus(plan: NumaPlan) -> list[int]:
    return [pin.pcpu for pin in plan.pins]


def refusal(cpus: CpuPool, request: PinRequest) -> PpecError:
    with pytest.raises(PpecError) as caught:
        plan_pins(cpus, request)
    return caught.value


policies = st.sampled_from([NumaPolicy(), ISOLATE, REQUIRE, ACROSS, NumaPolicy(multi_cell=True, smt=SmtPolicy.ISOLATE)])


@st.composite
def hosts(draw: st.DrawFn) -> CpuPool:
    topology = SHAPES[draw(st.sampled_from(sorted(SHAPES)))]
    empty = CpuPool(topology, draw(st.integers(0, 2)), shared_cores=draw(st.integers(0, 2)))
    usable = [core for cell in topology.cells for core in empty.usable_of(cell)]
    one = st.sampled_from(usable) if usable else st.nothing()
    taken = draw(st.lists(one, max_size=len(usable) // 2, unique_by=lambda core: core.cpus))
    return empty.take(cpu for core in taken for cpu in core.cpus)


@st.composite
def requests_on(draw: st.DrawFn, cpus: CpuPool) -> PinRequest:
    policy = draw(policies)
    socket = draw(st.sampled_from(cpus.topology.sockets))
    cells = [cell.cell for cell in cpus.topology.cells if policy.multi_cell or cell.socket == socket]
    chosen = draw(st.lists(st.sampled_from(cells or [0]), min_size=1, unique=True))
    vcpus = 2 * draw(st.integers(1, 12))
    return PinRequest(vcpus, tuple(chosen), "vm web-1", policy, draw(st.sampled_from([0, vcpus + 2, vcpus + 8])))


def check_rules(cpus: CpuPool, request: PinRequest, plan: NumaPlan) -> None:
    topology, on = cpus.topology, pcpus(plan)
    cores = [topology.core_of_cpu[cpu] for cpu in on]
    kept = {
        cpu for cell in topology.cells for core in (*cpus.reserved_of(cell), *cpus.shared_of(cell)) for cpu in core.cpus
    }
    assert [pin.vcpu for pin in plan.pins] == list(range(request.vcpus))
    assert len(set(on)) == request.vcpus
    assert set(plan.cpus) == {cpu for core in cores for cpu in core.cpus}
    assert kept.isdisjoint(plan.cpus)
    assert {topology.cell_of_cpu[cpu] for cpu in on} <= set(plan.cells) <= set(request.cells)
    assert request.policy.multi_cell or len({core.socket for core in cores}) == 1
    assert kept >= set(plan.emulator_cpus)
    if request.smt is SmtPolicy.ISOLATE:
        assert len({core.cpus for core in cores}) == request.vcpus, "one vCPU to a core"
        assert plan.threads_per_core == 1
    if request.smt is SmtPolicy.REQUIRE:
        assert all(len(core.cpus) > 1 for core in cores)
    check_shown(request, plan, cores)


def check_shown(request: PinRequest, plan: NumaPlan, cores: list[Core]) -> None:
    """What the guest takes for siblings are siblings, and its cells are where its vCPUs are."""
    threads = plan.threads_per_core
    assert request.vcpus % threads == 0
    assert request.most_vcpus % threads == 0
    for first in range(0, request.vcpus, threads):
        assert len({core.cpus for core in cores[first : first + threads]}) == 1
    if not request.policy.multi_cell:
        assert plan.guest_cells == ()
        return
    assert [cell.cell for cell in plan.guest_cells] == sorted(plan.cells)
    members = [vcpu for cell in plan.guest_cells for vcpu in cell.vcpus]
    assert sorted(members) == list(range(request.most_vcpus)), "every vCPU it may ever have is in one cell"
    for index, cell in enumerate(plan.guest_cells):
        assert cell.distances[index] == 10
        assert all(value > 10 for position, value in enumerate(cell.distances) if position != index)
        for first in cell.vcpus[:: threads or 1]:
            assert set(range(first // threads * threads, first // threads * threads + threads)) <= set(cell.vcpus)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_a_grant_keeps_its_policy(data: st.DataObject) -> None:
    cpus = data.draw(hosts())
    request = data.draw(requests_on(cpus))
    try:
        plan = plan_pins(cpus, request)
    except PpecError as error:
        assert error.code in {"host.no_capacity", "vm.exceeds_socket"}  # noqa: PT017
        assert error.details["resource"] == "vcpus"  # noqa: PT017
        assert error.details.get("free", 0) < request.vcpus  # type: ignore[operator]  # noqa: PT017
        return
    check_rules(cpus, request, plan)
    assert cpus.taken.isdisjoint(plan.cpus)


def test_no_core_that_is_shown_reaches_over_two_cells_of_the_guest() -> None:
    """Its cells are made for what it started with: two threads to a core. Shrunk to six vCPUs it has a core of eight to
    itself, of which it could be shown six."""
    cells = tuple(
        Cell(number, number, 131072, tuple(Core(tuple(range(first, first + 8)), number) for first in firsts))
        for number, firsts in enumerate((range(0, 48, 8), range(48, 96, 8)))
    )
    empty = CpuPool(Topology(cells), 0)
    plan = plan_pins(empty, PinRequest(16, (0, 1), policy=ACROSS, max_vcpus=18))
    request = PinRequest(6, plan.cells, policy=ACROSS, max_vcpus=18)
    shrunk = replan(empty.take(plan.cpus), plan, request)
    assert (plan.threads_per_core, shrunk.threads_per_core) == (2, 2)
    check_rules(empty, request, shrunk)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_growing_and_shrinking_keep_the_pins_that_stay(data: st.DataObject) -> None:
    cpus = data.draw(hosts())
    request = data.draw(requests_on(cpus))
    try:
        plan = plan_pins(cpus, request)
    except PpecError:
        return
    held = cpus.take(plan.cpus)
    for vcpus in data.draw(st.lists(st.integers(1, 14).map(lambda half: 2 * half), min_size=1, max_size=4)):
        changed = PinRequest(vcpus, plan.cells, request.subject, request.policy, request.max_vcpus)
        try:
            after = replan(held, plan, changed)
        except PpecError as error:
            assert error.code in {"host.no_capacity", "vm.exceeds_socket"}  # noqa: PT017
            continue
        stay = min(len(plan.pins), vcpus)
        assert after.pins[:stay] == plan.pins[:stay]
        check_rules(cpus, changed, after)
        assert cpus.taken.isdisjoint(after.cpus)
        for before, now in zip(plan.guest_cells, after.guest_cells, strict=True):
            assert before.cell == now.cell
            most = min(changed.most_vcpus, sum(len(cell.vcpus) for cell in plan.guest_cells))
            assert [v for v in before.vcpus if v < most] == [v for v in now.vcpus if v < most]
        held, plan = cpus.take(after.cpus), after


# --- SMT ----------------------------------------------------------------------------------------------------------


def test_isolate_leaves_siblings_idle_and_its_own() -> None:
    plan = plan_pins(pool("cores=4,threads=2"), PinRequest(4, (0,), policy=ISOLATE))
    assert pcpus(plan) == [0, 1, 2, 3]
    assert plan.cpus == tuple(range(8))


def test_isolate_is_no_larger_than_a_sockets_cores() -> None:
    error = refusal(pool("cores=4,threads=2"), PinRequest(6, (0,), policy=ISOLATE))
    assert (error.code, error.details["largest_socket"]) == ("vm.exceeds_socket", 4)


def test_require_takes_only_cores_with_siblings() -> None:
    assert sorted(pcpus(plan_pins(mixed(), PinRequest(4, (0,), policy=REQUIRE)))) == [2, 3, 4, 5]
    error = refusal(mixed().take([2]), PinRequest(4, (0,), policy=REQUIRE))
    assert (error.details["resource"], error.details["wanted"], error.details["free"]) == ("vcpus", 4, 2)


def test_require_on_a_host_without_smt_is_refused_for_good() -> None:
    error = refusal(pool("cores=8"), PinRequest(2, (0,), policy=REQUIRE))
    assert (error.code, error.details["largest_socket"]) == ("vm.exceeds_socket", 0)


def test_prefer_takes_cores_without_siblings_as_well() -> None:
    plan = plan_pins(mixed(), PinRequest(6, (0,)))
    assert len(plan.cpus) == 6
    assert plan.threads_per_core == 1, "not every core has a sibling, so the guest is shown none"


def test_the_guests_siblings_also_fit_what_it_may_grow_to() -> None:
    plan = plan_pins(pool("cores=2,threads=8"), PinRequest(8, (0,), max_vcpus=12))
    assert plan.threads_per_core == 4


# --- sharing ------------------------------------------------------------------------------------------------------


def test_a_sharing_vm_floats_over_the_shared_cpus_of_its_cells() -> None:
    plan = plan_pins(pool("cells=2,cores=4,threads=2", reserved=1, shared=2), PinRequest(4, (1,), policy=SHARED))
    assert (plan.pins, plan.cpus) == ((), ())
    assert plan.shared_cpus == (5, 6, 13, 14)
    assert plan.emulator_cpus == (4, 12)
    assert plan.cells == (1,)


def test_dedicated_cores_are_never_shared_ones() -> None:
    plan = plan_pins(pool("cores=4,threads=2", reserved=1, shared=2), PinRequest(2, (0,)))
    assert pcpus(plan) == [3, 7]


def test_sharing_is_bounded_by_its_ratio() -> None:
    cpus = pool("cores=4", shared=2)  # 2 CPUs, 4 vCPUs each
    assert plan_pins(cpus.share({0: 6}), PinRequest(2, (0,), policy=SHARED)).shared_cpus == (0, 1)
    error = refusal(cpus.share({0: 7}), PinRequest(2, (0,), policy=SHARED))
    assert (error.code, error.details["resource"]) == ("host.no_capacity", "shared_vcpus")
    assert (error.details["wanted"], error.details["free"]) == (2, 1)


def test_a_sharing_vm_never_waits_for_itself() -> None:
    error = refusal(pool("cores=4", shared=2), PinRequest(4, (0,), policy=SHARED))
    assert (error.code, error.details["largest_socket"]) == ("vm.exceeds_socket", 2)


def test_a_host_that_shares_nothing_says_so() -> None:
    error = refusal(pool("cores=4"), PinRequest(2, (0,), policy=SHARED))
    assert (error.code, error.details["resource"], error.details["free"]) == ("host.no_capacity", "shared_vcpus", 0)


# --- several cells ------------------------------------------------------------------------------------------------


def test_a_vm_over_two_sockets_needs_the_policy() -> None:
    host = pool("sockets=2,cores=4,threads=2")
    assert refusal(host, PinRequest(12, (0, 1))).code == "request.invalid"
    plan = plan_pins(host, PinRequest(12, (0, 1), policy=ACROSS))
    assert [(cell.cell, cell.vcpus, cell.distances) for cell in plan.guest_cells] == [
        (0, (0, 1, 2, 3, 4, 5), (10, 20)),
        (1, (6, 7, 8, 9, 10, 11), (20, 10)),
    ]
    assert {plan.pins[vcpu].pcpu for vcpu in plan.guest_cells[1].vcpus} == {4, 5, 6, 12, 13, 14}
    assert plan.threads_per_core == 2


def test_what_one_cell_lacks_the_other_gives() -> None:
    host = pool("sockets=2,cores=4,threads=2").take([0, 1, 2])
    plan = plan_pins(host, PinRequest(8, (0, 1), policy=ACROSS))
    assert [len(cell.vcpus) for cell in plan.guest_cells] == [2, 6]


def test_memory_only_cells_become_guest_cells_without_vcpus() -> None:
    plan = plan_pins(CpuPool(SHAPES["x86_64-cxl"], 1), PinRequest(4, (1, 2), policy=ACROSS))
    assert [(cell.cell, len(cell.vcpus)) for cell in plan.guest_cells] == [(1, 4), (2, 0)]
    assert plan.guest_cells[0].distances == (10, 24)


def test_room_to_grow_is_dealt_out_evenly_a_core_at_a_time() -> None:
    plan = plan_pins(pool("sockets=2,cores=8,threads=2"), PinRequest(4, (0, 1), policy=ACROSS, max_vcpus=8))
    assert [cell.vcpus for cell in plan.guest_cells] == [(0, 1, 4, 5), (2, 3, 6, 7)]


def test_growth_goes_where_the_guest_was_told() -> None:
    host = pool("sockets=2,cores=4,threads=2")
    plan = plan_pins(host, PinRequest(4, (0, 1), policy=ACROSS, max_vcpus=8))
    full = host.take(plan.cpus).take([4, 5, 6, 7])
    grown = replan(full, plan, PinRequest(6, (0, 1), policy=ACROSS, max_vcpus=8))
    assert {host.topology.cell_of_cpu[pin.pcpu] for pin in grown.pins[4:]} == {0}
    with pytest.raises(PpecError) as refused:
        replan(full, plan, PinRequest(8, (0, 1), policy=ACROSS, max_vcpus=8))
    assert refused.value.details == {"resource": "vcpus", "wanted": 4, "free": 2, "cells": [1]}


# --- growth -------------------------------------------------------------------------------------------------------


def test_growth_fills_its_own_idle_threads_first() -> None:
    host = pool("cores=2,threads=8")
    plan = plan_pins(host, PinRequest(4, (0,)))
    grown = replan(host.take(plan.cpus), plan, PinRequest(8, (0,)))
    assert grown.cpus == plan.cpus
    assert replan(host.take(plan.cpus), plan, PinRequest(12, (0,))).pins[:4] == plan.pins


def test_growth_within_its_own_cores_needs_nothing_free() -> None:
    host = pool("cores=1,threads=8")
    plan = plan_pins(host, PinRequest(2, (0,)))
    assert len(replan(host.take(plan.cpus), plan, PinRequest(8, (0,))).pins) == 8


def test_growth_beyond_what_is_free_says_how_much_there_is() -> None:
    host = pool("cores=4,threads=2")
    plan = plan_pins(host, PinRequest(4, (0,)))
    with pytest.raises(PpecError) as refused:
        replan(host.take(plan.cpus).take([3]), plan, PinRequest(8, (0,), "vm web-1"))
    assert (refused.value.details["wanted"], refused.value.details["free"]) == (8, 6)


def test_shrinking_gives_whole_cores_back() -> None:
    host = pool("cores=4,threads=2")
    plan = plan_pins(host, PinRequest(8, (0,)))
    assert replan(host.take(plan.cpus), plan, PinRequest(2, (0,))).cpus == (0, 4)


# --- whole cells --------------------------------------------------------------------------------------------------


def test_a_small_whole_cell_is_not_broken_while_a_larger_one_has_room() -> None:
    """Asymmetric cells: the tightest fit would be the whole cell of six cores."""
    cells = (
        Cell(0, 0, 1024, tuple(Core((n,), 0) for n in range(10))),
        Cell(1, 0, 1024, tuple(Core((n,), 0) for n in range(10, 16))),
    )
    plan = plan_pins(CpuPool(Topology(cells), 0).take([0]), PinRequest(2, (0, 1)))
    assert set(pcpus(plan)) <= set(range(10))


def test_a_vm_over_cells_of_a_socket_takes_part_used_ones_before_a_whole_one() -> None:
    busy = pool("cells=3,cores=4").take([4, 8])
    assert {cpu // 4 for cpu in pcpus(plan_pins(busy, PinRequest(6, (0, 1, 2))))} == {1, 2}
