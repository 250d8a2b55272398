# SPDX-License-Identifier: Apache-2.0
"""For each rule a plan that breaks it and no other: the checker names that fault alone."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from ppec_contract.api_placement import Policy
from ppec_contract.vm import CpuPolicy, NumaPolicy, SmtPolicy
from ppec_orchestrator.placement import checker
from ppec_orchestrator.placement.checker import check
from ppec_orchestrator.placement.fleet import CellState, Fleet, HostState, PoolState, SeatedVm
from ppec_orchestrator.placement.plan import Plan
from ppec_orchestrator.placement.planner import plan
from ppec_orchestrator.placement.request import (
    Group,
    Level,
    PlanRequest,
    Profile,
    Shape,
    VmRequest,
    Where,
)

CELLS = (
    CellState(0, 0, 2, 8, 8, 4096, 4096, 8, 16, 16, 512, 512, 4, 4, 2, 2),
    CellState(1, 1, 2, 8, 8, 4096, 4096, 8, 16, 16, 512, 512, 4, 4, 2, 2),
)
PINNED = Profile(
    Shape(4, 1024, 40, pool="fast", nvme=1),
    "x86_64",
    Where("d", "c", "r", "h1", "v", "e", labels=frozenset({("disk", "ssd")}), without=frozenset({("old", "")})),
    capabilities=frozenset({"nvme"}),
    networks=(frozenset({1}), None),
    fixed=(frozenset({2}),),
)
PLAIN = Profile(Shape(4, 1024, 40), "x86_64")


def a_host(name: str = "h1", **change: Any) -> HostState:
    host = HostState(
        1, name, "d", "c", "r", "v", "x86_64", CELLS, 100, 100, prefixes=((1,), (2,)), region="e",
        capabilities=frozenset({"nvme"}), labels={"disk": "ssd"}, pools={"fast": PoolState(100, 100)},
    )  # fmt: skip
    return replace(host, host_id=int(name[1:]), **change)


def cells(**change: Any) -> tuple[CellState, ...]:
    return tuple(replace(cell, **change) for cell in CELLS)


def vms(*profiles: Profile, **change: Any) -> tuple[VmRequest, ...]:
    return tuple(VmRequest(UUID(int=n + 1), f"v{n}", profile, **change) for n, profile in enumerate(profiles))


def member(group: Group, *, at: tuple[int, ...] = (0,), movable: bool = True) -> SeatedVm:
    return SeatedVm(UUID(int=99), "old", PLAIN, at, (group,), movable)


def last(made: Plan, **change: Any) -> Plan:
    """The plan, with something else said of its last place."""
    return replace(made, placed=(*made.placed[:-1], made.placed[-1]._replace(**change)))


# --- where a VM does not fit ------------------------------------------------------------------------------------------

LACKING: dict[str, dict[str, Any]] = {
    "silent": {"live": False},
    "draining": {"draining": True},
    "another region": {"region": "x"},
    "another data centre": {"datacentre": "x"},
    "another cluster": {"cluster": "x"},
    "another rack": {"rack": "x"},
    "another VRF": {"vrf": "x"},
    "another architecture": {"architecture": "aarch64"},
    "an older agent": {"capabilities": frozenset()},
    "without a label": {"labels": {}},
    "another label": {"labels": {"disk": "hdd"}},
    "a label too many": {"labels": {"disk": "ssd", "old": "1"}},
    "another prefix": {"prefixes": ((3,), (2,))},
    "another fixed prefix": {"prefixes": ((1,), (3,))},
    "no prefix": {"prefixes": ()},
    "a pool too full": {"pools": {"fast": PoolState(100, 39)}},
    "no pool": {"pools": {}},
    "too few cores": {"cells": cells(cores_free=1)},
    "too little memory": {"cells": cells(memory_free_mib=1023)},
    "too few drives": {"cells": cells(nvme_free=0)},
    "other cells": {"cells": tuple(replace(cell, cell=cell.cell + 2) for cell in CELLS)},
}


@pytest.mark.parametrize("policy", list(Policy))
@pytest.mark.parametrize("lacking", list(LACKING))
def test_a_host_that_lacks_one_thing(lacking: str, policy: Policy) -> None:
    request = PlanRequest(vms(PINNED), policy)
    fleet, spoilt = (Fleet.build([a_host(**change), a_host("h2")]) for change in ({}, LACKING[lacking]))
    sound = plan(fleet, request)
    assert check(fleet, request, sound) == []
    assert check(spoilt, request, sound) == ["v0 does not fit cells (0,) of h1"]


NEEDS: dict[str, tuple[Shape, dict[str, Any]]] = {
    "its own disk": (Shape(4, 1024, 40), {"disk_free_mib": 39}),
    "shared vCPUs": (Shape(4, 1024, 40, NumaPolicy(cpus=CpuPolicy.SHARED)), {"cells": cells(shared_vcpus_free=3)}),
    "CPUs to share": (Shape(4, 1024, 40, NumaPolicy(cpus=CpuPolicy.SHARED)), {"cells": cells(shared_cpus=3)}),
    "pages of 2 MiB": (Shape(4, 1024, 40, NumaPolicy(huge_page_kib=2048)), {"cells": cells(pages_2m_free=511)}),
    "pages of 1 GiB": (Shape(4, 1024, 40, NumaPolicy(huge_page_kib=1048576)), {"cells": cells(pages_1g_free=0)}),
    "siblings": (Shape(4, 1024, 40, NumaPolicy(smt=SmtPolicy.REQUIRE)), {"cells": cells(threads_per_core=1)}),
    "cores of its own": (Shape(4, 1024, 40, NumaPolicy(smt=SmtPolicy.ISOLATE)), {"cells": cells(cores_free=3)}),
}


@pytest.mark.parametrize("need", list(NEEDS))
def test_a_shape_that_needs_more_than_there_is(need: str) -> None:
    shape, change = NEEDS[need]
    request = PlanRequest(vms(replace(PLAIN, shape=shape)), Policy.PACK)
    sound = plan(Fleet.build([a_host()]), request)
    assert check(Fleet.build([a_host()]), request, sound) == []
    assert check(Fleet.build([a_host(**change)]), request, sound) == ["v0 does not fit cells (0,) of h1"]


def test_cells_of_two_sockets_where_one_has_enough() -> None:
    four = tuple(replace(CELLS[0], cell=number, socket=number // 2) for number in range(4))
    fleet = Fleet.build([a_host(cells=four)])
    request = PlanRequest(vms(replace(PLAIN, shape=Shape(32, 1024, 40, NumaPolicy(multi_cell=True)))), Policy.PACK)
    sound = plan(fleet, request)
    assert sound.placed[0].cells in {(0, 1), (2, 3)}
    assert check(fleet, request, sound) == []
    assert check(fleet, request, last(sound, cells=(1, 2))) == ["v0 does not fit cells (1, 2) of h1"]


def test_a_vm_over_several_cells_has_the_fewest_that_will_do_and_each_of_its_own() -> None:
    wide = replace(PLAIN, shape=Shape(16, 1024, 40, NumaPolicy(multi_cell=True)))
    fleet, request = Fleet.build([a_host()]), PlanRequest(vms(wide), Policy.PACK)
    assert plan(fleet, request).placed[0].cells == (0,)
    half = last(plan(fleet, request), cells=(0, 1), cores=4, memory_mib=512)
    assert check(fleet, request, half) == ["v0 does not fit cells (0, 1) of h1"]
    wider = replace(request, vms=vms(replace(PLAIN, shape=Shape(32, 1024, 40, NumaPolicy(multi_cell=True)))))
    sound = plan(fleet, wider)
    assert (sound.placed[0].cells, check(fleet, wider, sound)) == ((0, 1), [])
    for strange in ((0, 0), (0, 7)):
        assert check(fleet, wider, last(sound, cells=strange)) == [f"v0 does not fit cells {strange} of h1"]


def test_cells_without_siblings_are_nothing_to_a_vm_that_needs_them() -> None:
    shape = Shape(32, 1024, 40, NumaPolicy(multi_cell=True, smt=SmtPolicy.REQUIRE))
    odd = replace(CELLS[0], cell=2, threads_per_core=1)
    fleet, request = (
        Fleet.build([a_host(cells=(*CELLS, odd))]),
        PlanRequest(vms(replace(PLAIN, shape=shape)), Policy.PACK),
    )
    sound = plan(fleet, request)
    assert (sound.placed[0].cells, check(fleet, request, sound)) == ((0, 1), [])


def test_no_vm_has_more_than_sixteen_cells() -> None:
    many = tuple(replace(CELLS[0], cell=number, cores_free=1, memory_free_mib=64) for number in range(20))
    fleet, numa = Fleet.build([a_host(cells=many)]), NumaPolicy(multi_cell=True)
    request = PlanRequest(vms(*(replace(PLAIN, shape=Shape(vcpus, 17, 1, numa)) for vcpus in (34, 32))), Policy.PACK)
    sound = plan(fleet, request)
    assert ([each.name for each in sound.refused], len(sound.placed[0].cells)) == (["v0"], 16)
    assert check(fleet, request, sound) == []


def test_a_vm_without_a_disk_needs_the_pool_all_the_same() -> None:
    request = PlanRequest(vms(replace(PLAIN, shape=Shape(4, 1024, 0, pool="fast"))), Policy.PACK)
    sound = plan(Fleet.build([a_host()]), request)
    assert check(Fleet.build([a_host()]), request, sound) == []
    assert check(Fleet.build([a_host(pools={})]), request, sound) == ["v0 does not fit cells (0,) of h1"]


def test_one_socket_that_has_enough_of_another_width() -> None:
    apart = tuple(replace(CELLS[0], cell=number, socket=number, cores_free=8) for number in range(2))
    together = tuple(replace(CELLS[0], cell=number, socket=2, threads_per_core=1, cores_free=16) for number in (2, 3))
    fleet = Fleet.build([a_host(cells=apart + together)])
    request = PlanRequest(vms(replace(PLAIN, shape=Shape(32, 1024, 40, NumaPolicy(multi_cell=True)))), Policy.PACK)
    sound = plan(fleet, request)
    assert (sound.placed[0].cells, check(fleet, request, sound)) == ((2, 3), [])
    over_two = last(sound, cells=(0, 1), cores=8)
    assert check(fleet, request, over_two) == ["v0 does not fit cells (0, 1) of h1"]


PARTS: dict[str, tuple[Shape, dict[str, Any]]] = {
    "a core": (Shape(4, 1536, 1, NumaPolicy(multi_cell=True)), {"memory_free_mib": 512}),
    "a page": (Shape(16, 2048, 1, NumaPolicy(multi_cell=True, huge_page_kib=1048576)), {"cores_free": 3}),
}


@pytest.mark.parametrize("part", list(PARTS))
def test_each_part_of_a_vm_over_several_cells_has_its_own(part: str) -> None:
    """Two cores, or two pages, are for two cells, and what else the VM takes would need three."""
    shape, change = PARTS[part]
    fleet = Fleet.build([a_host(cells=tuple(replace(CELLS[0], cell=number, **change) for number in range(3)))])
    request = PlanRequest(vms(replace(PLAIN, shape=shape)), Policy.PACK)
    refused = plan(fleet, request)
    assert not refused.placed
    assert check(fleet, request, refused) == []


def test_addresses_that_have_run_out() -> None:
    request = PlanRequest(vms(PINNED))
    sound = plan(Fleet.build([a_host()], {1: 2}), request)
    assert check(Fleet.build([a_host()], {1: 2}), request, sound) == []
    # Its two networks take an address of this prefix each.
    assert check(Fleet.build([a_host()], {1: 1}), request, sound) == ["v0 does not fit cells (0,) of h1"]


def test_an_address_of_any_prefix_leaves_the_last_of_one_that_is_named() -> None:
    request = PlanRequest(vms(replace(PLAIN, networks=(None, frozenset({1})))))
    fleet = Fleet.build([a_host(prefixes=((1, 2),))], {1: 1, 2: 1})
    sound = plan(fleet, request)
    assert (len(sound.placed), check(fleet, request, sound)) == (1, [])


GROUPS = (
    Group("apart"),
    Group("racks apart", level=Level.RACK),
    Group("centres apart", level=Level.DATACENTRE),
)


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.name)
def test_a_hard_group_whose_member_is_too_near(group: Group) -> None:
    near = {Level.HOST: "h1", Level.RACK: "h2", Level.DATACENTRE: "h3"}[group.level]
    request = PlanRequest(vms(replace(PLAIN, where=Where(host="h1")), groups=(group,)), Policy.PACK)
    sound = plan(_three(), request)
    assert check(_three(), request, sound) == []
    assert check(_three(near, group), request, sound) == ["v0 does not fit cells (0,) of h1"]
    assert near == "h1" or check(_three("h4", group), request, sound) == []


@pytest.mark.parametrize("level", list(Level))
def test_a_hard_group_whose_members_are_elsewhere(level: Level) -> None:
    group = Group("together", apart=False, level=level)
    request = PlanRequest(vms(replace(PLAIN, where=Where(host="h1")), groups=(group,)), Policy.PACK)
    sound = plan(_three(), request)
    assert check(_three(), request, sound) == []
    assert check(_three("h4", group), request, sound) == ["v0 does not fit cells (0,) of h1"]


def _three(standing: str = "", group: Group = GROUPS[0]) -> Fleet:
    """h1 and h2 share a rack, h3 the data centre; h4 is somewhere else."""
    hosts = (a_host(), a_host("h2"), a_host("h3", rack="r3"), a_host("h4", rack="r4", datacentre="d4"))
    return Fleet.build([replace(h, vms=(member(group),)) if h.name == standing else h for h in hosts])


def test_a_host_that_the_vm_or_the_plan_is_kept_from() -> None:
    fleet, request = Fleet.build([a_host()]), PlanRequest(vms(PLAIN))
    sound = plan(fleet, request)
    kept = replace(request, vms=vms(PLAIN, excluded_hosts=frozenset({"h1"})))
    contended = replace(request, contended_hosts=frozenset({"h1"}))
    for each in (kept, contended):
        assert check(fleet, each, sound) == ["v0 does not fit cells (0,) of h1"]
        assert check(fleet, each, plan(fleet, each)) == []


@pytest.mark.parametrize("policy", list(Policy))
def test_a_fleet_without_hosts(policy: Policy) -> None:
    fleet, request = Fleet.build([]), PlanRequest(vms(PLAIN), policy)
    sound = plan(fleet, request)
    assert len(sound.refused) == 1
    assert check(fleet, request, sound) == []


# --- what earlier VMs have taken --------------------------------------------------------------------------------------

OVERDRAWN: dict[str, dict[str, Any]] = {
    "cores": {"cells": cells(cores_free=3)[:1]},
    "memory": {"cells": cells(memory_free_mib=2047)[:1]},
    "drives": {"cells": cells(nvme_free=1)[:1]},
    "the pool": {"pools": {"fast": PoolState(100, 79)}},
}


@pytest.mark.parametrize("overdrawn", list(OVERDRAWN))
def test_two_vms_with_room_for_one(overdrawn: str) -> None:
    roomy = Fleet.build([a_host(cells=CELLS[:1])])
    request = PlanRequest(vms(PINNED, PINNED), Policy.PACK)
    sound = plan(roomy, request)
    assert check(roomy, request, sound) == []
    tight = Fleet.build([a_host(**{"cells": CELLS[:1]} | OVERDRAWN[overdrawn])])
    scores = [why._replace(score=_scored(tight, request, at)) for at, why in enumerate(sound.evidence)]
    found = check(tight, request, replace(sound, evidence=tuple(scores)))
    assert found == ["v1 does not fit cells (0,) of h1"]


def _scored(fleet: Fleet, request: PlanRequest, at: int) -> float:
    """Of the first of two as the fleet is; the second's is never asked for."""
    return 0.0 if at else plan(fleet, replace(request, vms=request.vms[:1])).evidence[0].score


