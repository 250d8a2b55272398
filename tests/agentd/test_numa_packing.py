# SPDX-License-Identifier: Apache-2.0
"""Several VMs onto one host: never worse than the blog's greedy, on hosts of many shapes."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from ppec_agentd.numa import CpuPool
from ppec_agentd.numa.packing import first_socket, pack, pack_by, room_left
from ppec_agentd.topology import Topology, declare_topology, parse_capabilities

FOLDER = Path(__file__).parent / "fixtures" / "capabilities"
SMALL = ("sockets=2,cores=6,threads=2", "sockets=2,cells=2,cores=4", "cells=4,cores=4,threads=2", "sockets=4,cores=3")
SHAPES = [*map(declare_topology, SMALL), *(parse_capabilities(path.read_text()) for path in FOLDER.glob("*.xml"))]


@st.composite
def hosts(draw: st.DrawFn) -> CpuPool:
    topology = draw(st.sampled_from(SHAPES))
    pool = CpuPool(topology, draw(st.integers(0, 2)), shared_cores=draw(st.integers(0, 2)))
    usable = [core for cell in topology.cells for core in pool.usable_of(cell)]
    taken = draw(st.sets(st.sampled_from(usable), max_size=12)) if usable else set()
    return pool.take(cpu for core in taken for cpu in core.cpus)


sizes = st.lists(st.integers(1, 10).map(lambda half: 2 * half), max_size=7)


def greedily(pool: CpuPool, wanted: list[int]) -> tuple[int, CpuPool]:
    """The blog's greedy, written down once more: descending, first socket with room, lowest cores."""
    placed = 0
    for vcpus in sorted(wanted, reverse=True):
        for socket in pool.topology.sockets:
            cores = sorted(
                (core for cell in pool.topology.cells for core in pool.free_of(cell) if core.socket == socket),
                key=lambda core: core.cpus,
            )
            if sum(len(core.cpus) for core in cores) < vcpus:
                continue
            taken: list[int] = []
            for core in cores:
                if len(taken) < vcpus:
                    taken += core.cpus
            pool, placed = pool.take(taken), placed + vcpus
            break
    return placed, pool


def whole(topology: Topology, pool: CpuPool) -> tuple[int, int]:
    """Whole sockets and whole cells, counted from the CPUs."""
    free = {cpu for cell in topology.cells for core in pool.free_of(cell) for cpu in core.cpus}
    usable = {cell.cell: {cpu for core in pool.usable_of(cell) for cpu in core.cpus} for cell in topology.cells}
    every = set().union(*usable.values())
    sockets = [
        {cpu for core in topology.cores_of_socket(socket) for cpu in core.cpus} & every for socket in topology.sockets
    ]
    return sum(1 for cpus in sockets if cpus and cpus <= free), sum(
        1 for cpus in usable.values() if cpus and cpus <= free
    )


@settings(deadline=None, max_examples=150)
@given(hosts(), sizes)
def test_never_worse_than_the_blogs_greedy(pool: CpuPool, wanted: list[int]) -> None:
    placed, after = greedily(pool, wanted)
    ours = pack(pool, wanted)
    reference = pack_by(pool, wanted, first_socket)
    assert reference.room == room_left(after, placed), "the greedy measured by the bench is the blog's"
    assert (ours.room.vcpus, *whole(pool.topology, ours.pool)) >= (placed, *whole(pool.topology, after))
    assert ours.room >= reference.room


@settings(deadline=None, max_examples=150)
@given(hosts(), sizes)
def test_each_plan_keeps_the_rules(pool: CpuPool, wanted: list[int]) -> None:
    packing = pack(pool, wanted)
    reserved = {
        cpu
        for cell in pool.topology.cells
        for core in (*pool.reserved_of(cell), *pool.shared_of(cell))
        for cpu in core.cpus
    }
    seen = set(pool.taken)
    for vcpus, plan in zip(wanted, packing.plans, strict=True):
        if plan is None:
            continue
        assert len(plan.pins) == vcpus
        assert seen.isdisjoint(plan.cpus)
        assert reserved.isdisjoint(plan.cpus)
        assert len({pool.topology.core_of_cpu[cpu].socket for cpu in plan.cpus}) == 1
        assert {pool.topology.cell_of_cpu[cpu] for cpu in plan.cpus} == set(plan.cells)
        seen |= set(plan.cpus)
    assert packing.pool.taken == seen


def test_a_small_vm_leaves_the_whole_cell_alone() -> None:
    """The greedy's first socket is whole; the second has a hole."""
    pool = CpuPool(declare_topology("sockets=2,cores=4,threads=2"), 0).take([4])
    assert pack_by(pool, [2], first_socket).room.whole_cells == 0
    assert pack(pool, [2]).room.whole_cells == 1
