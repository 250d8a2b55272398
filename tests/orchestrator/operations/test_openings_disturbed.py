# SPDX-License-Identifier: Apache-2.0
"""What may happen between the plan of a create with moves and the moves: neither the room of a moved VM nor the VM
itself is held meanwhile. Each ends in a VM that is made or in a clear refusal; nothing is leaked or there twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from cells_opened import assert_exact, split_host, wide
from sqlalchemy import select

from ppec_contract.api_operations import ItemState, OperationState
from ppec_contract.api_placement import Policy, VmSize
from ppec_contract.api_vms import VmAction, VmResize, VmsAction, VmsCreate
from ppec_contract.errors import PpecError
from ppec_orchestrator.store import tables

# Done by somebody else meanwhile, on a replica.
Deed = Callable[[Any, Any], Any]


@pytest.fixture
def split(world: Any) -> Any:
    """Its hosts have no more cores than the record says."""
    made = split_host(world)
    made.fleet.cell_cores = 8
    return made


def disturbed(world: Any, deed: Deed, before: str) -> Any:
    """How `wide` ends, if that is done before its first run of this action is sent to the host."""
    with world.running(name="creator") as replica:
        start, own, done = world.dispatcher.start, [], []

        def started(request: Any) -> Any:
            own.append(request.operation_id)
            if request.operation_id == own[0] and request.action == before and not done:
                done.append(before)
                deed(world, replica)
            return start(request)

        world.dispatcher.start = started
        view = world.ended(replica.create(wide(), world.ask).operation_id)
        world.dispatcher.start = start
        world.wait_cleaned()
    assert done == [before]
    return view


def act(world: Any, replica: Any, action: VmAction, name: str = "right") -> None:
    view = world.ended(replica.act(VmsAction(action=action, vms=(name,)), world.ask).operation_id)
    assert view.state is OperationState.SUCCEEDED


def takes_the_room() -> VmsCreate:
    """What `right` would have in the first cell."""
    size = VmSize(vcpus=8, memory_mib=1024, disk_mib=8192)
    return VmsCreate(image="debian", name="takes", size=size, policy=Policy.PACK, host="h1")


def the_room_is_taken(world: Any, replica: Any) -> None:
    assert world.ended(replica.create(takes_the_room(), world.ask).operation_id).state is OperationState.SUCCEEDED


def it_is_deleted(world: Any, replica: Any) -> None:
    act(world, replica, VmAction.DELETE)


def it_is_stopped(world: Any, replica: Any) -> None:
    act(world, replica, VmAction.STOP)


def it_shrinks(world: Any, replica: Any) -> None:
    """For good at its next start."""
    view = world.ended(replica.resize("right", VmResize(vcpus=2), world.ask).operation_id)
    assert view.state is OperationState.SUCCEEDED


def its_stopped_self_shrinks(world: Any, replica: Any) -> None:
    it_is_stopped(world, replica)
    it_shrinks(world, replica)


def it_may_not_grow(world: Any, replica: Any) -> None:
    """The new VM's room is in the cell where it still is."""
    with pytest.raises(PpecError) as refused:
        replica.resize("right", VmResize(vcpus=8), world.ask)
    assert refused.value.code == "host.no_capacity"


def nobody_is_let_in(world: Any, replica: Any) -> None:
    with pytest.raises(PpecError) as refused:
        replica.create(takes_the_room(), world.ask)
    assert refused.value.code == "placement.no_capacity"


def it_grows(world: Any, replica: Any) -> None:
    """In its new cell, where it has room."""
    view = world.ended(replica.resize("right", VmResize(vcpus=8), world.ask).operation_id)
    assert view.state is OperationState.SUCCEEDED


def assert_sound(world: Any) -> None:
    assert_exact(world)
    world.assert_consistent()
    made = [vm for action, _, vm in world.fleet.deeds if action == "CreateVms"]
    assert len(made) == len(set(made)), "nothing was made twice"


@pytest.mark.parametrize(
    ("before", "deed"),
    [
        *(("PlanRetune", deed) for deed in (it_is_deleted, it_is_stopped, it_shrinks, it_may_not_grow)),
        *(("RetuneHost", deed) for deed in (it_is_deleted, it_is_stopped, it_shrinks, it_may_not_grow)),
        *(("CreateVms", deed) for deed in (it_is_deleted, it_is_stopped, it_shrinks, it_grows, nobody_is_let_in)),
        *((before, its_stopped_self_shrinks) for before in ("PlanRetune", "RetuneHost", "CreateVms")),
    ],
)
def test_the_vm_is_made_whatever_becomes_of_the_one_that_moves(split: Any, before: str, deed: Deed) -> None:
    view = disturbed(split, deed, before)
    assert view.state is OperationState.SUCCEEDED, view.items
    assert (split.vm("wide").host, split.vm("wide").cells) == ("h1", (1,))
    assert_sound(split)


@pytest.mark.parametrize("before", ["PlanRetune", "RetuneHost"])
def test_room_that_is_taken_refuses_the_vm_for_the_hosts_reason(split: Any, before: str) -> None:
    """The other one is there; a host is asked for another plan, and has none."""
    view = disturbed(split, the_room_is_taken, before)
    (item,) = view.items
    assert (item.state, item.problem.code) == (ItemState.FAILED, "retune.not_possible")
    assert split.vm("takes").cells == (0,)
    assert_sound(split)


def test_who_is_let_in_while_the_host_moves_is_refused_by_the_host(split: Any) -> None:
    """The record does not know of the move yet. What the host has no room for is tried elsewhere, or fails."""
    accepted: list[str] = []
    with split.running(name="creator") as replica:

        def meanwhile(action: str, host: str, vm_id: Any) -> None:
            if action == "RetuneHost" and not accepted:
                accepted.append(replica.create(takes_the_room(), split.ask).operation_id)

        split.fleet.faults = meanwhile
        view = split.ended(replica.create(wide(), split.ask).operation_id)
        other = split.ended(accepted[0])
        split.wait_cleaned()
    assert view.state is OperationState.SUCCEEDED, view.items
    assert (other.state, other.items[0].problem.code) == (OperationState.FAILED, "host.no_capacity")
    assert_sound(split)


@pytest.mark.parametrize("before", ["PlanRetune", "RetuneHost"])
def test_cancelled_it_leaves_nothing_but_a_vm_in_another_cell(split: Any, before: str) -> None:
    def cancelled(world: Any, replica: Any) -> None:
        with world.database.read() as conn:
            mine = select(tables.operation.c.id).where(tables.operation.c.state == OperationState.RUNNING.value)
            replica.cancel(conn.execute(mine).scalar_one())

    view = disturbed(split, cancelled, before)
    assert view.state is OperationState.CANCELLED
    assert_sound(split)