def test_the_own_disk_and_addresses_and_groups_of_earlier_vms_count() -> None:
    apart = replace(PLAIN, networks=(frozenset({1}),))
    request = PlanRequest(vms(apart, apart, groups=(GROUPS[0],)), Policy.BALANCED)
    alone = replace(request, vms=vms(apart, apart))
    sound = plan(Fleet.build([a_host()], {1: 2}), alone)
    second = ["v1 does not fit cells (0,) of h1"]
    assert check(Fleet.build([a_host()], {1: 2}), alone, sound) == []
    assert check(Fleet.build([a_host()], {1: 2}), request, sound) == second
    assert check(Fleet.build([a_host()], {1: 1}), alone, sound) == second
    small = Fleet.build([a_host(disk_free_mib=79)], {1: 2})
    assert check(small, alone, _first_as_on(small, alone, sound)) == second


def _first_as_on(fleet: Fleet, request: PlanRequest, sound: Plan) -> Plan:
    first = sound.evidence[0]._replace(score=_scored(fleet, request, 0))
    return replace(sound, evidence=(first, *sound.evidence[1:]))


# --- independence -----------------------------------------------------------------------------------------------------


def test_nothing_of_the_planner_is_in_the_checker_but_its_data() -> None:
    folder, package = Path(checker.__file__).parent, "ppec_orchestrator."
    files, data = ("checker", "replay", "why_not"), ("fleet", "plan", "reasons", "request")
    imported = {
        node.module
        for file in files
        for node in ast.walk(ast.parse((folder / f"{file}.py").read_text()))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(package)
    }
    assert imported == {f"{package}placement.{name}" for name in (*files[1:], *data)}
