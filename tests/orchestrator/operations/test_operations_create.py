# SPDX-License-Identifier: Apache-2.0
"""Creating batches: work counts, refusals, failures on hosts, and that nothing is ever left."""

from __future__ import annotations

import errno
import threading
from datetime import UTC, datetime
from ipaddress import ip_address, ip_network
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import select, update

from ppec_contract.api_operations import ItemState, OperationState, OperationView
from ppec_contract.api_placement import Policy
from ppec_contract.api_vms import BatchMode, VmAction, VmsAction
from ppec_contract.errors import PpecError
from ppec_contract.model import MAX_VMS_PER_CALL
from ppec_contract.run import RunEvent
from ppec_contract.vm import VmInfo, VmState
from ppec_orchestrator.dispatch.port import HostTarget, RunRequest
from ppec_orchestrator.dispatch.simulated import Fault, SimulatedDispatcher, SimulatedFleet, SimulatedRun
from ppec_orchestrator.ipdb.ranges import usable_range
from ppec_orchestrator.operations.leftovers import CLEANUP_STEPS
from ppec_orchestrator.store import ipdb
from ppec_orchestrator.store import operations as store
from ppec_orchestrator.store.operations import CLEANUP, NewItem, NewOperation
from ppec_orchestrator.store.tables import address, host, host_cell, prefix


def create(world: Any, replica: Any, count: int = 4, **more: Any) -> OperationView:
    accepted = replica.create(world.batch(count, **more), world.ask)
    ended: OperationView = world.ended(accepted.operation_id)
    return ended


def states(view: OperationView) -> list[ItemState]:
    return [item.state for item in view.items]


def test_clean_batch_does_no_more_work_than_it_must(world: Any) -> None:
    view = create(world, world.replica(), 6, policy=Policy.SPREAD)
    hosts = {item.host for item in view.items}
    assert view.state is OperationState.SUCCEEDED
    assert states(view) == [ItemState.SUCCEEDED] * 6
    assert len(hosts) == 3
    assert view.counters["runs"] == 1
    assert view.counters["host_tasks"] <= len(hosts) + 1
    assert view.counters["planning_passes"] == 1
    assert view.counters["commits"] <= 3 + len(hosts)
    assert view.counters["proxy_sessions"] <= len(hosts)
    assert [step.state for step in view.steps] == ["done", "done"]
    world.assert_consistent()


def test_counted_commits_are_the_databases_own(world: Any) -> None:
    """The counter is not a wish: the database's count of write transactions agrees, renewals left out."""
    world.settings(renewal_s=60)
    replica = world.replica()
    database = replica.engine._ports.database
    before = database.commits
    view = create(world, replica, 3)
    # The database counts a write just after it has been committed, and seen.
    world.wait_until(lambda: not replica.engine.running, "its thread has ended")
    assert database.commits - before == view.counters["commits"]


def test_refused_batch_says_why_and_leaves_nothing(world: Any) -> None:
    replica = world.replica(start=False)
    with pytest.raises(PpecError) as refused:
        replica.create(world.batch(7, flavor="half"), world.ask)
    assert refused.value.code == "placement.no_capacity"
    assert sum(refused.value.details["reasons"].values()) == 3
    assert refused.value.details["refused"] == 1
    world.assert_empty()


def test_best_effort_makes_what_fits_and_names_the_rest(world: Any) -> None:
    view = create(world, world.replica(), 8, flavor="half", mode=BatchMode.BEST_EFFORT)
    assert view.state is OperationState.PARTIAL
    assert states(view) == [ItemState.SUCCEEDED] * 6 + [ItemState.REFUSED] * 2
    assert all(item.problem and item.problem.code == "placement.no_capacity" for item in view.items[6:])
    world.assert_consistent()


def test_vm_larger_than_any_socket_is_a_fault_of_the_request(world: Any) -> None:
    from sqlalchemy import insert

    from ppec_orchestrator.store import tables

    with world.database.write() as conn:
        conn.execute(insert(tables.flavor).values(name="huge", vcpus=64, memory_mib=1024, disk_mib=8192))
    with pytest.raises(PpecError) as refused:
        world.replica(start=False).create(world.batch(1, flavor="huge"), world.ask)
    assert refused.value.code == "vm.exceeds_socket"
    world.assert_empty()


@pytest.mark.parametrize("named", ["flavor", "image", "cluster", "rack", "host", "vrf", "datacentre"])
def test_what_the_request_names_must_exist(world: Any, named: str) -> None:
    with pytest.raises(PpecError) as refused:
        world.replica(start=False).create(world.batch(1, **{named: "nowhere"}), world.ask)
    assert refused.value.code == f"{named}.not_found"


def test_taken_names_are_named(world: Any) -> None:
    replica = world.replica()
    create(world, replica, 1, name="web")
    with pytest.raises(PpecError) as refused:
        replica.create(world.batch(1, name="web"), world.ask)
    assert refused.value.code == "vm.exists"
    assert refused.value.details["names"] == ["web"]
    world.assert_consistent()


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


def test_more_vms_than_a_call_takes_are_still_one_run(world: Any) -> None:
    """The action plugin cuts a host's part into calls; nothing else knows of them."""
    with world.database.write() as conn:
        conn.execute(update(prefix).values(cidr="10.7.0.0/22", last="10.7.3.254"))
        usable = usable_range(
            ip_network("10.7.1.0/24"), gateway=None, first=ip_address("10.7.1.0"), last=ip_address("10.7.1.254")
        )
        ipdb.insert_ipv4_rows(conn, 1, usable)
        conn.execute(update(host).values(disk_mib=10**7))
        conn.execute(update(host_cell).values(cores=1000, memory_mib=10**7))
    view = create(world, world.replica(), MAX_VMS_PER_CALL + 44, host="h1")
    assert view.state is OperationState.SUCCEEDED
    assert view.counters["runs"] == 1
    (started,) = world.dispatcher.started
    assert len(started.hosts["h1"].parameters["vms"]) == MAX_VMS_PER_CALL + 44
    assert started.timeout_s == 1200.0, "twice the time for two calls"
    world.assert_consistent()


