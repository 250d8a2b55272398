# SPDX-License-Identifier: Apache-2.0
"""Candidates kept current, row by row, many rows at once or all anew, are the same to the last digit."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from uuid import UUID

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppec_contract.api_placement import Policy
from ppec_orchestrator.fleets.generator import Recipe, generate
from ppec_orchestrator.placement import candidates as module
from ppec_orchestrator.placement import workspace as workspaces
from ppec_orchestrator.placement.candidates import Candidates
from ppec_orchestrator.placement.planner import Planner
from ppec_orchestrator.placement.policies import POLICIES, pack
from ppec_orchestrator.placement.policies import Policy as Rules
from ppec_orchestrator.placement.request import PlanRequest, Profile, VmRequest
from ppec_orchestrator.placement.workspace import Taken, Workspace

HOSTS = 80


def some_taken(rng: random.Random, workspace: Workspace, profiles: Sequence[Profile], taken: list[Taken]) -> None:
    """A few VMs come, and one may leave."""
    for _ in range(rng.randint(1, 4)):
        profile = rng.choice(profiles)
        mine = Candidates(workspace, profile, Policy.PACK)
        rows = np.flatnonzero(mine.key < np.inf)
        if len(rows):
            row = int(rng.choice(rows))
            vm = VmRequest(UUID(int=len(taken) + 1), f"v{len(taken)}", profile)
            taken.append(workspace.take(row, mine.cells(row), mine.fitting, vm))
    if taken and rng.random() < 0.5:
        workspace.give_back(taken.pop(rng.randrange(len(taken))))


def same(one: Candidates, other: Candidates) -> None:
    assert (one.key == other.key).all()
    assert one.count == other.count == np.count_nonzero(one.key < np.inf)


@pytest.mark.parametrize(
    "policy", [name for name, policy in POLICIES.items() if policy.by_row is not None or policy.by_left]
)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_row_by_row_many_at_once_and_anew_are_the_same(policy: Policy, seed: int) -> None:
    rng = random.Random(seed)
    file = generate(Recipe(HOSTS, 2, seed=seed, varied=True, requests=20))
    workspace = Workspace(file.fleet)
    profiles = [request.profile for request in file.requests]
    profile, taken = rng.choice(profiles), list[Taken]()
    by_row, at_once = (Candidates(workspace, profile, policy) for _ in range(2))
    for _ in range(6):
        some_taken(rng, workspace, profiles, taken)
        if rng.random() < 0.3:
            workspace.start_epoch(0)
        changed = workspace.changed_since(at_once._seen)
        assert changed is not None
        assert len(changed) <= module.FEW
        at_once._recount(np.array(sorted(changed), dtype=np.int64))
        at_once._seen = workspace.moment
        for one in (by_row, at_once):
            one.refresh()
        same(by_row, at_once)
        same(by_row, Candidates(workspace, profile, policy))


def test_a_policy_may_score_by_what_is_left_and_by_the_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES, Policy.BALANCED, Rules(pack, moves_with_fleet=True))
    file = generate(Recipe(HOSTS, 2, requests=1))
    request = file.requests[0]
    workspace = Workspace(file.fleet)
    candidates = Candidates(workspace, request.profile, Policy.BALANCED)
    row = int(np.flatnonzero(candidates.key < np.inf)[0])
    workspace.take(row, candidates.cells(row), candidates.fitting, request)
    workspace.start_epoch(1)
    candidates.refresh()
    same(candidates, Candidates(workspace, request.profile, Policy.BALANCED))


@pytest.mark.parametrize("policy", [name for name, policy in POLICIES.items() if policy.only_rise])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_scores_that_wait_are_never_higher_than_they_will_be(policy: Policy, seed: int) -> None:
    rng = random.Random(seed)
    file = generate(Recipe(HOSTS, 2, seed=seed, varied=True, requests=20))
    workspace = Workspace(file.fleet)
    profiles = [request.profile for request in file.requests]
    profile, taken = rng.choice(profiles), list[Taken]()
    waiting = Candidates(workspace, profile, policy)
    for _ in range(6):
        some_taken(rng, workspace, profiles, taken)
        if rng.random() < 0.2:
            workspace.start_epoch(0)
        waiting.refresh(scores=False)
        now = Candidates(workspace, profile, policy)
        old = np.isin(np.arange(HOSTS), list(waiting.old_scores))
        assert waiting.count == now.count
        assert ((waiting.key < np.inf) == (now.key < np.inf)).all()
        assert (waiting.key <= now.key).all()
        assert (waiting.key == now.key)[~old].all()
        if rng.random() < 0.3:
            waiting.refresh()
            assert not waiting.old_scores
            same(waiting, now)


def test_some_scores_wait() -> None:
    file = generate(Recipe(HOSTS, 2, requests=1))
    request = file.requests[0]
    workspace = Workspace(file.fleet)
    candidates = Candidates(workspace, request.profile, Policy.SPREAD)
    row = int(candidates.key.argmin())
    workspace.take(row, candidates.cells(row), candidates.fitting, request)
    candidates.refresh(scores=False)
    assert candidates.old_scores == {row}


def test_what_is_forgotten_is_worked_out_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspaces, "MOST_CHANGES", 10)
    file = generate(Recipe(HOSTS, 2, requests=60))
    planner, request = Planner(file.fleet), PlanRequest(file.requests)
    profile = file.requests[0].profile
    kept = planner.candidates(profile, request.policy)
    seen = planner.workspace.moment
    first = planner.plan(request)
    assert planner.workspace.changed_since(seen) is None
    for _ in range(3):
        assert planner.plan(request) == first
        assert len(planner.workspace._changes) <= 2 * workspaces.MOST_CHANGES
    planner.workspace.take(0, [0], kept.fitting, file.requests[0])
    same(planner.candidates(profile, request.policy), Candidates(planner.workspace, profile, request.policy))


@pytest.mark.parametrize("policy", list(Policy))
def test_a_whole_batch_is_given_back_at_once(policy: Policy) -> None:
    file = generate(Recipe(HOSTS, 2, varied=True, requests=300))
    planner = Planner(file.fleet)
    planner.plan(PlanRequest(file.requests, policy))
    fresh = Workspace(file.fleet)
    assert all((planner.workspace.free[each] == fresh.free[each]).all() for each in fresh.free)
    assert all((planner.workspace.disk(pool) == fresh.disk(pool)).all() for pool in _pools(fresh))
    assert planner.workspace.addresses.left == fresh.addresses.left
    names = {group.name for request in file.requests for group in request.groups}
    assert all(planner.workspace.groups.members(name) == fresh.groups.members(name) for name in names)
    profile = file.requests[0].profile
    planner.workspace.start_epoch(0)
    same(planner.candidates(profile, policy), Candidates(fresh, profile, policy))


def _pools(workspace: Workspace) -> Iterator[str]:
    yield ""
    yield from {name for host in workspace.fleet.hosts for name in host.pools}
