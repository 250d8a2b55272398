# SPDX-License-Identifier: Apache-2.0
"""What N+1 keeps of profiles has a bound: within a plan, and a smaller one from plan to plan."""

from __future__ import annotations

import gc
from dataclasses import replace
from uuid import UUID

import pytest

from ppec_contract.api_placement import Policy
from ppec_orchestrator.placement.fleet import CellState, Fleet, HostState
from ppec_orchestrator.placement.havens import MOST_KEPT, MOST_KNOWN, Haven, Havens
from ppec_orchestrator.placement.planner import Planner
from ppec_orchestrator.placement.request import Level, PlanRequest, Profile, Shape, Spare, SpareRule, VmRequest
from ppec_orchestrator.placement.workspace import Workspace


@pytest.fixture
def fleet() -> Fleet:
    cells = (CellState(0, 0, 1, 4096, 4096, 2**20, 2**20),)
    h1 = HostState(1, "h1", "d1", "c1", "r1", "v1", "x86_64", cells, 10000, 10000, prefixes=((1,),))
    return Fleet.build([h1, replace(h1, host_id=2, name="h2")])


def profiles(count: int) -> list[Profile]:
    return [Profile(Shape(2, 64 + number, 1), "x86_64") for number in range(count)]


def alive() -> int:
    gc.collect()
    return sum(isinstance(each, Haven) for each in gc.get_objects())


def test_as_many_as_are_kept_are_the_same_in_the_next_plan(fleet: Fleet) -> None:
    havens = Havens(Workspace(fleet))
    some = profiles(MOST_KEPT)
    before = [havens.of(profile) for profile in some]
    havens.forget()
    assert all(havens.of(profile) is haven for profile, haven in zip(some, before, strict=True))


def test_one_plan_keeps_no_more_than_its_bound(fleet: Fleet) -> None:
    before, havens = alive(), Havens(Workspace(fleet))
    for profile in profiles(MOST_KNOWN + 10):
        # Equal ones are one, whichever object they are.
        assert havens.of(profile) is havens.of(Profile(profile.shape, profile.architecture))
    assert alive() - before <= MOST_KNOWN


def test_a_plan_of_many_profiles_leaves_none_of_them_to_the_next(fleet: Fleet) -> None:
    before, planner = alive(), Planner(fleet)
    vms = tuple(VmRequest(UUID(int=n + 1), f"vm-{n}", one) for n, one in enumerate(profiles(MOST_KEPT + 1)))
    assert planner.plan(PlanRequest(vms, Policy.PACK, spare=SpareRule(Spare.REQUIRED))).placed
    assert alive() - before > MOST_KEPT
    planner.witnesses(Level.HOST)
    assert alive() == before
