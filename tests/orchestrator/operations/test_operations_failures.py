# SPDX-License-Identifier: Apache-2.0
"""Batches of which something fails, a VM, a host, a run or an answer: what is tried again, and that nothing is left."""

from __future__ import annotations

import errno
import threading
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest
from batches import create, states
from sqlalchemy import select

from ppec_contract.api_operations import ItemState, OperationState
from ppec_contract.api_placement import Policy
from ppec_contract.api_vms import BatchMode
from ppec_contract.run import RunEvent
from ppec_contract.vm import VmInfo, VmState
from ppec_orchestrator.dispatch.port import HostTarget, RunRequest
from ppec_orchestrator.dispatch.simulated import Fault, SimulatedDispatcher, SimulatedFleet, SimulatedRun
from ppec_orchestrator.operations.leftovers import CLEANUP_STEPS
from ppec_orchestrator.store import operations as store
from ppec_orchestrator.store.operations import CLEANUP, NewItem, NewOperation
from ppec_orchestrator.store.tables import address


@pytest.mark.parametrize(
    "code", ["host.unreachable", "hypervisor.failed", "disk.full", "vm.start_failed", "agent.busy"]
)
@pytest.mark.parametrize("whole_host", [True, False])
def test_vm_that_fails_on_one_host_is_made_on_another(world: Any, code: str, whole_host: bool) -> None:
    fault = Fault.of(code, whole_host=whole_host)
    world.fleet.faults = lambda action, host, vm: fault if (action, host) == ("CreateVms", "h1") else None
    view = create(world, world.replica(), 6, policy=Policy.SPREAD)
    assert view.state is OperationState.SUCCEEDED
    assert "h1" not in {item.host for item in view.items}
    assert max(item.attempt for item in view.items) == 2
    assert view.counters["planning_passes"] == 2
    world.assert_consistent()


def test_hosts_that_fail_one_vm_each_still_take_each_others(world: Any) -> None:
    fault = Fault.of("hypervisor.failed")
    seen: set[Any] = set()
    failed_on: set[str] = set()

    def first_vm_of_each_host(action: Any, host: str, vm: Any) -> Fault | None:
        if action != "CreateVms" or vm in seen:
            return None
        seen.add(vm)
        if host in failed_on:
            return None
        failed_on.add(host)
        return fault

    world.fleet.faults = first_vm_of_each_host
    view = create(world, world.replica(), 9, policy=Policy.SPREAD)
    assert len(failed_on) == 3
    assert view.state is OperationState.SUCCEEDED
    assert sorted(item.attempt for item in view.items) == [1] * 6 + [2] * 3
    world.assert_consistent()


def test_fault_of_the_request_is_not_tried_elsewhere(world: Any) -> None:
    fault = Fault.of("request.invalid")
    world.fleet.faults = lambda action, host, vm: fault if action == "CreateVms" else None
    view = create(world, world.replica(), 2)
    assert view.state is OperationState.FAILED
    assert {item.attempt for item in view.items} == {1}
    world.assert_empty()


def test_all_or_nothing_that_fails_for_good_leaves_nothing(world: Any) -> None:
    fault = Fault.of("hypervisor.failed")
    world.fleet.faults = lambda action, host, vm: fault if action == "CreateVms" and vm == doomed[0] else None
    doomed: list[Any] = []
    replica = world.replica(start=False)
    accepted = replica.create(world.batch(4, policy=Policy.SPREAD), world.ask)
    doomed.append(accepted.items[2].vm_id)
    world.replica()
    view = world.ended(accepted.operation_id)
    assert view.state is OperationState.FAILED
    assert view.problem is not None
    assert view.problem.code == "hypervisor.failed"
    assert states(view) == [ItemState.UNDONE, ItemState.UNDONE, ItemState.FAILED, ItemState.UNDONE]
    assert [step.state for step in view.steps] == ["undone", "undone"]
    world.assert_empty()


def test_best_effort_gives_up_only_what_fails_for_good(world: Any) -> None:
    doomed: list[Any] = []
    fault = Fault.of("vm.start_failed")
    world.fleet.faults = lambda action, host, vm: fault if action == "CreateVms" and vm in doomed else None
    accepted = world.replica(start=False).create(world.batch(4, mode=BatchMode.BEST_EFFORT), world.ask)
    doomed.append(accepted.items[1].vm_id)
    world.replica()
    view = world.ended(accepted.operation_id)
    assert view.state is OperationState.PARTIAL
    assert states(view) == [ItemState.SUCCEEDED, ItemState.FAILED, ItemState.SUCCEEDED, ItemState.SUCCEEDED]
    assert view.items[1].attempt == 3
    assert view.items[1].problem is not None
    world.assert_consistent()


def test_best_effort_ends_well_when_no_other_host_is_left(world: Any) -> None:
    fault = Fault.of("hypervisor.failed")
    world.fleet.faults = lambda action, host, vm: fault if action == "CreateVms" else None
    view = create(world, world.replica(), 3, policy=Policy.SPREAD, mode=BatchMode.BEST_EFFORT)
    assert view.state is OperationState.FAILED
    assert states(view) == [ItemState.FAILED] * 3
    assert view.problem is not None
    assert view.problem.code == "hypervisor.failed"
    world.assert_consistent()


class FullDisk(SimulatedDispatcher):
    """One whose state directory has no room for a run's files."""

    full = True

    def start(self, request: RunRequest) -> SimulatedRun:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().start(request)


