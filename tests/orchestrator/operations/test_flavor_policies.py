# SPDX-License-Identifier: Apache-2.0
"""A flavor's policy and maxima, from the flavor to the spec that a host is sent, and back to nothing."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import insert, select, update

from ppec_contract.api_operations import OperationState
from ppec_contract.api_placement import Policy
from ppec_contract.api_vms import VmAction, VmsAction
from ppec_contract.errors import PpecError
from ppec_contract.run import RunEvent
from ppec_contract.vm import NumaPolicy, SmtPolicy, VmSpec
from ppec_orchestrator.dispatch.port import HostTarget, RunRequest
from ppec_orchestrator.dispatch.simulated import SimulatedDispatcher, SimulatedFleet
from ppec_orchestrator.store import tables
from ppec_orchestrator.store.cells import used_column

# All that hosts understood before there were policies.
FIRST_FIELDS = {
    "vm_id", "name", "vcpus", "memory_mib", "cells", "root_disk", "nics", "user_data", "tags",
}  # fmt: skip
KNOWS = {"capabilities": ["vm-lifecycle", "vm-policies"]}


class ListeningFleet(SimulatedFleet):
    """Keeps what it was sent."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[tuple[str, dict[str, Any]]] = []

    def call(self, request: RunRequest, host: str, target: HostTarget) -> list[RunEvent]:
        self.heard += [(host, spec) for spec in target.parameters.get("vms", ())]
        return super().call(request, host, target)


def add_flavor(world: Any, **values: Any) -> None:
    with world.database.write() as conn:
        size = {"name": "special", "vcpus": 4, "memory_mib": 1024, "disk_mib": 8192}
        conn.execute(insert(tables.flavor).values(size | values))


def know(world: Any, *hosts: str) -> None:
    with world.database.write() as conn:
        conn.execute(update(tables.host).where(tables.host.c.name.in_(hosts)).values(facts=KNOWS))


def create(world: Any, count: int = 1, **more: Any) -> tuple[ListeningFleet, Any]:
    fleet = ListeningFleet()
    replica = world.replica(dispatcher=SimulatedDispatcher(fleet))
    accepted = replica.create(world.batch(count, **more), world.ask)
    return fleet, world.ended(accepted.operation_id)


def test_an_ordinary_vm_is_told_in_words_that_the_first_agents_know(world: Any) -> None:
    fleet, view = create(world, 3)
    assert view.state is OperationState.SUCCEEDED
    assert [set(spec) for _, spec in fleet.heard] == [FIRST_FIELDS] * 3


@pytest.mark.parametrize(
    ("flavor", "wanted"),
    [
        ({"max_vcpus": 8}, {"max_vcpus": 8}),
        ({"max_memory_mib": 2048}, {"max_memory_mib": 2048}),
        ({"numa": {"smt": "isolate"}}, {"numa": NumaPolicy(smt=SmtPolicy.ISOLATE)}),
        ({"numa": {"multi_cell": True}}, {"numa": NumaPolicy(multi_cell=True)}),
    ],
)
def test_what_the_flavor_says_reaches_a_host_that_knows_it(
    world: Any, flavor: dict[str, Any], wanted: dict[str, Any]
) -> None:
    add_flavor(world, **flavor)
    know(world, "h2")
    fleet, view = create(world, 1, flavor="special")
    assert view.state is OperationState.SUCCEEDED
    ((host, sent),) = fleet.heard
    spec = VmSpec.model_validate(sent)
    assert (host, {name: getattr(spec, name) for name in wanted}) == ("h2", wanted)
    assert set(sent) == FIRST_FIELDS | set(flavor)


def test_hosts_that_do_not_know_policies_are_counted(world: Any) -> None:
    add_flavor(world, max_vcpus=8)
    know(world, "h2")
    with pytest.raises(PpecError) as refused:
        world.replica(start=False).create(world.batch(5, flavor="special", host="h1"), world.ask)
    assert refused.value.details["reasons"] == {"agent-too-old": 1, "outside-scope": 2}
    world.assert_empty()


def test_a_flavor_that_is_gone_leaves_its_vms_as_they_were_asked_for(world: Any) -> None:
    """Even one that has to move: the policy is the VM's by then."""
    add_flavor(world, numa={"smt": "isolate"})
    know(world, "h1", "h2", "h3")
    replica = world.replica(start=False)
    accepted = replica.create(world.batch(2, flavor="special", policy=Policy.SPREAD), world.ask)
    with world.database.write() as conn:
        conn.execute(tables.flavor.delete().where(tables.flavor.c.name == "special"))
    fleet = ListeningFleet()
    working = world.replica(dispatcher=SimulatedDispatcher(fleet))
    assert world.ended(accepted.operation_id).state is OperationState.SUCCEEDED
    assert [spec["numa"]["smt"] for _, spec in fleet.heard] == ["isolate"] * 2
    with world.database.read() as conn:
        cores = conn.execute(select(tables.allocation_cell.c.cores)).scalars().all()
        names = conn.execute(select(tables.vm.c.name)).scalars().all()
    assert list(cores) == [4, 4]
    gone = working.act(VmsAction(vms=tuple(names), action=VmAction.DELETE), world.ask)
    world.ended(gone.operation_id)
    world.assert_empty()


def test_a_dedicated_vm_too_large_one_to_a_core_is_a_fault_of_the_request(world: Any) -> None:
    add_flavor(world, vcpus=16, numa={"smt": "isolate"})
    know(world, "h1", "h2", "h3")
    with world.database.write() as conn:
        conn.execute(update(tables.host_cell).values(cores=8))
    with pytest.raises(PpecError) as refused:
        world.replica(start=False).create(world.batch(1, flavor="special"), world.ask)
    assert refused.value.code == "vm.exceeds_socket"
    assert "has 8 usable cores" in refused.value.message


def test_shared_vms_take_no_cores_and_give_their_vcpus_back(world: Any) -> None:
    add_flavor(world, numa={"cpus": "shared"})
    know(world, "h1", "h2", "h3")
    with world.database.write() as conn:
        conn.execute(update(tables.host_cell).values(shared_cpus=4, shared_vcpus=8))
    _, view = create(world, 6, flavor="special", policy=Policy.PACK)
    assert view.state is OperationState.SUCCEEDED
    used = {each: used_column(each) for each in ("cores", "shared_vcpus")}
    with world.database.read() as conn:
        rows = conn.execute(select(*used.values())).all()
    assert sorted(tuple(row) for row in rows) == [(0, 8)] * 3
    with pytest.raises(PpecError) as refused:
        world.replica(start=False).create(world.batch(1, flavor="special"), world.ask)
    assert refused.value.details["reasons"] == {"shared-vcpus": 3}
    names = tuple(item.name for item in view.items)
    world.ended(world.replicas[0].act(VmsAction(vms=names, action=VmAction.DELETE), world.ask).operation_id)
    with world.database.read() as conn:
        rows = conn.execute(select(*used.values())).all()
    assert [tuple(row) for row in rows] == [(0, 0)] * 3
