# SPDX-License-Identifier: Apache-2.0
"""VMs get another size; what they hold is what both sizes take, until their host has no use for one of them."""

from __future__ import annotations

from itertools import count
from typing import Any
from uuid import UUID

import pytest
from engine_crashes import QUICK, CrashingDatabase
from sqlalchemy import select

from ppec_contract.agent import Effect
from ppec_contract.api_operations import ItemState, OperationState
from ppec_contract.api_vms import VmAction, VmResize, VmsAction
from ppec_contract.errors import PpecError
from ppec_contract.vm import Size, VmInfo
from ppec_orchestrator.dispatch.simulated import Fault
from ppec_orchestrator.store import sizes, tables


def made(world: Any, size: int = 1) -> Any:
    """VMs of 2 vCPUs and 1024 MiB on host h1, which has 8 cores of 2 threads and 16384 MiB."""
    with world.running(name="maker") as maker:
        view = world.ended(maker.create(world.batch(size, host="h1"), world.ask).operation_id)
    assert view.state is OperationState.SUCCEEDED, view.problem
    return world.vm(view.items[0].name)


def used(world: Any) -> tuple[int, int]:
    """Of h1, by the record: cores and memory. Their sums are what they sum up."""
    with world.database.read() as conn:
        cell = conn.execute(select(tables.host_cell).where(tables.host_cell.c.host_id == 1)).one()
        shares = conn.execute(
            select(tables.allocation_cell).join(tables.allocation).where(tables.allocation.c.host_id == 1)
        ).all()
    found = (cell.cores_used, cell.memory_used_mib)
    assert found == (sum(share.cores for share in shares), sum(share.memory_mib for share in shares))
    return found


def resized(world: Any, name: str, **wanted: Any) -> Any:
    with world.running(name="resizer") as replica:
        return world.ended(replica.resize(name, VmResize(**wanted), world.ask).operation_id)


def act(world: Any, name: str, *actions: VmAction) -> None:
    with world.running(name="switch") as replica:
        for action in actions:
            asked = VmsAction(action=action, vms=(name,))
            assert world.ended(replica.act(asked, world.ask).operation_id).state is OperationState.SUCCEEDED


def test_running_vm_grows_at_once(world: Any) -> None:
    vm = made(world)
    assert used(world) == (1, 1024)
    view = resized(world, vm.name, vcpus=6, memory_mib=4096)
    assert (view.kind, view.state) == ("vm.resize", OperationState.SUCCEEDED), view.problem
    (item,) = view.items
    assert (item.resized.vcpus, item.resized.memory_mib) == (Effect.NOW, Effect.NOW)
    now = world.vm(vm.name)
    assert (now.vcpus, now.memory_mib, now.held) == (6, 4096, None)
    assert used(world) == (3, 4096)
    world.assert_consistent()


def test_what_a_running_vm_gives_back_it_holds_until_its_next_start(world: Any) -> None:
    vm = made(world)
    resized(world, vm.name, vcpus=6)
    view = resized(world, vm.name, vcpus=2, memory_mib=2048)
    (item,) = view.items
    assert (item.resized.vcpus, item.resized.memory_mib) == (Effect.NEXT_START, Effect.NOW)
    now = world.vm(vm.name)
    assert (now.vcpus, now.memory_mib, now.held) == (2, 2048, Size(vcpus=6, memory_mib=2048))
    assert used(world) == (3, 2048), "of each the larger"
    act(world, vm.name, VmAction.STOP, VmAction.START)
    now = world.vm(vm.name)
    assert (now.vcpus, now.memory_mib, now.held) == (2, 2048, None)
    assert used(world) == (1, 2048)


def test_only_what_is_named_changes(world: Any) -> None:
    vm = made(world)
    resized(world, vm.name, memory_mib=512)
    act(world, vm.name, VmAction.STOP)
    assert used(world) == (1, 512)
    (item,) = resized(world, vm.name, vcpus=4).items
    assert (item.resized.vcpus, item.resized.memory_mib) == (Effect.NOW, Effect.UNCHANGED)
    assert (world.vm(vm.name).vcpus, world.vm(vm.name).memory_mib) == (4, 512)


