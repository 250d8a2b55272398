# SPDX-License-Identifier: Apache-2.0
"""What a flavor's policy makes the planner count, and under which reason it turns a host away."""

from __future__ import annotations

from uuid import UUID

import pytest

from ppec_contract.vm import CpuPolicy, NumaPolicy, SmtPolicy
from ppec_orchestrator.placement.fleet import CellState, Fleet, HostState
from ppec_orchestrator.placement.plan import Placement
from ppec_orchestrator.placement.planner import plan
from ppec_orchestrator.placement.reasons import Reason
from ppec_orchestrator.placement.request import PlanRequest, Shape

SHARED = NumaPolicy(cpus=CpuPolicy.SHARED)
ISOLATE = NumaPolicy(smt=SmtPolicy.ISOLATE)
REQUIRE = NumaPolicy(smt=SmtPolicy.REQUIRE)
ACROSS = NumaPolicy(multi_cell=True)
SMALL_PAGES = NumaPolicy(huge_page_kib=2048)
LARGE_PAGES = NumaPolicy(huge_page_kib=1024 * 1024)


def cell(number: int, cores: int = 8, memory_mib: int = 8192, **more: int) -> CellState:
    """All of it free unless `more` says otherwise; two threads to a core; one socket to a cell."""
    whole = {"threads_per_core": 2, "socket": number, "cores": cores, "memory_mib": memory_mib} | more
    counted = {"cores": "cores_free", "memory_mib": "memory_free_mib", "shared_vcpus": "shared_vcpus_free"}
    counted |= {"pages_2m": "pages_2m_free", "pages_1g": "pages_1g_free"}
    free = {name: whole[each] for each, name in counted.items() if each in whole}
    return CellState(cell=number, **(free | whole))  # type: ignore[arg-type]


def placed(shape: Shape, *cells: CellState, count: int = 1, **more: frozenset[str]) -> list[Placement]:
    return list(plan(_fleet(cells), _request(shape, count, **more)).placed)


def why_not(shape: Shape, *cells: CellState, **more: frozenset[str]) -> Reason:
    result = plan(_fleet(cells), _request(shape, 1, **more))
    (reason,) = result.refused[0].reasons
    return reason


def _fleet(cells: tuple[CellState, ...], capabilities: frozenset[str] = frozenset()) -> Fleet:
    host = HostState(1, "h1", "d1", "c1", "r1", "v1", "x86_64", cells, 10**6, 10**6, prefixes=((1,),))
    return Fleet.build([host])


def _request(shape: Shape, count: int, **more: frozenset[str]) -> PlanRequest:
    names = [(UUID(int=n + 1), f"v{n}") for n in range(count)]
    return PlanRequest.alike(names, shape, "x86_64", **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("numa", "wanted"),
    [
        (NumaPolicy(), (2, 0, 2048, 0, 0)),
        (ISOLATE, (4, 0, 2048, 0, 0)),
        (REQUIRE, (2, 0, 2048, 0, 0)),
        (SHARED, (0, 4, 2048, 0, 0)),
        (SMALL_PAGES, (2, 0, 0, 1024, 0)),
        (LARGE_PAGES, (2, 0, 0, 0, 2)),
        (NumaPolicy(cpus=CpuPolicy.SHARED, huge_page_kib=2048), (0, 4, 0, 1024, 0)),
    ],
)
def test_a_vm_takes_what_its_policy_says(numa: NumaPolicy, wanted: tuple[int, ...]) -> None:
    (place,) = placed(Shape(4, 2048, 1, numa), cell(0, shared_cpus=4, shared_vcpus=8, pages_2m=4096, pages_1g=4))
    assert (
        tuple(place.per_cell[each] for each in ("cores", "shared_vcpus", "memory_mib", "pages_2m", "pages_1g"))
        == wanted
    )


def test_a_cell_is_filled_to_the_last_of_what_the_policy_counts() -> None:
    shareable = cell(0, cores=0, shared_cpus=4, shared_vcpus=10)
    assert len(placed(Shape(4, 64, 1, SHARED), shareable, count=4)) == 2
    assert len(placed(Shape(2, 512, 1, SMALL_PAGES), cell(0, pages_2m=700), count=4)) == 2
    assert len(placed(Shape(4, 64, 1, ISOLATE), cell(0, cores=11), count=4)) == 2


def test_siblings_are_required_of_the_cell_not_of_the_host() -> None:
    plain, wide = cell(0, cores=16, threads_per_core=1), cell(1, cores=2)
    (place,) = placed(Shape(4, 64, 1, REQUIRE), plain, wide)
    assert place.cells == (1,)
    assert why_not(Shape(6, 64, 1, REQUIRE), plain, wide) is Reason.VM_LARGER_THAN_CELL


