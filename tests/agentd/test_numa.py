# SPDX-License-Identifier: Apache-2.0
"""Pins: the rules as properties over any host, and the choices as tables."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppec_agentd.numa import CpuPool, NumaPlan, PinRequest, plan_largest_first, plan_pins
from ppec_agentd.topology import Cell, Core, Topology, declare_topology
from ppec_contract.errors import PpecError


def pool(declaration: str, reserved: int = 0, taken: set[int] | None = None) -> CpuPool:
    return CpuPool(declare_topology(declaration), reserved, frozenset(taken or ()))


def pcpus(plan: NumaPlan) -> list[int]:
    return [pin.pcpu for pin in plan.pins]


def refusal(cpus: CpuPool, vcpus: int, *cells: int) -> PpecError:
    with pytest.raises(PpecError) as caught:
        plan_pins(cpus, PinRequest(vcpus, cells, "vm web-1"))
    return caught.value


@st.composite
def hosts(draw: st.DrawFn) -> CpuPool:
    shape = {
        "sockets": draw(st.integers(1, 4)),
        "cells": draw(st.integers(1, 3)),
        "cores": draw(st.integers(1, 10)),
        "threads": draw(st.sampled_from([1, 1, 2, 2, 4, 8])),
    }
    topology = declare_topology(",".join(f"{key}={value}" for key, value in shape.items()))
    taken = draw(st.sets(st.sampled_from([cpu for core in topology.cores for cpu in core.cpus])))
    return CpuPool(topology, draw(st.integers(0, 2))).take(taken)


@st.composite
def requests_on(draw: st.DrawFn, cpus: CpuPool) -> PinRequest:
    socket = draw(st.sampled_from(cpus.topology.sockets))
    cells = [cell.cell for cell in cpus.topology.cells if cell.socket == socket]
    chosen = draw(st.lists(st.sampled_from(cells), min_size=1, unique=True))
    return PinRequest(2 * draw(st.integers(1, 12)), tuple(chosen))


@given(st.data())
def test_grants_are_disjoint_whole_unreserved_and_on_one_socket(data: st.DataObject) -> None:
    before = data.draw(hosts())
    wanted = data.draw(st.lists(requests_on(before), max_size=8))
    reserved = {cpu for cell in before.topology.cells for core in before.reserved_of(cell) for cpu in core.cpus}
    seen = set(before.taken)
    for request, answer in zip(wanted, plan_largest_first(before, wanted), strict=True):
        if isinstance(answer, PpecError):
            assert answer.code in {"host.no_capacity", "vm.exceeds_socket"}
            continue
        assert [pin.vcpu for pin in answer.pins] == list(range(request.vcpus))
        assert len(set(pcpus(answer))) == request.vcpus
        assert set(pcpus(answer)) <= set(answer.cpus)
        assert seen.isdisjoint(answer.cpus)
        assert reserved.isdisjoint(answer.cpus)
        cores = [core for core in before.topology.cores if set(core.cpus) & set(answer.cpus)]
        assert {cpu for core in cores for cpu in core.cpus} == set(answer.cpus)
        assert all(set(core.cpus) & set(pcpus(answer)) for core in cores), "a core was taken and not used"
        assert len({core.socket for core in cores}) == 1
        assert {before.topology.cell_of_cpu[cpu] for cpu in answer.cpus} <= set(request.cells)
        assert answer.cells == tuple(sorted(request.cells))
        seen |= set(answer.cpus)


@given(st.data())
def test_a_refusal_is_true(data: st.DataObject) -> None:
    cpus = data.draw(hosts())
    request = data.draw(requests_on(cpus))
    free = sum(
        len(core.cpus) for cell in cpus.topology.cells if cell.cell in request.cells for core in cpus.free_of(cell)
    )
    (answer,) = plan_largest_first(cpus, [request])
    assert isinstance(answer, PpecError) == (free < request.vcpus)
    if isinstance(answer, PpecError) and answer.code == "host.no_capacity":
        assert (answer.details["wanted"], answer.details["free"]) == (request.vcpus, free)


def test_siblings_become_neighbouring_vcpus() -> None:
    plan = plan_pins(pool("sockets=2,cores=4,threads=2", reserved=1), PinRequest(4, (1,)))
    assert pcpus(plan) == [5, 13, 6, 14]
    assert plan.emulator_cpus == (4, 12)
    assert plan.threads_per_core == 2


def test_a_part_used_core_is_taken_whole() -> None:
    plan = plan_pins(pool("cores=2,threads=8"), PinRequest(4, (0,)))
    assert len(plan.pins) == 4
    assert len(plan.cpus) == 8
    assert plan.threads_per_core == 4, "the four are siblings, and the guest is told so"


def test_the_shortest_run_that_fits_is_taken() -> None:
    """Free runs: 0-5, 7-8, 10-15. Two vCPUs take the hole of two, and both long runs survive."""
    assert pcpus(plan_pins(pool("cores=16", taken={6, 9}), PinRequest(2, (0,)))) == [7, 8]


def test_the_longest_run_survives_when_none_fits() -> None:
    """Free runs of 2, 3 and 5 cores; six are wanted: the short ones go whole, four of the five stay together."""
    assert pcpus(plan_pins(pool("cores=12", taken={2, 6}), PinRequest(6, (0,)))) == [0, 1, 3, 4, 5, 7]


def test_the_tightest_cell_of_several_is_taken() -> None:
    busy = pool("cells=2,cores=8", taken={8, 9, 10, 11})
    assert pcpus(plan_pins(busy, PinRequest(4, (0, 1)))) == [12, 13, 14, 15]


def test_a_vm_spans_cells_only_if_no_single_one_fits() -> None:
    plan = plan_pins(pool("cells=2,cores=4"), PinRequest(6, (0, 1)))
    assert pcpus(plan) == [0, 1, 2, 3, 4, 5]
    assert plan.cells == (0, 1)


def test_one_cell_over_two_sockets_is_not_crossed() -> None:
    cores = tuple(Core((n,), socket=n // 4) for n in range(8))
    cpus = CpuPool(Topology((Cell(0, 0, 1024, cores),)), 0, frozenset({0}))
    assert pcpus(plan_pins(cpus, PinRequest(4, (0,)))) == [4, 5, 6, 7]
    assert refusal(cpus.take([4]), 4, 0).details["free"] == 3


def test_a_pin_read_back_takes_its_sibling_too() -> None:
    assert pool("cores=4,threads=2").take([1]).taken == {1, 5}


def test_largest_first_and_answers_in_the_order_asked() -> None:
    small, large, too_many = plan_largest_first(
        pool("cores=6"), [PinRequest(2, (0,)), PinRequest(4, (0,)), PinRequest(2, (0,), "vm late")]
    )
    assert isinstance(large, NumaPlan)
    assert pcpus(large) == [0, 1, 2, 3]
    assert isinstance(small, NumaPlan)
    assert pcpus(small) == [4, 5]
    assert isinstance(too_many, PpecError)
    assert too_many.subject == "vm late"


@pytest.mark.parametrize(
    ("vcpus", "cells", "code", "figures"),
    [
        (3, (0,), "vm.odd_vcpus", {"wanted": 3}),
        (0, (0,), "vm.odd_vcpus", {"wanted": 0}),
        (8, (0,), "vm.exceeds_socket", {"wanted": 8, "largest_socket": 6}),
        (6, (0,), "host.no_capacity", {"wanted": 6, "free": 4, "cells": [0]}),
        (2, (0, 7), "host.no_capacity", {"wanted": [0, 7], "found": [0, 1]}),
        (2, (), "host.no_capacity", {"wanted": []}),
        (2, (0, 1), "request.invalid", {"sockets": [0, 1]}),
    ],
)
def test_refusals_name_wanted_and_free(
    vcpus: int, cells: tuple[int, ...], code: str, figures: dict[str, object]
) -> None:
    error = refusal(pool("sockets=2,cores=4,threads=2", reserved=1, taken={1, 9}), vcpus, *cells)
    assert error.code == code
    assert error.subject == "vm web-1"
    assert figures.items() <= error.details.items()
