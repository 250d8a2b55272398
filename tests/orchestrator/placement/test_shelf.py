# SPDX-License-Identifier: Apache-2.0
"""What is kept of candidates has a bound, within a plan too, and no plan is another one for it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppec_contract.api_placement import Policy
from ppec_orchestrator.placement.plan import Plan
from ppec_orchestrator.placement.planner import Planner
from ppec_orchestrator.placement.request import PlanRequest
from ppec_orchestrator.placement.shelf import Shelf

from .fleets import a_fleet, a_request


def _of_their_own_size(request: PlanRequest) -> PlanRequest:
    vms = [
        replace(vm, profile=replace(vm.profile, shape=replace(vm.profile.shape, disk_mib=1 + number)))
        for number, vm in enumerate(request.vms)
    ]
    return replace(request, vms=tuple(vms))


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), profiles=st.integers(1, 3))
def test_with_room_for_few_profiles_plans_are_the_same(seed: int, profiles: int) -> None:
    rng = random.Random(seed)
    fleet = a_fleet(rng)
    requests = [_of_their_own_size(a_request(rng, batch_hosts={}, all_or_nothing=False)) for _ in range(3)]
    roomy, tight = Planner(fleet), Planner(fleet)
    tight.shelf = Shelf(tight.workspace, most_bytes=12_000 * profiles)
    for request in requests:
        assert _vm_after_vm(tight, request) == _vm_after_vm(roomy, request)


def _vm_after_vm(planner: Planner, request: PlanRequest) -> Plan:
    """Without the second look at the batch as a whole, which is only taken where its profiles have room."""
    planner.workspace.begin()
    try:
        return planner.run(request)
    finally:
        planner.workspace.end()


@pytest.mark.parametrize("policy", Policy)
def test_one_plan_of_many_sizes_keeps_to_the_bound(policy: Policy) -> None:
    rng = random.Random(1)
    fleet = a_fleet(rng)
    vms = a_request(rng, most_vms=1).vms * 60
    planner = Planner(fleet)
    planner.shelf = Shelf(planner.workspace, most_bytes=100_000)
    planner.plan(_of_their_own_size(PlanRequest(vms, policy)))
    assert planner.shelf.dropped
    assert 0 < planner.shelf.size <= 100_000


def test_the_last_used_are_kept() -> None:
    rng = random.Random(1)
    fleet = a_fleet(rng)
    asked = _of_their_own_size(PlanRequest(a_request(rng, most_vms=1).vms * 30))
    planner = Planner(fleet)
    shelf = Shelf(planner.workspace, most_bytes=100_000)
    first = shelf.current(asked.vms[0].profile, Policy.PACK)
    for vm in asked.vms[1:]:
        shelf.current(vm.profile, Policy.PACK)
        assert shelf.current(asked.vms[0].profile, Policy.PACK) is first
    assert shelf.current(asked.vms[1].profile, Policy.PACK).profile == asked.vms[1].profile
    assert shelf.dropped


def test_of_what_is_dropped_the_balance_keeps_nothing() -> None:
    """Where hosts are of many kinds, that would be most of it."""
    rng = random.Random(1)
    asked = _of_their_own_size(PlanRequest(a_request(rng, most_vms=1).vms * 30))
    planner = Planner(a_fleet(rng))
    shelf = Shelf(planner.workspace, most_bytes=100_000)
    for vm in asked.vms:
        shelf.current(vm.profile, Policy.BALANCED)
    assert shelf.dropped
    assert 0 < len(planner.workspace.balance._lines) <= len(shelf._kept) < 30
