# SPDX-License-Identifier: Apache-2.0
"""What the planner grants, the host's own ledger admits, whatever the mix of policies; what it refuses, the host would
refuse too."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from random import Random
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppec_agentd.ledger import Claim, Ledger
from ppec_agentd.topology import Cell, Core, HugePages, Topology
from ppec_contract.errors import PpecError
from ppec_contract.host import CellReport
from ppec_contract.vm import CpuPolicy, NumaPolicy, SmtPolicy
from ppec_orchestrator.placement.demand import CELL_RESOURCES
from ppec_orchestrator.placement.fleet import CellState, Fleet, HostState
from ppec_orchestrator.placement.plan import Placement
from ppec_orchestrator.placement.planner import plan
from ppec_orchestrator.placement.reasons import Reason
from ppec_orchestrator.placement.request import PlanRequest, Shape

DISK_MIB = 10**9
MEBI, GIBI = 2048, 1024 * 1024
ROOM = {
    Reason.CORES, Reason.SHARED_VCPUS, Reason.MEMORY, Reason.HUGE_PAGES, Reason.NUMA_FIT, Reason.NUMA_PARTS,
    Reason.VM_LARGER_THAN_CELL, Reason.VM_LARGER_THAN_HOST, Reason.NO_HUGE_PAGES, Reason.NO_SHARED_CPUS,
    Reason.NO_SIBLINGS, Reason.NO_DEDICATED_CPUS,
}  # fmt: skip


@st.composite
def machines(draw: st.DrawFn) -> Ledger:
    """One to four cells of their own sizes, on one to four sockets; some have no cores, some no huge pages."""
    cpus, cells = count(), []
    cells_per_socket = draw(st.integers(1, 2))
    widths = draw(st.sampled_from([(1,), (2,), (2,), (4,), (1, 2), (2, 4)]))
    for number in range(draw(st.integers(1, 4))):
        socket, threads = number // cells_per_socket, draw(st.sampled_from(widths))
        cores = tuple(Core(tuple(next(cpus) for _ in range(threads)), socket) for _ in range(draw(st.integers(0, 6))))
        small, large = draw(st.integers(0, 2000)), draw(st.integers(0, 4))
        memory_mib = 2 * small + 1024 * large + draw(st.integers(512, 8192))
        pages = (HugePages(MEBI, small), HugePages(GIBI, large)) if draw(st.booleans()) else ()
        cells.append(Cell(number, socket, memory_mib, cores, huge_pages=pages))
    return Ledger(
        Topology(tuple(cells)),
        DISK_MIB,
        reserved_cores_per_cell=draw(st.integers(0, 1)),
        reserved_memory_per_cell_mib=draw(st.sampled_from([0, 512])),
        shared_cores_per_cell=draw(st.integers(0, 3)),
        shared_vcpus_per_cpu=draw(st.integers(1, 4)),
    )


dedicated = st.builds(
    NumaPolicy,
    smt=st.sampled_from(SmtPolicy),
    multi_cell=st.sampled_from([True, True, False]),
    huge_page_kib=st.sampled_from([0, MEBI, GIBI]),
)
shared = st.builds(NumaPolicy, cpus=st.just(CpuPolicy.SHARED), huge_page_kib=st.sampled_from([0, 0, MEBI]))


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    numa = draw(dedicated | shared)
    memory_mib = draw(st.integers(64, 6000))
    if numa.huge_page_kib:
        page_mib = numa.huge_page_kib // 1024
        memory_mib = max(1, memory_mib // page_mib) * page_mib
    return Shape(2 * draw(st.integers(1, 8)), memory_mib, draw(st.integers(1, 100)), numa)


@dataclass
class Record:
    """What the orchestrator knows of one host: what it reported at first, and what was placed there since."""

    cells: tuple[CellReport, ...]
    placed: dict[UUID, tuple[Placement, Shape]] = field(default_factory=dict)

    def used(self) -> Counter[tuple[int, str]]:
        used: Counter[tuple[int, str]] = Counter()
        for place, _ in self.placed.values():
            for cell in place.cells:
                used.update({(cell, resource): amount for resource, amount in place.per_cell.items()})
        return used

    def fleet(self) -> Fleet:
        used = self.used()
        cells = tuple(_state(cell, {each: used[cell.cell, each] for each in CELL_RESOURCES}) for cell in self.cells)
        host = HostState(
            1, "h1", "d1", "c1", "r1", "v1", "x86_64", cells, DISK_MIB, DISK_MIB, prefixes=((1,),)
        )  # fmt: skip
        return Fleet.build([host])

    def exact(self) -> bool:
        """Whether no VM is counted on several cells, where what doesn't divide is rounded up."""
        return all(len(place.cells) == 1 for place, _ in self.placed.values())


