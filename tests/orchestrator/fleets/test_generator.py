# SPDX-License-Identifier: Apache-2.0
"""Made-up fleets: the same for the same seed, within their own limits, and as full as asked for."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppec_contract.api_placement import Policy
from ppec_orchestrator.fleets.generator import Recipe, generate
from ppec_orchestrator.fleets.reading import read_fleet
from ppec_orchestrator.fleets.snapshot import written
from ppec_orchestrator.placement.planner import plan
from ppec_orchestrator.placement.request import PlanRequest


def text(recipe: Recipe) -> str:
    file = generate(recipe)
    return "".join(written(file.fleet, file.requests, file.names))


@given(st.integers(), st.booleans(), st.floats(0, 1))
@settings(max_examples=15, deadline=None)
def test_every_fleet_passes_the_checks_of_the_reader(seed: int, varied: bool, fill: float) -> None:
    """Overlapping VMs, unknown references, more free than there is: none of it."""
    made = text(Recipe(6, 2, seed=seed, fill=fill, requests=20, varied=varied))
    assert len(read_fleet(made.encode(), "it").requests) == 20


def test_a_seed_gives_one_fleet_and_another_seed_another() -> None:
    def made(**more: Any) -> str:
        return text(Recipe(20, requests=20, **more))

    assert made(seed=3, varied=True) == made(seed=3, varied=True)
    assert made(seed=3) != made(seed=4)


@pytest.mark.parametrize("fill", [0.3, 0.65])
def test_it_is_as_full_as_asked_for(fill: float) -> None:
    fleet = generate(Recipe(200, 4, seed=7, fill=fill, requests=1)).fleet
    used = 1 - fleet.free("cores").sum() / fleet.capacity("cores").sum()
    assert abs(used - fill) < 0.1
    assert len(fleet.places["cluster"]) == 4
    assert len(fleet.places["rack"]) == 32


def test_an_apps_vms_stand_on_hosts_of_their_own() -> None:
    for host in generate(Recipe(10, seed=5, requests=1)).fleet.hosts:
        apps = [group.name for vm in host.vms for group in vm.groups]
        assert len(apps) == len(set(apps))
        assert len(apps) > len(host.vms) // 4


@pytest.mark.parametrize("policy", Policy)
def test_a_varied_fleet_uses_all_that_the_planner_knows(policy: Policy) -> None:
    file = generate(Recipe(200, 4, seed=2, requests=400, varied=True))
    placed = {each.name for each in plan(file.fleet, PlanRequest(file.requests, policy)).placed}
    names = {profile: name for name, profile in file.names.profiles.items()}
    asked = {names[each.profile] for each in file.requests}
    assert {"smt8.32", "iso4.16", "huge8.32", "shared2.4", "nvme8.64", "pool4.16", "gold4.16"} <= asked
    assert {names[each.profile] for each in file.requests if each.name in placed} >= asked - {"wide64.512"}
