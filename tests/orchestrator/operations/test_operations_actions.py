# SPDX-License-Identifier: Apache-2.0
"""Actions on VMs that exist: deletes, power and freezes, of which one at a time changes a VM."""

from __future__ import annotations

from typing import Any

import pytest
from batches import create

from ppec_contract.api_operations import ItemState, OperationState, OperationView
from ppec_contract.api_placement import Policy
from ppec_contract.api_vms import VmAction, VmsAction
from ppec_contract.errors import PpecError
from ppec_orchestrator.dispatch.simulated import Fault


def test_delete_gives_everything_back(world: Any) -> None:
    replica = world.replica()
    view = create(world, replica, 5)
    names = tuple(item.name for item in view.items)
    deleted = replica.act(VmsAction(action=VmAction.DELETE, vms=names), world.ask)
    ended = world.ended(deleted.operation_id)
    assert ended.state is OperationState.SUCCEEDED
    assert ended.counters["runs"] == 1
    world.assert_empty()


def test_delete_that_fails_can_be_asked_for_again(world: Any) -> None:
    replica = world.replica()
    view = create(world, replica, 3, policy=Policy.SPREAD)
    names = tuple(item.name for item in view.items)
    fault = Fault.of("host.unreachable", whole_host=True)
    world.fleet.faults = lambda action, host, vm: fault if host == "h2" else None
    ended = world.ended(replica.act(VmsAction(action=VmAction.DELETE, vms=names), world.ask).operation_id)
    assert ended.state is OperationState.PARTIAL
    world.assert_consistent()
    world.fleet.faults = lambda action, host, vm: None
    left = tuple(item.name for item in ended.items if item.state is ItemState.FAILED)
    assert len(left) == 1
    again = world.ended(replica.act(VmsAction(action=VmAction.DELETE, vms=left), world.ask).operation_id)
    assert again.state is OperationState.SUCCEEDED
    world.assert_empty()


def test_vm_being_deleted_names_the_operation_that_deletes_it(world: Any) -> None:
    replica = world.replica()
    name = create(world, replica, 1).items[0].name
    world.dispatcher.gate.clear()
    gone = replica.act(VmsAction(action=VmAction.DELETE, vms=(name,)), world.ask)
    assert world.vm(name).operation_id == gone.operation_id
    world.dispatcher.gate.set()
    world.ended(gone.operation_id)


def test_failed_vm_is_history_that_can_be_deleted(world: Any) -> None:
    fault = Fault.of("request.invalid")
    world.fleet.faults = lambda action, host, vm: fault if action == "CreateVms" else None
    replica = world.replica()
    name = create(world, replica, 1).items[0].name
    assert world.vm(name).record == "failed"
    ended = world.ended(replica.act(VmsAction(action=VmAction.DELETE, vms=(name,)), world.ask).operation_id)
    assert ended.state is OperationState.SUCCEEDED
    assert "runs" not in ended.counters
    with pytest.raises(PpecError) as gone:
        world.vm(name)
    assert gone.value.code == "vm.not_found"


def test_power_is_recorded(world: Any) -> None:
    replica = world.replica()
    name = create(world, replica, 1).items[0].name
    for action, state in (
        (VmAction.STOP, "stopped"),
        (VmAction.START, "running"),
        (VmAction.PAUSE, "paused"),
        (VmAction.RESUME, "running"),
        (VmAction.REBOOT, "running"),
        (VmAction.RESET, "running"),
    ):
        ended = world.ended(replica.act(VmsAction(action=action, vms=(name,)), world.ask).operation_id)
        assert ended.state is OperationState.SUCCEEDED
        assert (ended.kind, [step.name for step in ended.steps]) == (f"vm.{action}", ["accept", action])
        assert world.vm(name).observed == state
    done = ["CreateVms", "StopVms", "StartVms", "PauseVms", "ResumeVms", "RebootVms", "ResetVms"]
    assert [action for action, _, _ in world.fleet.deeds] == done