@pytest.mark.parametrize(
    ("wanted", "resource", "more", "free"),
    [({"vcpus": 16}, "cores", 7, 6), ({"memory_mib": 15361}, "memory_mib", 14337, 14336)],
)
def test_host_without_room_refuses_with_counts(
    world: Any, wanted: dict[str, int], resource: str, more: int, free: int
) -> None:
    vm = made(world, size=2)
    with pytest.raises(PpecError) as refused:
        world.replica("accepting", start=False).resize(vm.name, VmResize(**wanted), world.ask)
    assert refused.value.code == "host.no_capacity"
    told = refused.value.details
    assert (told["host"], told["cell"], told["resource"], told["wanted"], told["free"]) == (
        "h1",
        0,
        resource,
        more,
        free,
    )
    assert world.vm(vm.name) == vm
    assert used(world) == (2, 2048)
    assert len(world.dispatcher.started) == 1, "no host was asked"


def test_reservation_is_there_before_the_host_is_asked(world: Any) -> None:
    vm = made(world)
    waiting = world.replica("accepting", start=False)
    accepted = waiting.resize(vm.name, VmResize(vcpus=8), world.ask)
    assert used(world) == (4, 1024)
    assert (world.vm(vm.name).vcpus, world.vm(vm.name).held) == (2, Size(vcpus=8, memory_mib=1024))
    assert accepted == world.show(accepted.operation_id)
    with pytest.raises(PpecError) as refused:
        waiting.resize(vm.name, VmResize(vcpus=4), world.ask)
    assert refused.value.code == "vm.wrong_state"
    waiting.cancel(accepted.operation_id)
    with world.running():
        assert world.ended(accepted.operation_id).state is OperationState.CANCELLED
    assert used(world) == (1, 1024)
    assert world.vm(vm.name) == vm


@pytest.mark.parametrize("code", ["host.no_capacity", "vm.exceeds_socket", "vm.wrong_state", "agent.busy"])
def test_room_goes_back_when_the_host_refuses(world: Any, code: str) -> None:
    vm = made(world)
    world.fleet.faults = lambda action, host, vm: Fault.of(code) if action == "ResizeVms" else None
    view = resized(world, vm.name, vcpus=8, memory_mib=4096)
    assert (view.state, view.problem.code) == (OperationState.FAILED, code)
    assert used(world) == (1, 1024)
    assert (world.vm(vm.name).vcpus, world.vm(vm.name).held) == (2, None)


def report(world: Any, info: VmInfo) -> None:
    with world.database.write() as conn:
        sizes.follow_report(conn, {info.vm_id: info})


@pytest.mark.parametrize("done", [True, False])
def test_after_a_lost_answer_both_sizes_are_held_until_the_host_is_heard(world: Any, done: bool) -> None:
    vm = made(world)
    lost = Fault.of("host.unreachable", whole_host=True, done=done)
    world.fleet.faults = lambda action, host, vm: lost if action == "ResizeVms" else None
    view = resized(world, vm.name, vcpus=8)
    assert (view.state, view.problem.code) == (OperationState.FAILED, "host.unreachable")
    assert used(world) == (4, 1024)
    report(world, world.fleet.vms["h1"][vm.vm_id])
    assert used(world) == ((4, 1024) if done else (1, 1024))
    assert (world.vm(vm.name).vcpus, world.vm(vm.name).held) == (8 if done else 2, None)


@pytest.mark.parametrize("done", [True, False])
def test_failure_that_says_what_the_vm_is_now_settles_the_room(world: Any, done: bool) -> None:
    vm = made(world)
    told = Fault.of("hypervisor.failed", done=done, told=True)
    world.fleet.faults = lambda action, host, vm: told if action == "ResizeVms" else None
    view = resized(world, vm.name, vcpus=8)
    assert (view.state, view.problem.code) == (OperationState.FAILED, "hypervisor.failed")
    assert used(world) == ((4, 1024) if done else (1, 1024))
    assert (world.vm(vm.name).vcpus, world.vm(vm.name).held) == (8 if done else 2, None)
    world.assert_consistent()


