# SPDX-License-Identifier: Apache-2.0
"""With N+1, what is tried for one VM is bounded in plans, whatever the fleet."""

from __future__ import annotations

import random
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppec_contract.api_placement import Policy
from ppec_orchestrator.fleets.file import FleetFile
from ppec_orchestrator.fleets.generator import Recipe, generate
from ppec_orchestrator.placement.advice import Adviser, advise, helps, refused_by_kind
from ppec_orchestrator.placement.applied import applied
from ppec_orchestrator.placement.effort import MOST_TRIED
from ppec_orchestrator.placement.fleet import Fleet
from ppec_orchestrator.placement.planner import Planner, plan
from ppec_orchestrator.placement.request import PlanRequest, Spare, SpareRule, VmRequest

from .occupied import a_profile, an_occupied_fleet, some_groups

REQUIRED = SpareRule(Spare.REQUIRED)


def refused_on(file: FleetFile) -> tuple[Fleet, list[VmRequest]]:
    """The fleet with the rest of the plan carried out, and the first kinds of VMs that it refuses."""
    request = PlanRequest(file.requests, Policy.PACK, spare=REQUIRED)
    made = plan(file.fleet, request)
    kinds = refused_by_kind(file.requests, made)
    return applied(file.fleet, file.requests, made), [vm for vm, _ in kinds[:6]]


@pytest.fixture
def plans_under_the_rule(monkeypatch: pytest.MonkeyPatch) -> list[PlanRequest]:
    made: list[PlanRequest] = []
    original = Planner.plan

    def counted(planner: Planner, request: PlanRequest, kept: None = None) -> object:
        if request.spare.mode is Spare.REQUIRED:
            made.append(request)
        return original(planner, request, kept)

    monkeypatch.setattr(Planner, "plan", counted)
    return made


@pytest.mark.parametrize("apart", [False, True])
def test_on_a_nearly_full_fleet_so_many_plans_are_made_for_one_vm(
    plans_under_the_rule: list[PlanRequest], apart: bool
) -> None:
    after, vms = refused_on(generate(Recipe(20, 1, seed=1, fill=0.8, requests=60, apart=apart)))
    assert len(vms) > 3
    for vm in vms[:3]:
        plans_under_the_rule.clear()
        told = Adviser(after).advice(vm, REQUIRED)
        assert len(plans_under_the_rule) == told.tried <= MOST_TRIED
        assert told.changes == advise(after, vm, REQUIRED) != []


def test_what_was_found_for_one_vm_spares_plans_for_the_next(plans_under_the_rule: list[PlanRequest]) -> None:
    after, vms = refused_on(generate(Recipe(20, 1, seed=1, fill=0.8, requests=60, apart=True)))
    adviser = Adviser(after)
    plans_under_the_rule.clear()
    together = [adviser.advice(vm, REQUIRED) for vm in vms]
    made = len(plans_under_the_rule)
    alone = [Adviser(after).advice(vm, REQUIRED) for vm in vms]
    assert together == alone
    assert made < sum(told.tried for told in alone)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), most=st.integers(0, 6))
def test_with_less_tried_what_is_offered_makes_the_vm_fit_and_something_is_where_something_helps(
    seed: int, most: int
) -> None:
    rng = random.Random(seed)
    fleet = an_occupied_fleet(rng)
    vm = VmRequest(UUID(int=1), "v", a_profile(rng), groups=some_groups(rng))
    if plan(fleet, PlanRequest((vm,), Policy.PACK, spare=REQUIRED)).placed:
        return
    told = Adviser(fleet, most).advice(vm, REQUIRED)
    assert told.tried <= most
    assert all(helps(change, fleet, vm, REQUIRED) for change in told.changes)
    assert bool(told.changes) >= bool(advise(fleet, vm, REQUIRED))
