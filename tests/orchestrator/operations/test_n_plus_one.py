# SPDX-License-Identifier: Apache-2.0
"""N+1 on the fleet as it is stored: VMs that are asked for, and the same VMs once they are records."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from ppec_contract.errors import PpecError
from ppec_orchestrator.ipdb.provider import BuiltIn
from ppec_orchestrator.operations.creation import Creation
from ppec_orchestrator.operations.enqueueing import Ask
from ppec_orchestrator.operations.live_fleet import LiveFleet
from ppec_orchestrator.operations.planning import Planning
from ppec_orchestrator.placement.evacuation import exposed
from ppec_orchestrator.placement.request import Level
from ppec_orchestrator.store.operations import NewOperation

REQUIRED = {"n_plus_one": {"mode": "required"}}


@pytest.fixture
def fleet(world: Any) -> LiveFleet:
    return LiveFleet(world.database, silent_after_s=3600, now=world.now)


@pytest.fixture
def creation(world: Any) -> Creation:
    planning = Planning(world.database, silent_after_s=3600, now=world.now)
    return Creation(world.database, planning, world.now, BuiltIn())


def test_a_vm_for_one_host_may_restart_on_any(world: Any, creation: Creation, fleet: LiveFleet) -> None:
    body = world.batch(1, host="h1", **REQUIRED)
    made = creation.create(body, Ask("someone"))
    assert isinstance(made, NewOperation)
    (host,) = [host for host in fleet.current().hosts if host.vms]
    assert host.name == "h1"
    assert exposed(fleet.current(), Level.HOST) == ()


def test_a_vm_that_n_plus_one_alone_refuses_is_told_what_helps(world: Any, creation: Creation) -> None:
    """Three hosts of two such VMs each: a fifth would take the room that the loss of a host needs."""
    creation.create(world.batch(4, flavor="half", **REQUIRED), Ask("someone"))
    with pytest.raises(PpecError) as refused:
        creation.create(world.batch(1, flavor="half", cluster="c1", **REQUIRED), Ask("someone"))
    assert refused.value.code == "placement.no_capacity"
    sentences = [change["sentence"] for change in refused.value.details["changes"]]
    assert sentences[0] == "do without N+1"
    assert "look in every cluster" not in sentences
    assert "Cheapest change: do without N+1." in refused.value.hint


def test_a_create_tells_what_the_plan_warned_of(world: Any, api: TestClient) -> None:
    """At once and for good; also one that carries out a plan that was shown. Without a warning nobody is told."""
    body = {"image": "debian", "flavor": "half", "count": 2, "n_plus_one": {"mode": "warn"}}
    fill = api.post("/v1/vms", json=body | {"name": "first", "count": 3})
    assert (fill.status_code, fill.json()["exposed"]) == (202, [])
    shown = api.post("/v1/plans", json=body | {"name": "planned"}).json()
    assert shown["exposed"]
    executed = api.post(f"/v1/plans/{shown['plan_id']}/execute")
    assert (executed.status_code, executed.json()["exposed"]) == (202, shown["exposed"])
    made = api.post("/v1/vms", json=body | {"name": "last", "count": 1})
    assert made.status_code == 202, made.text
    assert {each["domain"] for each in made.json()["exposed"]} == {"h1", "h2", "h3"}
    for accepted in (executed, made):
        kept = world.ended(accepted.json()["operation_id"])
        assert [each.model_dump() for each in kept.exposed] == accepted.json()["exposed"]
        assert api.get(f"/v1/operations/{kept.operation_id}").json()["exposed"] == accepted.json()["exposed"]
