# SPDX-License-Identifier: Apache-2.0
"""The ledger: no interleaving of reserve, commit, release and rebuild leaks or books twice."""

from __future__ import annotations

import itertools
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ppec_agentd.hypervisor import Domain, DomainMetadata
from ppec_agentd.ledger import Claim, Ledger
from ppec_agentd.numa import NumaPlan
from ppec_agentd.topology import declare_topology
from ppec_contract.errors import PpecError
from ppec_contract.vm import VcpuPin, VmState

TOPOLOGY = declare_topology("sockets=2,cells=2,cores=3,threads=2,memory_mib=1000")
DISK_MIB = 5000
POOLS_MIB = {"fast": 3000, "slow.1": 4000}


def new_ledger() -> Ledger:
    return Ledger(TOPOLOGY, DISK_MIB, reserved_cores_per_cell=1, reserved_memory_per_cell_mib=100, pools_mib=POOLS_MIB)


_numbers = itertools.count(1)


def claim(
    name: str,
    vcpus: int = 2,
    memory_mib: int = 100,
    disk_mib: int = 10,
    cells: tuple[int, ...] = (0,),
    pool: str = "",
) -> Claim:
    return Claim(uuid.UUID(int=next(_numbers)), name, vcpus, memory_mib, disk_mib, cells, pool=pool)


def domain_of(wanted: Claim, plan: NumaPlan) -> Domain:
    metadata = DomainMetadata(
        *(wanted.vm_id, wanted.name, "op", plan.cells, wanted.vcpus, wanted.memory_mib, wanted.disk_mib, "", plan.pins),
        pool=wanted.pool,
    )
    return Domain(
        wanted.vm_id, wanted.name, VmState.RUNNING, wanted.vcpus, wanted.memory_mib, plan.pins, plan.cells, metadata
    )


