# SPDX-License-Identifier: Apache-2.0
"""Ganeti's score: kept incrementally it is what it is worked out anew, and what htools' definition says."""

from __future__ import annotations

import random
from math import isclose, sqrt
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppec_orchestrator.placement.applied import applied
from ppec_orchestrator.placement.balance import Balance
from ppec_orchestrator.placement.fleet import Fleet
from ppec_orchestrator.placement.planner import Planner, plan
from ppec_orchestrator.placement.request import VmRequest
from ppec_orchestrator.placement.workspace import Workspace

from .fleets import a_fleet, a_profile, a_request


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_the_score_kept_is_the_score_worked_out_anew(seed: int) -> None:
    rng = random.Random(seed)
    fleet, request = a_fleet(rng), a_request(rng)
    answer = plan(fleet, request)
    kept = Planner(fleet)
    workspace = kept.workspace
    for place in answer.placed:
        vm = next(vm for vm in request.vms if vm.vm_id == place.vm_id)
        host = fleet.hosts[fleet.index[place.host]]
        columns = [index for index, cell in enumerate(host.cells) if cell.cell in place.cells]
        workspace.take(fleet.index[place.host], columns, kept.candidates(vm.profile, request.policy).fitting, vm)
    after = applied(fleet, request.vms, answer)
    # A root near zero makes much of a little.
    assert workspace.balance.score() == pytest.approx(Balance(after).score(), abs=1e-6)
    assert Balance(after).score() == pytest.approx(_by_definition(after), abs=1e-6)


def _by_definition(fleet: Fleet) -> float:
    """Two passes over the hosts, as htools' manual has it."""
    rows = []
    for host in fleet.hosts:
        cells = host.cells
        memory = sum(c.memory_mib + 2 * c.pages_2m + 1024 * c.pages_1g + c.memory_reserved_mib for c in cells)
        free = sum(c.memory_free_mib + 2 * c.pages_2m_free + 1024 * c.pages_1g_free for c in cells)
        cpus = sum(c.cores + c.shared_vcpus + c.cores_reserved for c in cells)
        idle = sum(c.cores_free + c.shared_vcpus_free for c in cells)
        rows.append((free / memory, host.disk_free_mib / host.disk_mib, (cpus - idle) / cpus, len(host.vms)))
    memory_cv, disk_cv, cpu_cv, vms_cv = (_deviation(column) for column in zip(*rows, strict=True))
    return memory_cv + disk_cv + cpu_cv + 4 * vms_cv + vms_cv / 320


def _deviation(column: tuple[float, ...]) -> float:
    mean = sum(column) / len(column)
    return sqrt(sum((x - mean) ** 2 for x in column) / len(column))


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_plan_leaves_no_trace_in_the_score(seed: int) -> None:
    rng = random.Random(seed)
    fleet = a_fleet(rng)
    planner = Planner(fleet)
    before = planner.workspace.balance.score()
    planner.plan(a_request(rng))
    assert planner.workspace.balance.score() == before


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_planner_that_follows_the_fleet_plans_like_one_that_is_new(seed: int) -> None:
    """Of `balanced`, ties and near-ties may fall otherwise: what is compared is what its plans come to."""
    rng = random.Random(seed)
    fleet, first, second = a_fleet(rng), a_request(rng), a_request(rng)
    planner = Planner(fleet)
    planner.plan(second)
    after = applied(fleet, first.vms, plan(fleet, first))
    planner.follow(after, [row for row, host in enumerate(after.hosts) if host is not fleet.hosts[row]])
    kept, new = planner.plan(second), plan(after, second)
    assert {one.vm_id: dict(one.reasons) for one in kept.refused} == {
        one.vm_id: dict(one.reasons) for one in new.refused
    }
    assert [place.vm_id for place in kept.placed] == [place.vm_id for place in new.placed]
    for one, other in zip(kept.evidence, new.evidence, strict=True):
        assert one.candidates == other.candidates
        assert isclose(one.score, other.score, rel_tol=1e-6, abs_tol=1e-6)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_what_is_taken_and_given_back_leaves_all_as_it_was(seed: int) -> None:
    rng = random.Random(seed)
    fleet = a_fleet(rng)
    workspace = Workspace(fleet)
    planner = Planner(fleet)
    planner.workspace = workspace
    profiles = [a_profile(rng) for _ in range(3)]
    taken = []
    for profile in profiles:
        candidates = planner.candidates(profile, a_request(rng).policy)
        if candidates.count:
            row = int(candidates.key.argmin())
            taken.append(
                workspace.take(row, candidates.cells(row), candidates.fitting, VmRequest(UUID(int=1), "v", profile))
            )
    for one in rng.sample(taken, len(taken)):
        workspace.give_back(one)
    fresh = Workspace(fleet)
    assert all((workspace.free[each] == fresh.free[each]).all() for each in fresh.free)
    assert (workspace.disk_free_mib == fresh.disk_free_mib).all()
    assert workspace.addresses.left == fresh.addresses.left
    for profile in profiles:
        assert (workspace.addresses.enough(profile.networks) == fresh.addresses.enough(profile.networks)).all()