def test_report_heard_before_a_lost_answer_is_given_up_settles_what_the_host_has_done(world: Any) -> None:
    """The host reports once, after its answer; by the record the operation is still at work then."""
    vm = made(world)
    waiting = world.replica("accepting", start=False)
    accepted = waiting.resize(vm.name, VmResize(vcpus=8), world.ask)
    info = world.fleet.vms["h1"][vm.vm_id]
    report(world, info.model_copy(update={"pending": Size(vcpus=8, memory_mib=1024)}))
    assert (world.vm(vm.name).vcpus, world.vm(vm.name).held) == (8, Size(vcpus=2, memory_mib=1024))
    report(world, info.model_copy(update={"vcpus": 8}))
    assert (world.vm(vm.name).vcpus, world.vm(vm.name).held) == (8, None)
    assert used(world) == (4, 1024)
    lost = Fault.of("host.unreachable", whole_host=True, done=True)
    world.fleet.faults = lambda action, host, vm: lost if action == "ResizeVms" else None
    with world.running():
        assert world.ended(accepted.operation_id).state is OperationState.FAILED
    assert (world.vm(vm.name).vcpus, world.vm(vm.name).held, used(world)) == (8, None, (4, 1024))
    world.assert_consistent()


def test_failure_about_another_vm_changes_neither(world: Any) -> None:
    """A host that answers for one VM with what it says another is, is not believed, failed or not."""
    vm, other = made(world), made(world)

    def misled(action: str, host: str, vm_id: UUID) -> Fault | None:
        if action != "ResizeVms":
            return None
        world.fleet.vms["h1"][vm.vm_id] = world.fleet.vms["h1"][other.vm_id].model_copy(update={"vcpus": 4})
        return Fault.of("hypervisor.failed", told=True)

    world.fleet.faults = misled
    view = resized(world, vm.name, vcpus=8)
    assert (view.state, view.problem.code) == (OperationState.FAILED, "internal.error")
    assert used(world) == (5, 2048), "both sizes are held"
    assert (world.vm(other.name).vcpus, world.vm(other.name).held) == (2, None)


def test_report_from_before_a_resize_takes_no_room_away(world: Any) -> None:
    vm = made(world)
    before = world.fleet.vms["h1"][vm.vm_id]
    waiting = world.replica("accepting", start=False)
    accepted = waiting.resize(vm.name, VmResize(vcpus=8), world.ask)
    report(world, before)
    assert used(world) == (4, 1024)
    with world.running():
        assert world.ended(accepted.operation_id).state is OperationState.SUCCEEDED
    report(world, before)
    assert (used(world), world.vm(vm.name).vcpus) == ((4, 1024), 8), "nothing is open any more"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("committed", [False, True])
@pytest.mark.parametrize("refused", [False, True])
def test_crash_at_every_write_of_a_resize(world: Any, database_url: str, committed: bool, refused: bool) -> None:
    world.settings(**QUICK)
    vm = made(world)

    def faults(action: str, host: str, vm: UUID) -> Fault | None:
        return Fault.of("host.no_capacity") if refused and action == "ResizeVms" else None

    world.fleet.faults = faults
    for at in count(1):
        was = world.vm(vm.name)
        wanted = 6 if was.vcpus == 2 else 2
        act_before = len(world.fleet.deeds)
        database = CrashingDatabase(database_url, committed=committed)
        dying = world.replica(f"dying-{at}", database=database)
        database.arm(at)
        accepted = world.replica("accepting", start=False).resize(vm.name, VmResize(vcpus=wanted), world.ask)
        world.wait_until(lambda a=accepted, d=database: d.dead.is_set() or world.over(a.operation_id), "crash or end")
        world.bury(dying)
        crashed = database.dead.is_set()
        with world.running(name="heir"):
            view = world.ended(accepted.operation_id)
        if refused:
            assert (view.state, view.items[0].state) == (OperationState.FAILED, ItemState.FAILED)
            assert world.vm(vm.name) == was
            assert used(world) == (1, 1024)
        else:
            assert view.state is OperationState.SUCCEEDED, view.problem
            assert len(world.fleet.deeds) == act_before + 1, "it was done once"
            assert view.items[0].resized.vcpus is (Effect.NOW if wanted == 6 else Effect.NEXT_START)
            assert world.vm(vm.name).vcpus == wanted
            assert used(world) == (3, 1024), "shrinking waits for the next start"
        world.assert_consistent()
        if not crashed:
            assert at > 3, "there were writes to die at"
            return