def test_vm_being_deleted_names_the_operation_that_deletes_it(world: Any) -> None:
    replica = world.replica()
    name = create(world, replica, 1).items[0].name
    world.dispatcher.gate.clear()
    gone = replica.act(VmsAction(action=VmAction.DELETE, vms=(name,)), world.ask)
    assert world.vm(name).operation_id == gone.operation_id
    world.dispatcher.gate.set()
    world.ended(gone.operation_id)


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


def test_stop_waits_for_guests_over_the_time_hosts_have(world: Any) -> None:
    replica = world.replica()
    names = tuple(item.name for item in create(world, replica, 2).items)
    world.ended(replica.act(VmsAction(action=VmAction.STOP, vms=names, timeout_s=600), world.ask).operation_id)
    assert [request.timeout_s for request in world.dispatcher.started] == [600.0, 1200.0]


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


def test_best_effort_ends_well_when_no_other_host_is_left(world: Any) -> None:
    fault = Fault.of("hypervisor.failed")
    world.fleet.faults = lambda action, host, vm: fault if action == "CreateVms" else None
    view = create(world, world.replica(), 3, policy=Policy.SPREAD, mode=BatchMode.BEST_EFFORT)
    assert view.state is OperationState.FAILED
    assert states(view) == [ItemState.FAILED] * 3
    assert view.problem is not None
    assert view.problem.code == "hypervisor.failed"
    world.assert_consistent()


def test_fault_of_the_request_is_not_tried_elsewhere(world: Any) -> None:
    fault = Fault.of("request.invalid")
    world.fleet.faults = lambda action, host, vm: fault if action == "CreateVms" else None
    view = create(world, world.replica(), 2)
    assert view.state is OperationState.FAILED
    assert {item.attempt for item in view.items} == {1}
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


def test_idempotency_key_makes_one_operation(world: Any) -> None:
    replica = world.replica()
    asked = world.batch(2)
    keyed = world.keyed("k1", asked)
    first = replica.create(asked, keyed)
    again = replica.create(asked, keyed)
    assert first.operation_id == again.operation_id
    with pytest.raises(PpecError) as refused:
        replica.create(world.batch(3), world.keyed("k1", world.batch(3)))
    assert refused.value.code == "request.idempotency_mismatch"
    world.ended(first.operation_id)
    world.assert_consistent()


def test_same_key_at_once_makes_one_operation(world: Any) -> None:
    replica = world.replica()
    asked = world.batch(1)
    made: list[str] = []
    threads = [
        threading.Thread(target=lambda: made.append(replica.create(asked, world.keyed("k", asked)).operation_id))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(made) == 6
    assert len(set(made)) == 1
    world.ended(made[0])
    world.assert_consistent()


@pytest.mark.parametrize("slots", [1, 5])
def test_race_for_the_last_slots_has_exactly_as_many_winners(world: Any, slots: int) -> None:
    """Twelve halves fill... six hold; all but `slots` of them are taken, then sixteen ask at once on two replicas."""
    create(world, world.replica(), 6 - slots, flavor="half")
    replicas = [world.replica("two"), world.replicas[0]]
    won: list[str] = []
    refused: list[str] = []

    def ask(at: int) -> None:
        try:
            won.append(replicas[at % 2].create(world.batch(1, flavor="half"), world.ask).operation_id)
        except PpecError as error:
            refused.append(error.code)

    threads = [threading.Thread(target=ask, args=(at,)) for at in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(won) == slots
    assert set(refused) == {"placement.no_capacity"}
    assert len(refused) == 16 - slots
    for operation_id in won:
        assert world.ended(operation_id).state is OperationState.SUCCEEDED
    world.assert_consistent()


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


def test_vm_in_the_wrong_power_state_says_so(world: Any) -> None:
    replica = world.replica()
    name = create(world, replica, 1).items[0].name
    world.ended(replica.act(VmsAction(action=VmAction.STOP, vms=(name,)), world.ask).operation_id)
    for action in (VmAction.REBOOT, VmAction.RESET, VmAction.PAUSE, VmAction.RESUME):
        ended = world.ended(replica.act(VmsAction(action=action, vms=(name,)), world.ask).operation_id)
        assert (ended.state, ended.problem.code) == (OperationState.FAILED, "vm.wrong_state")
        assert world.vm(name).observed == "stopped"


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


def test_what_a_request_is_answered_is_what_the_record_shows(world: Any) -> None:
    """The answer is not read back, so it has to be made right: for a batch with refusals, and for an action."""
    waiting = world.replica("acceptor", start=False)
    accepted = waiting.create(world.batch(20, flavor="half", mode=BatchMode.BEST_EFFORT), world.ask)
    assert set(states(accepted)) == {ItemState.PENDING, ItemState.REFUSED}
    assert accepted == world.show(accepted.operation_id)
    with world.running():
        world.ended(accepted.operation_id)
    names = tuple(item.name for item in accepted.items if item.state is ItemState.PENDING)
    stopping = waiting.act(VmsAction(action=VmAction.STOP, vms=names), world.ask)
    assert stopping == world.show(stopping.operation_id)
