# SPDX-License-Identifier: Apache-2.0
"""N+1 on the fleet as it is stored: VMs that are asked for, and the same VMs once they are records."""

from __future__ import annotations

from typing import Any

import pytest

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
