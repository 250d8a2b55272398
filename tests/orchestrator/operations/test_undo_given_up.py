# SPDX-License-Identifier: Apache-2.0
"""An undo that can't be carried out by a fault of ours is given up, and nothing it leaves behind is forgotten."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import select, update

from ppec_contract.api_operations import ItemState, OperationState
from ppec_contract.api_vms import VmAction, VmRecord, VmsAction
from ppec_orchestrator.dispatch.simulated import Fault
from ppec_orchestrator.store import tables

QUICK = {"attempts": 1, "undo_retry_s": 0.01, "poll_s": 0.02, "cleanup_retry_s": 0.1}


def made_but_not_told(action: str, host: str, vm: UUID) -> Fault | None:
    """Creates succeed on the hosts and are told to have failed; asking for a delete meets a fault of ours."""
    if action == "DeleteVms":
        raise ZeroDivisionError("a fault of ours")
    return Fault.of("hypervisor.failed", done=True)


def delete_all(world: Any, replica: Any, view: Any) -> None:
    asked = VmsAction(action=VmAction.DELETE, vms=tuple(item.name for item in view.items))
    gone = world.ended(replica.act(asked, world.ask).operation_id)
    assert gone.state is OperationState.SUCCEEDED, (gone.problem, gone.items)


def test_what_is_left_on_hosts_stays_in_the_record_until_it_is_deleted(world: Any) -> None:
    world.settings(**QUICK)
    world.fleet.faults = made_but_not_told
    replica = world.replica()
    view = world.ended(replica.create(world.batch(3), world.ask).operation_id)
    assert (view.state, view.problem.code) == (OperationState.FAILED, "hypervisor.failed")
    assert view.problem.details["given_up"] == "create"
    assert "ppec vm list" in view.problem.hint
    assert [(step.name, step.state) for step in view.steps] == [("reserve", "done"), ("create", "failed")]
    assert view.steps[1].detail.startswith("undo given up")
    assert view.counters["undo_retries"] == 5
    assert {item.state for item in view.items} == {ItemState.FAILED}
    assert len(world.fleet.everywhere()) == 3, "they are there"
    for item in view.items:
        shown = world.vm(item.name)
        assert (shown.record, shown.host, len(shown.addresses)) == (VmRecord.ACTIVE, item.host, 1)
    world.assert_consistent()
    world.fleet.faults = lambda action, host, vm: None
    delete_all(world, replica, view)
    world.assert_empty()


def test_fault_that_goes_away_in_time_leaves_nothing(world: Any) -> None:
    world.settings(**QUICK)
    failures = []

    def faults(action: str, host: str, vm: UUID) -> Fault | None:
        if action == "DeleteVms" and len(failures) < 4:
            failures.append(host)
        elif action == "DeleteVms":
            return None
        return made_but_not_told(action, host, vm)

    world.fleet.faults = faults
    view = world.ended(world.replica().create(world.batch(3), world.ask).operation_id)
    assert (view.state, view.counters["undo_retries"]) == (OperationState.FAILED, 4)
    assert "given_up" not in view.problem.details
    world.assert_empty()


def test_writes_of_an_undo_that_fail_are_given_up_like_the_rest(world: Any) -> None:
    """The record is damaged: giving room back would make a sum negative, which the database refuses."""
    world.settings(**QUICK)
    world.fleet.faults = lambda action, host, vm: Fault.of("hypervisor.failed") if action == "CreateVms" else None
    world.dispatcher.gate.clear()
    replica = world.replica()
    accepted = replica.create(world.batch(3), world.ask)
    world.wait_until(lambda: world.dispatcher.started, "the run has started")
    with world.database.write() as conn:
        sums = dict(conn.execute(select(tables.host_cell.c.host_id, tables.host_cell.c.cores_used)).all())
        conn.execute(update(tables.host_cell).values(cores_used=0))
    world.dispatcher.gate.set()
    view = world.ended(accepted.operation_id)
    assert view.problem.details["given_up"] == "reserve"
    assert [step.state for step in view.steps] == ["failed", "undone"]
    assert world.fleet.everywhere() == []
    assert {world.vm(item.name).record for item in view.items} == {VmRecord.ACTIVE}
    with world.database.write() as conn:
        for host_id, cores in sums.items():
            conn.execute(update(tables.host_cell).where(tables.host_cell.c.host_id == host_id).values(cores_used=cores))
    delete_all(world, replica, view)
    world.assert_empty()


def test_delete_whose_undo_is_given_up_can_be_asked_for_again(world: Any) -> None:
    world.settings(**QUICK)
    replica = world.replica()
    made = world.ended(replica.create(world.batch(2), world.ask).operation_id)
    world.dispatcher.gate.clear()
    asked = VmsAction(action=VmAction.DELETE, vms=tuple(item.name for item in made.items))
    gone = replica.act(asked, world.ask)
    world.wait_until(lambda: len(world.dispatcher.started) == 2, "the run has started")
    with world.database.write() as conn:
        # Not what the record should hold: reading the items fails from now on.
        damaged = tables.operation_item.c.operation_id == gone.operation_id
        conn.execute(update(tables.operation_item).where(damaged).values(excluded_hosts=5))
    replica.cancel(gone.operation_id)
    view = world.ended(gone.operation_id)
    world.dispatcher.gate.set()
    assert (view.state, view.problem.details["given_up"]) == (OperationState.FAILED, "mark")
    assert {world.vm(item.name).record for item in made.items} == {VmRecord.ACTIVE}
    delete_all(world, replica, made)
    world.assert_empty()


@pytest.mark.slow
def test_clean_up_is_never_given_up(world: Any) -> None:
    """Nothing else remembers the addresses it keeps."""
    # It rests until it is cancelled: what is damaged before is met by its undo alone.
    world.settings(**QUICK | {"cleanup_retry_s": 600.0})

    def unreachable(action: str, host: str, vm: UUID) -> Fault:
        return Fault.of("host.unreachable", whole_host=True)

    world.fleet.faults = unreachable
    replica = world.replica()
    world.ended(replica.create(world.batch(1), world.ask).operation_id)
    (found,) = replica.page(world.slice(), world.operations_of_kind("vm.cleanup")).items
    with world.database.write() as conn:
        damaged = tables.operation_item.c.operation_id == found.operation_id
        conn.execute(update(tables.operation_item).where(damaged).values(excluded_hosts=5))
    replica.cancel(found.operation_id)
    world.wait_until(
        lambda: world.show(found.operation_id).counters.get("undo_retries", 0) > 6,
        "it was tried more often than others",
    )
    assert not world.show(found.operation_id).state.ended
    with world.database.write() as conn:
        conn.execute(update(tables.operation_item).where(damaged).values(excluded_hosts=[]))
    assert world.ended(found.operation_id).state is OperationState.CANCELLED
    world.assert_empty()