def test_vm_in_the_wrong_power_state_says_so(world: Any) -> None:
    replica = world.replica()
    name = create(world, replica, 1).items[0].name
    world.ended(replica.act(VmsAction(action=VmAction.STOP, vms=(name,)), world.ask).operation_id)
    for action in (VmAction.REBOOT, VmAction.RESET, VmAction.PAUSE, VmAction.RESUME):
        ended = world.ended(replica.act(VmsAction(action=action, vms=(name,)), world.ask).operation_id)
        assert (ended.state, ended.problem.code) == (OperationState.FAILED, "vm.wrong_state")
        assert world.vm(name).observed == "stopped"


def test_only_guests_that_are_asked_are_told_how_long(world: Any) -> None:
    replica = world.replica()
    name = create(world, replica, 1).items[0].name
    asked = {"timeout_s": 7.0, "force": True}
    for action in (VmAction.REBOOT, VmAction.STOP, VmAction.START, VmAction.PAUSE, VmAction.RESUME, VmAction.RESET):
        world.ended(replica.act(VmsAction(action=action, vms=(name,), **asked), world.ask).operation_id)
        request = world.dispatcher.started[-1]
        (target,) = request.hosts.values()
        told = {key: value for key, value in target.parameters.items() if key != "vm_ids"}
        assert told == (asked if action in (VmAction.REBOOT, VmAction.STOP) else {}), action


def test_stop_waits_for_guests_over_the_time_hosts_have(world: Any) -> None:
    replica = world.replica()
    names = tuple(item.name for item in create(world, replica, 2).items)
    world.ended(replica.act(VmsAction(action=VmAction.STOP, vms=names, timeout_s=600), world.ask).operation_id)
    assert [request.timeout_s for request in world.dispatcher.started] == [600.0, 1200.0]


def test_a_freeze_is_an_operation_with_an_end_of_its_own(world: Any) -> None:
    replica = world.replica()
    vm = create(world, replica, 1).items[0]

    def act(action: VmAction, **more: Any) -> OperationView:
        asked = VmsAction(action=action, vms=(vm.name,), **more)
        ended = world.ended(replica.act(asked, world.ask).operation_id)
        assert (ended.kind, [step.name for step in ended.steps]) == (f"vm.{action}", ["accept", action])
        return ended

    for _ in range(2):
        assert act(VmAction.FREEZE, thaw_after_s=9.0, timeout_s=1.0, force=True).state is OperationState.SUCCEEDED
    assert world.fleet.frozen == {vm.vm_id}
    (target,) = world.dispatcher.started[-1].hosts.values()
    assert target.parameters == {"vm_ids": [str(vm.vm_id)], "thaw_after_s": 9.0}
    for _ in range(2):
        assert act(VmAction.THAW, thaw_after_s=9.0).state is OperationState.SUCCEEDED
    (target,) = world.dispatcher.started[-1].hosts.values()
    assert target.parameters == {"vm_ids": [str(vm.vm_id)]}
    assert world.fleet.frozen == set()
    assert [action for action, _, _ in world.fleet.deeds] == ["CreateVms", "FreezeVms", "ThawVms"]
    assert world.vm(vm.name).observed == "running"

    act(VmAction.STOP)
    refused = act(VmAction.FREEZE)
    assert (refused.state, refused.problem and refused.problem.code) == (OperationState.FAILED, "vm.wrong_state")


def test_one_operation_at_a_time_changes_a_vm(world: Any) -> None:
    replica = world.replica()
    name = create(world, replica, 1).items[0].name
    world.dispatcher.gate.clear()
    stop = replica.act(VmsAction(action=VmAction.STOP, vms=(name,)), world.ask)
    with pytest.raises(PpecError) as refused:
        replica.act(VmsAction(action=VmAction.DELETE, vms=(name,)), world.ask)
    assert refused.value.code == "vm.wrong_state"
    assert stop.operation_id in refused.value.message
    world.dispatcher.gate.set()
    world.ended(stop.operation_id)
