# SPDX-License-Identifier: Apache-2.0
"""A VM that its host failed moves elsewhere by the same rules: what it leaves behind is neither its neighbour nor a
change that its new plan has to fear."""

from __future__ import annotations

from typing import Any

import pytest

from ppec_orchestrator.dispatch.simulated import Fault


def group(apart: bool, level: str) -> dict[str, Any]:
    return {"groups": [{"name": "g", "apart": apart, "level": level}]}


RULES: dict[str, dict[str, Any]] = {
    "none": {},
    "n+1": {"n_plus_one": {"mode": "required", "level": "host"}},
    "apart by host": group(True, "host"),
    "apart by rack": group(True, "rack"),
    "together on a host": group(False, "host"),
    "together in a rack": group(False, "rack"),
}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES.keys())
def test_a_failed_vm_moves_by_its_rules(world: Any, rules: dict[str, Any]) -> None:
    view = world.replica("accepting", start=False).create(world.batch(1, **rules), world.ask)
    first = view.items[0].host
    fault = Fault.of("host.no_capacity")
    world.fleet.faults = lambda action, host, vm: fault if host == first else None
    with world.running():
        ended = world.ended(view.operation_id)
    (item,) = ended.items
    assert ended.state == "succeeded", ended.problem
    assert (item.host != first, item.attempt) == (True, 2)
    # The plan made on accepting, and one for the move: its own release lost it no race.
    assert ended.counters["planning_passes"] == 2


def test_vms_apart_stay_so_when_one_moves(world: Any) -> None:
    """Of three hosts two have a VM of the group; the third is all that is left to the one that moves."""
    view = world.replica("accepting", start=False).create(world.batch(2, **group(True, "host")), world.ask)
    first = view.items[0].host
    fault = Fault.of("host.no_capacity")
    world.fleet.faults = lambda action, host, vm: fault if host == first else None
    with world.running():
        ended = world.ended(view.operation_id)
    assert ended.state == "succeeded", ended.problem
    hosts = [item.host for item in ended.items]
    assert len(set(hosts)) == 2
    assert first not in hosts