def _state(cell: CellReport, used: dict[str, int]) -> CellState:
    pages = {each.size_kib: each.pages for each in cell.huge_pages}
    whole = {
        "cores": cell.cores - cell.cores_reserved,
        "memory_mib": cell.memory_mib - cell.memory_reserved_mib,
        "shared_vcpus": cell.shared_vcpus,
        "pages_2m": pages.get(MEBI, 0),
        "pages_1g": pages.get(GIBI, 0),
    }
    free = {each: whole[each] - used[each] for each in whole}
    assert min(free.values()) >= 0, f"cell {cell.cell} is over-committed: {free}"
    memory_free_mib = free.pop("memory_mib")
    return CellState(
        cell=cell.cell,
        socket=cell.socket,
        threads_per_core=cell.threads_per_core,
        memory_free_mib=memory_free_mib,
        shared_cpus=cell.cores_shared * cell.threads_per_core,
        **whole,
        **{f"{each}_free": amount for each, amount in free.items()},
    )


def _free(cell: CellReport) -> dict[str, int]:
    pages = {each.size_kib: each.pages_free for each in cell.huge_pages}
    return {
        "cores": cell.cores_free,
        "memory_mib": cell.memory_free_mib,
        "shared_vcpus": cell.shared_vcpus_free,
        "pages_2m": pages.get(MEBI, 0),
        "pages_1g": pages.get(GIBI, 0),
    }


def _claim(vm_id: UUID, shape: Shape, cells: tuple[int, ...]) -> Claim:
    return Claim(vm_id, f"v{vm_id.int}", shape.vcpus, shape.memory_mib, shape.disk_mib, cells, shape.numa)


def _request(shape: Shape, ids: list[UUID]) -> PlanRequest:
    return PlanRequest.alike([(vm_id, f"v{vm_id.int}") for vm_id in ids], shape, "x86_64")


def _record_left(record: Record) -> dict[int, dict[str, int]]:
    used, host = record.used(), record.cells
    return {cell.cell: {each: whole - used[cell.cell, each] for each, whole in _free(cell).items()} for cell in host}


def _check(record: Record, ledger: Ledger) -> None:
    """The record never thinks a cell has more than it has, and knows exactly unless some VM spans cells."""
    record.fleet()
    left = _record_left(record)
    for cell in ledger.cells():
        there = _free(cell)
        if record.exact():
            assert left[cell.cell] == there
        else:
            assert all(left[cell.cell][each] <= there[each] for each in there)


@settings(max_examples=300)
@given(machines(), st.lists(st.tuples(shapes(), st.integers(1, 4)), min_size=1, max_size=8), st.randoms())
def test_a_host_admits_what_was_planned_in_any_order_and_nothing_that_was_refused(
    ledger: Ledger, batches: list[tuple[Shape, int]], random: Random
) -> None:
    empty, numbers = ledger.cells(), count(1)
    record = Record(empty)
    for shape, wanted in batches:
        result = plan(record.fleet(), _request(shape, [UUID(int=next(numbers)) for _ in range(wanted)]))
        for place in random.sample(result.placed, len(result.placed)):
            granted = ledger.reserve(_claim(place.vm_id, shape, place.cells))
            assert granted.cells == tuple(sorted(place.cells))
            record.placed[place.vm_id] = (place, shape)
        _check(record, ledger)
        if result.refused:
            assert set(result.refused[0].reasons) <= ROOM
        if result.refused and record.exact() and not shape.numa.multi_cell:
            for cell in empty:
                with pytest.raises(PpecError):
                    ledger.reserve(_claim(UUID(int=next(numbers)), shape, (cell.cell,)))
        for vm_id in random.sample(sorted(record.placed), random.randint(0, len(record.placed) // 2)):
            assert ledger.release(vm_id)
            del record.placed[vm_id]
        _check(record, ledger)
    for vm_id in record.placed:
        ledger.release(vm_id)
    assert ledger.cells() == empty


@given(st.integers(1, 4), st.integers(1, 6), st.sampled_from([1, 2, 4]), st.integers(1, 24), st.sampled_from(SmtPolicy))
def test_on_equal_cells_a_vm_spans_as_few_as_its_host_could_make_do_with(
    cells: int, cores: int, threads: int, half_vcpus: int, smt: SmtPolicy
) -> None:
    cpus = count()
    topology = Topology(
        tuple(
            Cell(n, n, 4096, tuple(Core(tuple(next(cpus) for _ in range(threads)), n) for _ in range(cores)))
            for n in range(cells)
        )
    )
    ledger = Ledger(topology, DISK_MIB)
    shape = Shape(2 * half_vcpus, 64, 1, NumaPolicy(smt=smt, multi_cell=True))
    result = plan(Record(ledger.cells()).fleet(), _request(shape, [UUID(int=1)]))

    def admits(number: int) -> bool:
        try:
            ledger.reserve(_claim(UUID(int=2), shape, tuple(range(number))))
        except PpecError:
            return False
        return ledger.release(UUID(int=2))

    fewest = next((number for number in range(1, cells + 1) if admits(number)), 0)
    assert [len(place.cells) for place in result.placed] == ([fewest] if fewest else [])