def test_runs_that_can_not_be_started_are_said_and_nothing_is_given_away(world: Any) -> None:
    world.settings(cleanup_retry_s=0.1, cleanup_retry_longest_s=0.2)
    dispatcher = FullDisk(world.fleet)
    view = create(world, world.replica(dispatcher=dispatcher), 2)
    assert (view.state, view.problem.code) == (OperationState.FAILED, "disk.full")
    assert "No space left" in view.problem.detail
    with world.database.read() as conn:
        held = conn.execute(select(address.c.vm_id).where(address.c.vm_id.is_not(None))).all()
    assert held, "who knows what is on the hosts"
    dispatcher.full = False
    world.wait_cleaned()
    world.assert_empty()


def test_lost_run_is_repeated_and_nothing_is_doubled(world: Any) -> None:
    replica = world.replica()
    world.dispatcher.gate.clear()
    accepted = replica.create(world.batch(4), world.ask)
    world.wait_until(lambda: world.dispatcher.started, "the run has started")
    world.dispatcher.lose(accepted.operation_id)
    world.dispatcher.gate.set()
    view = world.ended(accepted.operation_id)
    assert view.state is OperationState.SUCCEEDED
    assert view.counters["runs"] == 2
    world.assert_consistent()


class LyingFleet(SimulatedFleet):
    """One whose h1 passes what it has off as another VM."""

    victim = uuid4()

    def call(self, request: RunRequest, host: str, target: HostTarget) -> list[RunEvent]:
        return [
            event.model_copy(update={"result": event.result.model_copy(update={"vm": self._lie(event.result.vm)})})
            if host == "h1" and event.result and event.result.vm
            else event
            for event in super().call(request, host, target)
        ]

    def _lie(self, vm: VmInfo) -> VmInfo:
        return vm.model_copy(update={"vm_id": self.victim, "state": VmState.CRASHED})


def test_host_says_nothing_of_vms_it_was_not_asked_for(world: Any) -> None:
    fleet = LyingFleet()
    replica = world.replica(dispatcher=SimulatedDispatcher(fleet))
    victim = create(world, replica, 1, host="h2").items[0]
    fleet.victim = victim.vm_id
    view = create(world, replica, 3, policy=Policy.SPREAD)
    assert world.vm(victim.name).observed is not VmState.CRASHED
    assert "h1" not in {item.host for item in view.items}
    assert fleet.vms["h1"] == {}, "what a host lies about is removed there"


def test_reply_lost_after_the_deed_leaves_no_second_copy(world: Any) -> None:
    """The host made the VM and its answer got lost: the VM is removed there before it is made elsewhere."""
    fault = Fault.of("host.unreachable", whole_host=True, done=True)
    world.fleet.faults = lambda action, host, vm: fault if (action, host) == ("CreateVms", "h1") else None
    view = create(world, world.replica(), 3, policy=Policy.SPREAD)
    assert view.state is OperationState.SUCCEEDED
    assert world.fleet.vms["h1"] == {}
    world.assert_consistent()


def test_host_that_stays_away_is_cleaned_when_it_is_back(world: Any) -> None:
    away = Fault.of("host.unreachable", whole_host=True, done=True)
    gone = Fault.of("host.unreachable", whole_host=True)
    back = threading.Event()
    faults = {"CreateVms": away, "DeleteVms": gone}
    world.fleet.faults = lambda action, host, vm: faults[action] if host == "h1" and not back.is_set() else None
    world.settings(cleanup_retry_s=0.2)
    replica = world.replica()
    view = create(world, replica, 3, policy=Policy.SPREAD)
    assert view.state is OperationState.SUCCEEDED
    stranded = list(world.fleet.vms["h1"])
    assert len(stranded) == 1, "its copy is still there"
    moved = next(item for item in view.items if item.vm_id == stranded[0])
    assert world.fleet.vms["h1"][moved.vm_id].macs == world.fleet.vms[moved.host][moved.vm_id].macs
    with world.database.read() as conn:
        held = conn.execute(select(address.c.vm_id).where(address.c.vm_id.is_not(None))).scalars().all()
    assert len(held) == len(set(held)) == 4, "the copy that may run keeps its address, so the moved VM has another"
    back.set()
    world.wait_until(lambda: not world.fleet.vms["h1"], "the copy is removed")
    listed = replica.page(world.slice(), world.operations_of_kind("vm.cleanup")).items
    assert len(listed) == 1
    assert world.ended(listed[0].operation_id).state is OperationState.SUCCEEDED
    world.assert_consistent()


def test_clean_up_of_a_host_that_is_away_for_weeks_is_tried_on(world: Any) -> None:
    world.fleet.faults = lambda action, host, vm: Fault.of("host.unreachable", whole_host=True)
    world.settings(cleanup_retry_s=0.01, cleanup_retry_longest_s=0.02)
    tried = 5000
    new = NewOperation(
        "op-clean", CLEANUP, "tester", datetime.now(UTC), {}, CLEANUP_STEPS, [NewItem(uuid4(), "vm", "h1")],
        done=1, counters={"retries": tried},
    )  # fmt: skip
    with world.database.write() as conn:
        store.enqueue(conn, [new])
    world.replica()
    world.wait_until(lambda: world.show("op-clean").counters["retries"] > tried + 1, "it is tried again and again")
    assert not world.show("op-clean").state.ended