@pytest.mark.parametrize(
    ("numa", "cells", "reason"),
    [
        (REQUIRE, [cell(0, threads_per_core=1)], Reason.NO_SIBLINGS),
        (SHARED, [cell(0)], Reason.NO_SHARED_CPUS),
        (NumaPolicy(), [cell(0, cores=0, shared_cpus=2, shared_vcpus=8)], Reason.NO_DEDICATED_CPUS),
        (NumaPolicy(), [cell(0, cores=0, shared_cpus=2, shared_vcpus=8), cell(1, cores=1)], Reason.VM_LARGER_THAN_CELL),
        # More vCPUs than CPUs to share: they would wait for one another.
        (SHARED, [cell(0, shared_cpus=2, shared_vcpus=8)], Reason.VM_LARGER_THAN_CELL),
        (SHARED, [cell(0, shared_cpus=4, shared_vcpus=16, shared_vcpus_free=3)], Reason.SHARED_VCPUS),
        (SMALL_PAGES, [cell(0, pages_1g=4)], Reason.NO_HUGE_PAGES),
        (SMALL_PAGES, [cell(0, pages_2m=1000)], Reason.VM_LARGER_THAN_CELL),
        (SMALL_PAGES, [cell(0, pages_2m=4000, pages_2m_free=1000)], Reason.HUGE_PAGES),
        (LARGE_PAGES, [cell(0, pages_1g=2, cores_free=1)], Reason.CORES),
        (ISOLATE, [cell(0, cores=3)], Reason.VM_LARGER_THAN_CELL),
        (ISOLATE, [cell(0, cores_free=3)], Reason.CORES),
        (ACROSS, [cell(0, cores=0), cell(1, cores=1)], Reason.VM_LARGER_THAN_HOST),
        (ACROSS, [cell(0, cores_free=1), cell(1, memory_free_mib=1000)], Reason.NUMA_PARTS),
        (NumaPolicy(), [cell(0, cores_free=1), cell(1, memory_free_mib=1000)], Reason.NUMA_FIT),
    ],
)
def test_a_host_is_turned_away_for_what_it_lacks(numa: NumaPolicy, cells: list[CellState], reason: Reason) -> None:
    assert why_not(Shape(4, 2048, 1, numa), *cells) is reason


def test_a_host_whose_agent_does_not_know_what_is_asked_is_left_out() -> None:
    known, asked = frozenset({"a", "b"}), {"capabilities": frozenset({"a"})}
    shape, host = Shape(4, 64, 1), _fleet((cell(0),)).hosts[0]
    assert why_not(shape, cell(0), **asked) is Reason.AGENT_TOO_OLD
    newer = HostState(**{each: getattr(host, each) for each in host.__slots__} | {"capabilities": known})
    assert len(plan(Fleet.build([newer]), _request(shape, 1, **asked)).placed) == 1


def test_a_vm_spans_the_fewest_cells_in_equal_parts() -> None:
    cells = [cell(number, cores=4) for number in range(4)]
    (place,) = placed(Shape(10, 1025, 1, ACROSS), *cells)
    # Five cores on two cells: whoever gets the odd one, there is room for it, and for the odd MiB.
    assert (place.cells, place.cores, place.memory_mib) == ((0, 1), 3, 513)
    (place,) = placed(Shape(8, 1024, 1, ACROSS), *cells)
    assert (place.cells, place.cores, place.memory_mib) == ((0,), 4, 1024)
    (place,) = placed(Shape(26, 4096, 1, ACROSS), *cells)
    assert (place.cells, place.cores, place.memory_mib) == ((0, 1, 2, 3), 4, 1024)


def test_parts_are_of_cores_of_one_width_and_no_part_is_empty() -> None:
    mixed = [cell(0, cores=4), cell(1, cores=8, threads_per_core=1)]
    assert why_not(Shape(10, 64, 1, ACROSS), *mixed) is Reason.VM_LARGER_THAN_HOST
    # Two vCPUs are one core: the host would leave the second cell out, and its memory with it.
    assert why_not(Shape(2, 12_288, 1, ACROSS), cell(0), cell(1)) is Reason.VM_LARGER_THAN_HOST
    (place,) = placed(Shape(4, 12_288, 1, ACROSS), cell(0), cell(1))
    assert (place.cells, place.cores, place.memory_mib) == ((0, 1), 1, 6144)
    pages = NumaPolicy(multi_cell=True, huge_page_kib=1024 * 1024)
    lone = [cell(number, cores=1, pages_1g=1) for number in (0, 1)]
    assert why_not(Shape(4, 1024, 1, pages), *lone) is Reason.VM_LARGER_THAN_HOST


def test_cells_of_one_socket_come_first() -> None:
    cells = [cell(number, cores=4, socket=number // 2, cores_free=3 + (number > 0)) for number in range(4)]
    (place,) = placed(Shape(14, 64, 1, ACROSS), *cells)
    assert place.cells == (2, 3), "the tightest alone would be 1 and 2, of two sockets"
    cells[3] = cell(3, cores=4, socket=1, cores_free=0)
    (place,) = placed(Shape(14, 64, 1, ACROSS), *cells)
    assert place.cells == (1, 2)


def test_batch_of_vms_across_cells_never_takes_a_cell_twice_over() -> None:
    cells = [cell(number, cores=4, memory_mib=1000) for number in range(3)]
    places = placed(Shape(10, 800, 1, ACROSS), *cells, count=5)
    assert sum(len(place.cells) for place in places) == 2
    assert all(place.cores * 1 <= 4 and place.memory_mib == 400 for place in places)
