# SPDX-License-Identifier: Apache-2.0
"""Planner and checker, which share no code, agree on every plan; and the checker finds what is wrong with a wrong
one."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from uuid import NAMESPACE_DNS, UUID, uuid5

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppec_contract.api_placement import Policy
from ppec_orchestrator.placement.checker import check
from ppec_orchestrator.placement.fleet import CellState, Fleet, HostState
from ppec_orchestrator.placement.plan import Plan, Refusal
from ppec_orchestrator.placement.planner import Planner, plan
from ppec_orchestrator.placement.reasons import Reason
from ppec_orchestrator.placement.request import PlanRequest, Profile, Shape, VmRequest

from .fleets import a_fleet, a_request

SEEDS = st.integers(0, 2**32)


@settings(max_examples=1000, deadline=None)
@given(seed=SEEDS)
def test_planner_and_checker_agree(seed: int) -> None:
    rng = random.Random(seed)
    fleet, request = a_fleet(rng), a_request(rng)
    assert check(fleet, request, plan(fleet, request)) == []


@settings(max_examples=100, deadline=None)
@given(seed=SEEDS)
def test_what_a_planner_keeps_from_plan_to_plan_changes_none(seed: int) -> None:
    rng = random.Random(seed)
    fleet = a_fleet(rng)
    asked = [a_request(rng) for _ in range(3)]
    planner = Planner(fleet)
    for request in [*asked, *asked]:
        assert planner.plan(request) == plan(fleet, request)


@settings(max_examples=200, deadline=None)
@given(seed=SEEDS)
def test_all_or_nothing_is_planned_alike_whatever_order_the_vms_come_in(seed: int) -> None:
    rng = random.Random(seed)
    fleet, request = a_fleet(rng), a_request(rng, all_or_nothing=True)
    shuffled = replace(request, vms=tuple(rng.sample(request.vms, len(request.vms))))
    one, other = plan(fleet, request), plan(fleet, shuffled)
    assert {place.name: (place.host, place.cells) for place in one.placed} == {
        place.name: (place.host, place.cells) for place in other.placed
    }


def _fleet() -> Fleet:
    def host(number: int, cores: int) -> HostState:
        cells = tuple(CellState(c, c, 1, 8, cores - c, 8192, 8192) for c in (0, 1))
        return HostState(number, f"h{number}", "d", "c", f"r{number}", "v", "x86_64", cells, 100, 90, prefixes=((1,),))

    return Fleet.build([host(1, 8), host(2, 6), host(3, 3)], {1: 10})


def _request(policy: Policy) -> PlanRequest:
    small, huge = Profile(Shape(4, 1024, 10), "x86_64"), Profile(Shape(64, 64, 1), "x86_64")
    names = [("a", small), ("b", small), ("c", huge)]
    return PlanRequest(tuple(VmRequest(_id(name), name, profile) for name, profile in names), policy)


def _id(name: str) -> UUID:

    return uuid5(NAMESPACE_DNS, name)


def _first(plan: Plan, **change: object) -> Plan:
    return replace(plan, placed=(plan.placed[0]._replace(**change), *plan.placed[1:]))  # type: ignore[arg-type]


def _evidence(plan: Plan, **change: object) -> Plan:
    return replace(plan, evidence=(plan.evidence[0]._replace(**change), *plan.evidence[1:]))  # type: ignore[arg-type]


def _reasons(reasons: Mapping[Reason, int]) -> Callable[[Plan], Plan]:
    return lambda plan: replace(plan, refused=(replace(plan.refused[0], reasons=reasons),))


WRONG: dict[str, tuple[Callable[[Plan], Plan], str]] = {
    "no such host": (lambda p: _first(p, host="h9"), "does not fit"),
    "a host it does not fit": (lambda p: _first(p, host="h3"), "does not fit"),
    "no such cell": (lambda p: _first(p, cells=(7,)), "does not fit"),
    "more than it takes": (lambda p: _first(p, cores=5), "cores is said"),
    "less than it takes": (lambda p: _first(p, memory_mib=1), "memory_mib is said"),
    "a candidate too many": (lambda p: _evidence(p, candidates=9), "candidates"),
    "another score": (lambda p: _evidence(p, score=0.5), "score"),
    "a broken group": (lambda p: _evidence(p, broken=1), "broken is said"),
    "a VM left out": (lambda p: replace(p, refused=()), "once"),
    "a VM twice": (lambda p: replace(p, placed=p.placed + p.placed[:1], evidence=p.evidence + p.evidence[:1]), "once"),
    "one step for two": (lambda p: _evidence(p, step=1), "one step"),
    "refused, but it fits": (
        lambda p: replace(
            p, placed=p.placed[1:], evidence=p.evidence[1:],
            refused=(*p.refused, Refusal(p.placed[0].vm_id, "a", {Reason.CORES: 3}, 0)),
        ),
        "was refused",
    ),
    "hosts without a reason": (_reasons({Reason.VM_LARGER_THAN_CELL: 2}), "it is for"),
    "hosts of another reason": (_reasons({Reason.CORES: 3}), "it is for"),
    "less than none": (_reasons({Reason.VM_LARGER_THAN_CELL: 4, Reason.SILENT: -1}), "it is for"),
    "another VM's name": (lambda p: replace(p, refused=(replace(p.refused[0], name="a"),)), "is refused as a"),
}  # fmt: skip


@pytest.mark.parametrize("policy", list(Policy))
@pytest.mark.parametrize("fault", list(WRONG))
def test_the_checker_finds_what_is_wrong(fault: str, policy: Policy) -> None:
    fleet, request = _fleet(), _request(policy)
    sound = plan(fleet, request)
    assert check(fleet, request, sound) == []
    spoil, words = WRONG[fault]
    assert any(words in found for found in check(fleet, request, spoil(sound)))


@pytest.mark.parametrize("policy", list(Policy))
def test_the_checker_finds_a_better_host(policy: Policy) -> None:
    fleet, request = _fleet(), _request(policy)
    sound = plan(fleet, request)
    elsewhere = next(name for name in ("h1", "h2") if name != sound.placed[0].host)
    found = check(fleet, request, _first(sound, host=elsewhere))
    assert any("would have been better" in each for each in found)
