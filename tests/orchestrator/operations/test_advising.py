# SPDX-License-Identifier: Apache-2.0
"""What would help is tried once for all that ask the same of the same fleet, and nothing is kept for longer."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from uuid import UUID

import pytest

from ppec_orchestrator.operations.advising import IN_REQUESTS, MOST_ANSWERS, Advising
from ppec_orchestrator.placement.advice import MOST_TRIED_IN_ALL, Adviser, advise
from ppec_orchestrator.placement.change_views import views
from ppec_orchestrator.placement.fleet import CellState, Fleet, HostState, SeatedVm
from ppec_orchestrator.placement.planner import plan
from ppec_orchestrator.placement.request import Group, PlanRequest, Profile, Shape, Spare, SpareRule, VmRequest

NO_RULE, REQUIRED = SpareRule(), SpareRule(Spare.REQUIRED)


def a_fleet(cores: int = 8) -> Fleet:
    cells = (CellState(0, 0, 1, cores, cores, 8192, 8192),)
    return Fleet.build(
        [HostState(n, f"h{n}", "d1", "c1", "r1", "v1", "x86_64", cells, 1000, 1000, prefixes=((1,),)) for n in range(3)]
    )


def a_vm(vcpus: int = 16, number: int = 1) -> VmRequest:
    return VmRequest(UUID(int=number), f"v{number}", Profile(Shape(vcpus, 1024, 10), "x86_64"))


def test_all_that_ask_the_same_at_once_are_told_the_same_answer() -> None:
    advising, fleet = Advising(), a_fleet()
    with ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(advising.changes_for, fleet, a_vm(number=n), NO_RULE) for n in range(64)]
    answers = [one.result() for one in asked]
    assert advising.tried == 1
    assert all(answer is answers[0] for answer in answers)
    assert answers[0] == views(advise(fleet, a_vm()), IN_REQUESTS)


def test_whatever_differs_is_another_question() -> None:
    advising, fleet = Advising(), a_fleet()
    vm = a_vm()
    others = [
        (fleet, vm, REQUIRED),
        (fleet, a_vm(18), NO_RULE),
        (fleet, replace(vm, groups=(Group("g"),)), NO_RULE),
        (fleet, replace(vm, excluded_hosts=frozenset({"h1"})), NO_RULE),
        # It looks the same, and is another one.
        (a_fleet(), vm, NO_RULE),
    ]
    for tried, (on, asked, rule) in enumerate([(fleet, vm, NO_RULE), *others], 1):
        assert advising.changes_for(on, asked, rule) == views(advise(on, asked, rule), IN_REQUESTS)
        assert advising.tried == tried


def test_a_plan_that_placed_nothing_leaves_the_fleet_it_was_made_on() -> None:
    advising, fleet = Advising(), a_fleet()
    nothing, something = PlanRequest((a_vm(),)), PlanRequest((a_vm(2), a_vm(16, number=2)))
    assert advising.after(fleet, nothing, plan(fleet, nothing)) is fleet
    after = advising.after(fleet, something, plan(fleet, something))
    assert int(fleet.free("cores").sum()) - int(after.free("cores").sum()) == 2


def test_the_answers_given_last_are_kept() -> None:
    advising, fleet = Advising(), a_fleet()
    sizes = [10 + 2 * number for number in range(MOST_ANSWERS + 1)]
    for vcpus in sizes:
        advising.changes_for(fleet, a_vm(vcpus), NO_RULE)
    assert advising.tried == len(sizes)
    for vcpus in sizes[1:]:
        advising.changes_for(fleet, a_vm(vcpus), NO_RULE)
    assert advising.tried == len(sizes)
    advising.changes_for(fleet, a_vm(sizes[0]), NO_RULE)
    assert advising.tried == len(sizes) + 1


def test_nothing_keeps_a_fleet_that_nobody_else_has() -> None:
    advising, fleet = Advising(), a_fleet()
    advising.changes_for(fleet, a_vm(), NO_RULE)
    gone = weakref.ref(fleet)
    del fleet
    gc.collect()
    assert gone() is None


def test_what_failed_is_tried_again_and_keeps_nothing() -> None:
    advising, fleet = Advising(), a_fleet()
    broken = replace(a_vm(), profile=None)  # type: ignore[arg-type]
    for tried in (1, 2):
        with pytest.raises(AttributeError):
            advising.changes_for(fleet, broken, NO_RULE)
        assert advising.tried == tried
    assert advising.changes_for(fleet, a_vm(), NO_RULE)
    gone = weakref.ref(fleet)
    del fleet
    gc.collect()
    assert gone() is None


def a_fleet_that_keeps_a_way_out() -> Fleet:
    """One VM fits; with it, no loss could be made good."""
    cells = (CellState(0, 0, 1, 8, 4, 8192, 4096),)
    old = Profile(Shape(4, 1024, 10), "x86_64")
    return Fleet.build(
        [
            HostState(
                n, f"h{n}", "d1", "c1", "r1", "v1", "x86_64", cells, 1000, 1000, prefixes=((1,),),
                vms=(SeatedVm(UUID(int=100 + n), f"old-{n}", old, (0,)),),
            )
            for n in range(2)
        ]
    )  # fmt: skip


def test_with_n_plus_one_so_many_kinds_are_answered_as_take_so_many_plans() -> None:
    advising, fleet = Advising(), a_fleet_that_keeps_a_way_out()
    # Groups tell them apart; every one of them takes a plan or more.
    vms = [replace(a_vm(4, number=n), groups=(Group(f"g{n}"),)) for n in range(2 * MOST_TRIED_IN_ALL)]
    told = advising.changes_for_first(fleet, vms, REQUIRED)
    assert 0 < len(told) < len(vms)
    tried = [Adviser(fleet).advice(vm, REQUIRED).tried for vm in vms[: len(told)]]
    assert sum(tried[:-1]) < MOST_TRIED_IN_ALL <= sum(tried)
    # Each is what it is told alone, and asked again they are the same.
    assert told[-1] == views(advise(fleet, vms[len(told) - 1], REQUIRED), IN_REQUESTS)
    assert Advising().changes_for_first(fleet, vms, REQUIRED) == told
    without = advising.changes_for_first(a_fleet(), vms, NO_RULE)
    assert len(without) == len(vms)