class LedgerMachine(RuleBasedStateMachine):
    """The model is a plain dictionary of who holds what; the ledger must agree after every step."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = new_ledger()
        self.held: dict[uuid.UUID, tuple[Claim, NumaPlan]] = {}
        self.committed: set[uuid.UUID] = set()

    @rule(
        vcpus=st.sampled_from([2, 4, 6, 8]),
        memory_mib=st.integers(1, 1000),
        disk_mib=st.integers(1, 2000),
        cells=st.sampled_from([(0,), (1,), (0, 1), (2,), (3,), (2, 3), (7,)]),
        pool=st.sampled_from(["", *POOLS_MIB, "none"]),
    )
    def reserve(self, vcpus: int, memory_mib: int, disk_mib: int, cells: tuple[int, ...], pool: str) -> None:
        wanted = claim(f"vm-{next(_numbers)}", vcpus, memory_mib, disk_mib, cells, pool)
        before = (self.ledger.totals(), self.ledger.cells())
        try:
            plan = self.ledger.reserve(wanted)
        except PpecError as refusal:
            assert refusal.code == "host.no_capacity"  # noqa: PT017 - a refusal is one of two fair answers
            assert (self.ledger.totals(), self.ledger.cells()) == before
        else:
            assert pool != "none", "a pool that is not there has no room"
            self.held[wanted.vm_id] = (wanted, plan)

    @rule(data=st.data())
    def reserve_a_taken_name(self, data: Any) -> None:
        if self.held:
            vm_id = data.draw(st.sampled_from(sorted(self.held)))
            with pytest.raises(PpecError) as refused:
                self.ledger.reserve(claim(self.held[vm_id][0].name))
            assert refused.value.code == "vm.exists"

    @rule(data=st.data())
    def commit(self, data: Any) -> None:
        if self.held:
            vm_id = data.draw(st.sampled_from(sorted(self.held)))
            self.ledger.commit(vm_id)
            self.committed.add(vm_id)

    @rule(data=st.data())
    def release(self, data: Any) -> None:
        if self.held:
            vm_id = data.draw(st.sampled_from(sorted(self.held)))
            assert self.ledger.release(vm_id)
            assert not self.ledger.release(vm_id)
            del self.held[vm_id]
            self.committed.discard(vm_id)

    @rule()
    def crash_and_rebuild(self) -> None:
        """Only what was committed has a domain; the rest is forgotten with the process."""
        self.held = {vm_id: kept for vm_id, kept in self.held.items() if vm_id in self.committed}
        self.ledger = new_ledger()
        self.ledger.follow(domain_of(*kept) for kept in self.held.values())

    @rule()
    def read_the_hypervisor(self) -> None:
        before = (self.ledger.totals(), self.ledger.cells())
        self.ledger.follow([domain_of(*self.held[vm_id]) for vm_id in self.committed], self.ledger.held_ids())
        assert (self.ledger.totals(), self.ledger.cells()) == before

    @invariant()
    def nothing_is_leaked_or_shared(self) -> None:
        cpus = [cpu for _, plan in self.held.values() for cpu in plan.cpus]
        assert len(cpus) == len(set(cpus))
        totals, cells = self.ledger.totals(), self.ledger.cells()
        assert totals.cores - totals.cores_free == len(cpus) // 2
        assert totals.memory_mib - totals.memory_free_mib == sum(c.memory_mib for c, _ in self.held.values())
        by_pool = {pool: sum(c.disk_mib for c, _ in self.held.values() if c.pool == pool) for pool in ("", *POOLS_MIB)}
        assert totals.disk_mib - totals.disk_free_mib == by_pool.pop("")
        pools = self.ledger.pools()
        assert {pool.name: pool.size_mib for pool in pools} == POOLS_MIB
        assert {pool.name: pool.size_mib - pool.free_mib for pool in pools} == by_pool
        assert all(free >= 0 for free in totals.free.values())
        assert sum(cell.cores_free for cell in cells) == totals.cores_free
        assert sum(cell.memory_free_mib for cell in cells) == totals.memory_free_mib
        assert self.ledger.held_ids() == set(self.held)


LedgerMachine.TestCase.settings = hypothesis_settings(max_examples=60, stateful_step_count=30, deadline=None)
TestLedger = LedgerMachine.TestCase


def test_threads_that_race_for_the_last_cores_never_share_one() -> None:
    ledger = new_ledger()
    barrier = threading.Barrier(8)

    def race(number: int) -> list[NumaPlan]:
        barrier.wait(timeout=60)
        won = []
        for turn in range(40):
            wanted = claim(f"vm-{number}-{turn}", cells=(number % 4,))
            try:
                plan = ledger.reserve(wanted)
            except PpecError as refusal:
                assert refusal.code == "host.no_capacity"  # noqa: PT017
                continue
            if turn % 3:
                ledger.release(wanted.vm_id)
            else:
                ledger.commit(wanted.vm_id)
                won.append(plan)
        return won

    with ThreadPoolExecutor(8) as pool:
        plans = [plan for won in pool.map(race, range(8)) for plan in won]
    while ledger.totals().cores_free:
        cell = next(report.cell for report in ledger.cells() if report.cores_free)
        plans.append(ledger.reserve(claim(f"vm-last-{len(plans)}", cells=(cell,))))
    assert len(plans) == 8  # two usable cores in each of four cells
    cpus = [cpu for plan in plans for cpu in plan.cpus]
    assert len(cpus) == len(set(cpus)) == 16
    assert ledger.totals().cores_free == 0


def test_nobody_is_refused_while_there_is_room() -> None:
    """More threads than slots, each with one try: every slot is given, although losers hold totals for a moment."""
    for _ in range(30):
        ledger = new_ledger()
        barrier = threading.Barrier(16)

        def one_try(number: int, ledger: Ledger = ledger, barrier: threading.Barrier = barrier) -> str:
            barrier.wait(timeout=60)
            try:
                ledger.reserve(claim(f"vm-{number}", cells=(number % 4,)))
            except PpecError as refusal:
                return refusal.code
            return "won"

        with ThreadPoolExecutor(16) as pool:
            outcomes = list(pool.map(one_try, range(16)))
        assert outcomes.count("won") == 8
        assert outcomes.count("host.no_capacity") == 8
        assert ledger.totals().cores_free == 0


def test_a_domain_made_by_hand_is_counted_where_it_is_pinned() -> None:
    ledger = new_ledger()
    cell = TOPOLOGY.cells[1]
    pinned = cell.cores[2].cpus[0]
    by_hand = Domain(uuid.uuid4(), "hand", VmState.RUNNING, 1, 300, pins=(VcpuPin(vcpu=0, pcpu=pinned),))
    ledger.follow([by_hand])
    assert [c.cores_free for c in ledger.cells()] == [2, 1, 2, 2]
    assert sum(c.memory_free_mib for c in ledger.cells()) == 3600 - 300
    with pytest.raises(PpecError):
        ledger.reserve(claim("hand"))
    # Gone again, by a picture in which it was known before.
    ledger.follow([], ledger.held_ids())
    assert ledger.totals().cores_free == 8
    assert ledger.holdings() == ()


def test_a_picture_older_than_a_change_does_not_undo_it() -> None:
    ledger = new_ledger()
    held_before = ledger.held_ids()
    wanted = claim("new")
    plan = ledger.reserve(wanted)
    ledger.commit(wanted.vm_id)
    ledger.follow([], held_before)
    assert ledger.holding(wanted.vm_id) is not None
    held_before = ledger.held_ids()
    ledger.release(wanted.vm_id)
    ledger.follow([domain_of(wanted, plan)], held_before)
    assert ledger.holding(wanted.vm_id) is None


def test_a_pool_is_counted_by_itself_and_named_in_its_refusal() -> None:
    ledger = new_ledger()
    wanted = claim("first", disk_mib=2500, pool="fast")
    ledger.reserve(wanted)
    assert ledger.totals().disk_free_mib == DISK_MIB
    with pytest.raises(PpecError) as refused:
        ledger.reserve(claim("second", disk_mib=501, pool="fast"))
    assert refused.value.code == "host.no_capacity"
    assert refused.value.details == {"resource": "pool_fast_mib", "wanted": 501, "free": 500}
    assert "501 pool_fast_mib; 500 are free" in refused.value.message
    ledger.reserve(claim("third", disk_mib=501))
    assert [(pool.name, pool.size_mib, pool.free_mib) for pool in ledger.pools()] == [
        ("fast", 3000, 500),
        ("slow.1", 4000, 4000),
    ]
    ledger.release(wanted.vm_id)
    assert [pool.free_mib for pool in ledger.pools()] == [3000, 4000]


def test_a_disk_in_a_pool_that_the_host_has_no_more_is_kept_in_the_books() -> None:
    wanted = claim("old", disk_mib=700, pool="fast")
    plan = new_ledger().reserve(wanted)
    later = Ledger(TOPOLOGY, DISK_MIB)
    later.follow([domain_of(wanted, plan)])
    held = later.holding(wanted.vm_id)
    assert held is not None
    assert (held.pool, held.disk_mib) == ("fast", 700)
    assert (later.totals().disk_free_mib, later.pools()) == (DISK_MIB, ())
    assert later.totals().free["pool_fast_mib"] == -700
    with pytest.raises(PpecError) as refused:
        later.reserve(claim("new", pool="fast"))
    assert refused.value.details == {"resource": "pool_fast_mib", "wanted": 10, "free": 0}
    # Smaller than what stands in it: nothing is free, and nothing below that is told.
    smaller = Ledger(TOPOLOGY, DISK_MIB, pools_mib={"fast": 600})
    smaller.follow([domain_of(wanted, plan)])
    assert [(pool.size_mib, pool.free_mib) for pool in smaller.pools()] == [(600, 0)]
    assert later.release(wanted.vm_id)
    assert later.totals().free["pool_fast_mib"] == 0


def test_more_memory_than_the_named_cells_have_is_refused_with_the_figures() -> None:
    with pytest.raises(PpecError) as refused:
        new_ledger().reserve(claim("big", memory_mib=901))
    assert refused.value.code == "host.no_capacity"
    assert refused.value.details == {"resource": "memory_mib", "wanted": 901, "free": 900, "cells": [0]}
