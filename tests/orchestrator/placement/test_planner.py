# SPDX-License-Identifier: Apache-2.0
"""The planner: never over-commits, is exact about NUMA, and says of every refused VM why."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppec_contract.api_placement import Policy
from ppec_orchestrator.placement.fleet import CellState, Fleet, HostState
from ppec_orchestrator.placement.plan import Plan, Refusal
from ppec_orchestrator.placement.planner import plan
from ppec_orchestrator.placement.reasons import Reason
from ppec_orchestrator.placement.request import PlanRequest, Shape, VmRequest, Where

PREFIX = 1


def cell(
    number: int, cores: int = 8, memory_mib: int = 16384, *, threads: int = 1, free: int | None = None
) -> CellState:
    return CellState(number, number, threads, cores, cores if free is None else free, memory_mib, memory_mib)


def host(name: str, *cells: CellState, rack: str = "r1", **more: object) -> HostState:
    given: dict[str, object] = {
        "host_id": int(name[1:]),
        "name": name,
        "datacentre": "d1",
        "cluster": "c1",
        "rack": rack,
        "vrf": "v1",
        "architecture": "x86_64",
        "cells": cells or (cell(0), cell(1)),
        "disk_mib": 100_000,
        "disk_free_mib": 100_000,
        "prefixes": ((PREFIX,),),
    }
    return HostState(**{**given, **more})  # type: ignore[arg-type]


def fleet(*hosts: HostState, addresses: int = 1000) -> Fleet:
    return Fleet.build(hosts, {PREFIX: addresses})


def request(
    count: int = 1, shape: Shape | None = None, policy: Policy = Policy.BALANCED, **more: object
) -> PlanRequest:
    return PlanRequest.alike(
        [(UUID(int=n + 1), f"vm-{n}") for n in range(count)],
        shape or Shape(4, 4096, 10_000),
        "x86_64",
        policy=policy,
        **more,  # type: ignore[arg-type]
    )


def reasons(result: Plan) -> dict[Reason, int]:
    assert result.refused
    return dict(result.refused[0].reasons)


def hosts_of(result: Plan) -> list[str]:
    return [p.host for p in result.placed]


def test_a_vm_that_no_single_cell_can_hold_is_refused_though_the_host_has_the_cores() -> None:
    result = plan(fleet(host("h1", cell(0, free=2), cell(1, free=2))), request())
    assert reasons(result) == {Reason.NUMA_FIT: 1}


def test_each_host_is_counted_once_under_what_turns_it_away() -> None:
    small = cell(0, cores=2, memory_mib=1024)
    result = plan(
        fleet(
            host("h1", live=False),
            host("h2", draining=True),
            host("h3", small),
            host("h4", cell(0, free=0), cell(1, free=1)),
            host("h5", disk_free_mib=5),
            host("h6", prefixes=()),
            host("h7", architecture="aarch64"),
            host("h8", rack="elsewhere", live=False),
        ),
        request(where=Where(cluster="c1", rack="r1")),
    )
    assert reasons(result) == {
        Reason.SILENT: 1,
        Reason.DRAINING: 1,
        Reason.VM_LARGER_THAN_CELL: 1,
        Reason.CORES: 1,
        Reason.DISK: 1,
        Reason.ADDRESSES: 1,
        Reason.ARCHITECTURE: 1,
        Reason.OUTSIDE_SCOPE: 1,
    }


def test_a_host_that_failed_the_vm_before_is_left_out_for_that_vm_only() -> None:
    profile = request().vms[0].profile
    vms = (
        VmRequest(UUID(int=1), "a", profile, frozenset({"h1"})),
        VmRequest(UUID(int=2), "b", profile, frozenset({"h1", "h2"})),
    )
    asked = PlanRequest(vms, Policy.PACK)
    result = plan(fleet(host("h1"), host("h2")), asked)
    assert hosts_of(result) == ["h2"]
    assert reasons(result) == {Reason.FAILED_BEFORE: 2}


def test_smt_siblings_are_never_shared() -> None:
    # 3 cores of 2 threads: a VM of 4 vCPUs takes 2 whole cores, so only one fits though 6 threads are free.
    result = plan(fleet(host("h1", cell(0, cores=3, threads=2))), request(2))
    assert [p.cores for p in result.placed] == [2]
    assert len(result.refused) == 1


def test_spread_keeps_a_batch_apart_by_host_then_rack() -> None:
    racks = {"h1": "a", "h2": "a", "h3": "b", "h4": "b"}
    result = plan(fleet(*(host(name, rack=rack) for name, rack in racks.items())), request(4, policy=Policy.SPREAD))
    assert len(set(hosts_of(result))) == 4
    assert len({racks[name] for name in hosts_of(result)[:2]}) == 2


def test_spread_counts_what_an_earlier_plan_of_the_batch_placed() -> None:
    result = plan(fleet(host("h1"), host("h2")), request(policy=Policy.SPREAD, batch_hosts={"h1": 1}))
    assert hosts_of(result) == ["h2"]


def test_spread_makes_nothing_of_a_host_that_the_batch_has_left() -> None:
    hosts = fleet(host("h1", cell(0), rack="r1"), host("h2", cell(0, free=4), rack="r2"))
    asked = request(1, policy=Policy.SPREAD)
    assert plan(hosts, replace(asked, batch_hosts={"h1": 0})) == plan(hosts, asked)


def test_pack_fills_a_host_before_it_opens_another() -> None:
    result = plan(fleet(host("h1"), host("h2"), host("h3")), request(4, policy=Policy.PACK))
    assert len(set(hosts_of(result))) == 1


def test_balanced_evens_out_use() -> None:
    result = plan(fleet(host("h1"), host("h2"), host("h3")), request(6))
    assert set(Counter(hosts_of(result)).values()) == {2}


def test_the_tightest_cell_is_taken_so_that_whole_cells_stay_open() -> None:
    result = plan(fleet(host("h1", cell(0), cell(1, free=4))), request())
    assert result.placed[0].cells == (1,)


def test_the_last_address_is_given_once_even_when_hosts_share_the_prefix() -> None:
    result = plan(fleet(host("h1"), host("h2"), addresses=1), request(2))
    assert len(result.placed) == 1
    assert reasons(result) == {Reason.ADDRESSES: 2}


def test_a_host_served_by_two_prefixes_of_a_family_uses_the_second_when_the_first_is_empty() -> None:
    both = Fleet.build([host("h1", prefixes=((1, 2),))], {1: 0, 2: 1})
    result = plan(both, request(2))
    assert (len(result.placed), reasons(result)) == (1, {Reason.ADDRESSES: 1})


def test_an_address_asked_for_by_number_needs_a_prefix_that_serves_the_host_and_none_that_is_free() -> None:
    two = Fleet.build([host("h1", prefixes=((1,),)), host("h2", prefixes=((2,),))], {1: 9, 2: 0})
    alone = request(1)
    profile = replace(alone.vms[0].profile, networks=(), fixed=(frozenset({2}),))
    asked = replace(alone, vms=(replace(alone.vms[0], profile=profile),))
    assert hosts_of(plan(two, asked)) == ["h2"]
    elsewhere = Fleet.build([host("h1", prefixes=((1,),))], {1: 9})
    assert reasons(plan(elsewhere, asked)) == {Reason.NOT_SERVED: 1}


def test_equal_fleets_give_equal_plans_whatever_order_they_were_read_in() -> None:
    hosts = [host(f"h{n}", rack=f"r{n % 3}") for n in range(9)]
    asked = request(7, policy=Policy.SPREAD)
    assert plan(fleet(*hosts), asked) == plan(fleet(*reversed(hosts)), asked)


def test_an_empty_fleet_refuses() -> None:
    assert plan(fleet(), request(2)).placed == ()


shapes = st.builds(Shape, st.integers(1, 12).map(lambda n: 2 * n), st.integers(64, 20_000), st.integers(1, 60_000))


@st.composite
def fleets(draw: st.DrawFn) -> Fleet:
    hosts = []
    for number in range(draw(st.integers(1, 6))):
        threads = draw(st.sampled_from([1, 2]))
        cells = [
            CellState(c, c, threads, cores, draw(st.integers(0, cores)), memory, draw(st.integers(0, memory)))
            for c in range(draw(st.integers(1, 4)))
            for cores, memory in [(draw(st.integers(0, 16)), draw(st.integers(0, 32_768)))]
        ]
        hosts.append(
            host(
                f"h{number}",
                *cells,
                rack=f"r{draw(st.integers(0, 2))}",
                disk_free_mib=draw(st.integers(0, 100_000)),
                live=draw(st.booleans()),
                prefixes=draw(st.sampled_from([(), ((1,),), ((2,),), ((1, 2),), ((1,), (3,))])),
            )
        )
    return Fleet.build(hosts, {1: draw(st.integers(0, 5)), 2: draw(st.integers(0, 5))})


@given(fleets(), shapes, st.sampled_from(Policy), st.integers(1, 12))
def test_a_plan_never_over_commits_and_refuses_only_what_fits_nowhere(
    given_fleet: Fleet, shape: Shape, policy: Policy, count: int
) -> None:
    result = plan(given_fleet, request(count, shape, policy))
    assert {p.vm_id for p in result.placed} | {r.vm_id for r in result.refused} == {
        UUID(int=n + 1) for n in range(count)
    }
    cores: Counter[tuple[str, int]] = Counter()
    memory: Counter[tuple[str, int]] = Counter()
    disk: Counter[str] = Counter()
    for p in result.placed:
        disk[p.host] += p.disk_mib
        cores[p.host, p.cells[0]] += p.cores
        memory[p.host, p.cells[0]] += p.memory_mib
    fits_now = 0
    for h in given_fleet.hosts:
        assert disk[h.name] <= h.disk_free_mib
        assert not disk[h.name] or (h.live and h.prefixes)
        for c in h.cells:
            assert cores[h.name, c.cell] <= c.cores_free
            assert memory[h.name, c.cell] <= c.memory_free_mib
            fits_now += (
                h.live
                and c.cores_free - cores[h.name, c.cell] >= -(-shape.vcpus // c.threads_per_core)
                and c.memory_free_mib - memory[h.name, c.cell] >= shape.memory_mib
                and h.disk_free_mib - disk[h.name] >= shape.disk_mib
            )
    if result.refused:
        assert all(sum(r.reasons.values()) == len(given_fleet.hosts) for r in result.refused)
        short_of_addresses = any(Reason.ADDRESSES in r.reasons for r in result.refused)
        assert fits_now == 0 or short_of_addresses


@pytest.mark.parametrize("policy", list(Policy))
def test_planning_leaves_the_snapshot_as_it_was(policy: Policy) -> None:
    snapshot = fleet(host("h1"), host("h2"))
    before = [a.copy() for a in (*snapshot.cells.values(), snapshot.disk_free_mib)]
    addresses = dict(snapshot.free_addresses)
    plan(snapshot, request(5, policy=policy))
    after = (*snapshot.cells.values(), snapshot.disk_free_mib)
    assert all((a == b).all() for a, b in zip(before, after, strict=True))
    assert dict(snapshot.free_addresses) == addresses


@pytest.mark.parametrize(
    ("counted", "sentence"),
    [
        ({Reason.CORES: 1}, "1 host: 1 without enough free cores"),
        ({Reason.SILENT: 1, Reason.MEMORY: 2}, "3 hosts: 2 without enough free memory, 1 silent"),
    ],
)
def test_refusal_reads_as_a_sentence(counted: dict[Reason, int], sentence: str) -> None:
    assert Refusal(uuid4(), "vm", counted).sentence() == sentence


def test_every_reason_has_words() -> None:
    assert all(reason.words for reason in Reason)


@pytest.mark.parametrize("policy", Policy)
def test_a_cell_that_shrank_under_its_vms_takes_no_other(policy: Policy) -> None:
    """The record may hold more of a cell than its host still has: after a bank of memory failed, say."""
    no_cores, no_memory = cell(0, free=-4), replace(cell(0), memory_free_mib=-2048)
    assert reasons(plan(fleet(host("h1", no_cores)), request(policy=policy))) == {Reason.CORES: 1}
    assert reasons(plan(fleet(host("h1", no_memory)), request(policy=policy))) == {Reason.MEMORY: 1}
