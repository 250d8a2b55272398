# SPDX-License-Identifier: Apache-2.0
"""The engine: crashes at every write, takeover, fences, cancel, limits. Nothing is lost, doubled or left."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

import pytest
from engine_crashes import QUICK, CrashingDatabase
from sqlalchemy import Connection, update
from storage_given import POOL, give_storage
from structlog.testing import capture_logs

from ppec_contract.api_operations import ItemState, OperationState
from ppec_contract.api_placement import Policy, VmSize
from ppec_contract.api_vms import VmAction, VmsAction
from ppec_contract.errors import PpecError
from ppec_orchestrator.dispatch.simulated import Fault, SimulatedDispatcher
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.tables import operation

# An engine thread that dies unseen fails the test; where a test kills them, it says so.
NO_DEAD_THREADS = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


def doomed_everywhere(action: str, host: str, vm: Any) -> Fault | None:
    return Fault.of("hypervisor.failed", done=vm.int % 2 == 0) if action == "CreateVms" and host != "h2" else None


def broken_h1(action: str, host: str, vm: Any) -> Fault | None:
    lost = Fault.of("host.unreachable", whole_host=True, done=True)
    return lost if (action, host) == ("CreateVms", "h1") else None


# Of small VMs' size. Their disks and drives have to be given back as everything else.
STORED = {
    "flavor": None, "pool": POOL, "size": VmSize(vcpus=2, memory_mib=1024, disk_mib=8192, nvme_drives=1),
}  # fmt: skip
SCENARIOS = {
    "clean": (None, 4, OperationState.SUCCEEDED),
    "moved": (broken_h1, 4, OperationState.SUCCEEDED),
    # Twelve don't fit on h2 alone, so a batch of twelve is undone.
    "undone": (doomed_everywhere, 12, OperationState.FAILED),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.slow
@pytest.mark.parametrize("committed", [False, True])
@pytest.mark.parametrize(
    ("scenario", "same_machine"), [("clean", True), ("clean", False), ("moved", False), ("undone", True)]
)
def test_crash_at_every_write_of_a_create(
    world: Any, database_url: str, scenario: str, committed: bool, same_machine: bool
) -> None:
    """Each write is once the last of its process; another finishes, and it comes out as if nothing had happened."""
    faults, size, wanted = SCENARIOS[scenario]
    world.settings(**QUICK)
    give_storage(world, "h1", "h2", "h3", pool_mib=10**6, drives=64)
    for at in count(1):
        database = CrashingDatabase(database_url, committed=committed)
        dying = world.replica(f"dying-{at}", database=database)
        database.arm(at)
        world.fleet.faults = faults or world.fleet.faults
        asked = world.batch(size, policy=Policy.SPREAD, **STORED)
        accepted = world.replica("accepting", start=False).create(asked, world.ask)
        finished = world.wait_until(
            lambda a=accepted, d=database: d.dead.is_set() or world.over(a.operation_id), "crash or end"
        )
        assert finished
        world.bury(dying)
        crashed = database.dead.is_set()
        with world.running(name="heir", dispatcher=None if same_machine else SimulatedDispatcher(world.fleet)) as heir:
            view = world.ended(accepted.operation_id)
            assert view.state is wanted, (at, view.problem)
            world.fleet.faults = lambda action, host, vm: None
            world.wait_cleaned()
            world.assert_consistent()
            made = [vm for action, _, vm in world.fleet.deeds if action == "CreateVms"]
            if scenario == "clean":
                assert len(made) == len(set(made)), "nothing was made twice"
            living = tuple(item.name for item in view.items if item.state is ItemState.SUCCEEDED)
            if living:
                gone = heir.act(VmsAction(action=VmAction.DELETE, vms=living), world.ask)
                assert world.ended(gone.operation_id).state is OperationState.SUCCEEDED
            world.assert_empty()
        if not crashed:
            assert at > 4, "there were writes to die at"
            return


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("committed", [False, True])
def test_crash_at_every_write_of_a_delete(world: Any, database_url: str, committed: bool) -> None:
    world.settings(**QUICK)
    give_storage(world, "h1", "h2", "h3", pool_mib=10**6, drives=64)
    for at in count(1):
        with world.running(name="maker") as maker:
            made = world.ended(maker.create(world.batch(4, policy=Policy.SPREAD, **STORED), world.ask).operation_id)
        names = tuple(item.name for item in made.items)
        database = CrashingDatabase(database_url, committed=committed)
        dying = world.replica(f"dying-{at}", database=database)
        database.arm(at)
        asked = VmsAction(action=VmAction.DELETE, vms=names)
        gone = world.replica("accepting", start=False).act(asked, world.ask)
        world.wait_until(lambda g=gone, d=database: d.dead.is_set() or world.over(g.operation_id), "crash or end")
        world.bury(dying)
        crashed = database.dead.is_set()
        with world.running(name="heir"):
            assert world.ended(gone.operation_id).state is OperationState.SUCCEEDED
        world.assert_empty()
        if not crashed:
            return


@NO_DEAD_THREADS
@pytest.mark.parametrize("seed", range(12))
def test_random_faults_leak_nothing(world: Any, seed: int) -> None:
    """Whatever hosts do to a create, once they are well again the record and the hosts agree."""
    dice = random.Random(seed)
    codes = ["host.unreachable", "hypervisor.failed", "disk.full", "agent.unavailable", "vm.start_failed"]

    def faults(action: str, host: str, vm: Any) -> Fault | None:
        if dice.random() > 0.35:
            return None
        return Fault.of(dice.choice(codes), whole_host=dice.random() < 0.4, done=dice.random() < 0.5)

    world.settings(**QUICK)
    give_storage(world, "h1", "h2", "h3", pool_mib=10**6, drives=64)
    replica = world.replica()
    world.fleet.faults = faults
    modes = ["all-or-nothing", "best-effort"]
    accepted = [replica.create(world.batch(3, mode=modes[at % 2], **STORED), world.ask) for at in range(3)]
    for one in accepted:
        view = world.ended(one.operation_id)
        assert view.state is not OperationState.CANCELLED
        if view.state is not OperationState.SUCCEEDED:
            assert any(item.problem for item in view.items)
    world.fleet.faults = lambda action, host, vm: None
    world.wait_cleaned()
    world.assert_consistent()


@NO_DEAD_THREADS
def test_two_replicas_share_the_work_and_double_nothing(world: Any) -> None:
    replicas = [
        world.replica("one", dispatcher=SimulatedDispatcher(world.fleet)),
        world.replica("two", dispatcher=SimulatedDispatcher(world.fleet)),
    ]
    accepted = [replicas[at % 2].create(world.batch(1), world.ask) for at in range(10)]
    for one in accepted:
        view = world.ended(one.operation_id)
        assert view.state is OperationState.SUCCEEDED
        assert view.counters["runs"] == 1
    made = [vm for action, _, vm in world.fleet.deeds if action == "CreateVms"]
    assert len(made) == len(set(made)) == 10
    world.assert_consistent()


def test_sleeper_that_wakes_up_is_fenced(world: Any) -> None:
    """The first owner stops for longer than its lease; its late run and its late writes change nothing."""
    world.settings(renewal_s=300, poll_s=0.05)
    sleeper = SimulatedDispatcher(world.fleet)
    sleeper.gate.clear()
    first = world.replica("one", dispatcher=sleeper)
    accepted = first.create(world.batch(3), world.ask)
    world.wait_until(lambda: sleeper.started, "the first replica has started its run")
    world.replica("two", dispatcher=SimulatedDispatcher(world.fleet))
    world.end_leases(first.engine._replica.owner)
    view = world.ended(accepted.operation_id)
    assert view.state is OperationState.SUCCEEDED
    before = (view, list(world.fleet.deeds))
    sleeper.gate.set()
    world.wait_until(lambda: not workers(accepted.operation_id), "the first replica has let go")
    assert (world.show(accepted.operation_id), world.fleet.deeds) == before
    world.assert_consistent()


def workers(operation_id: str) -> list[threading.Thread]:
    """The threads that work on it, in all replicas."""
    return [one for one in threading.enumerate() if one.name == f"ppec-{operation_id[:16]}"]


@NO_DEAD_THREADS
def test_living_owner_keeps_its_operation(world: Any) -> None:
    """A run that takes longer than the lease stays where it is: the lease is renewed."""
    world.settings(renewal_s=0.05, poll_s=0.05)
    world.dispatcher.gate.clear()
    owner = world.replica("one")
    accepted = owner.create(world.batch(1), world.ask)
    world.wait_until(lambda: world.dispatcher.started, "the run has started")
    world.replica("two", dispatcher=SimulatedDispatcher(world.fleet))
    for _ in range(4):
        # Two thirds of a lease; there are minutes left to renew it in.
        world.ahead += timedelta(seconds=400)
        renewed = world.now() + timedelta(seconds=500)
        world.wait_until(lambda r=renewed: world.lease(accepted.operation_id) > r, "it was renewed")
    world.dispatcher.gate.set()
    view = world.ended(accepted.operation_id)
    assert (view.state, view.counters["runs"]) == (OperationState.SUCCEEDED, 1)
    assert world.fence(accepted.operation_id) == 1


@NO_DEAD_THREADS
def test_owner_that_stood_still_does_not_take_over_from_itself(world: Any) -> None:
    """Its lease ended while the whole process had no time; it wakes with its work going on, and renews."""
    world.settings(renewal_s=300, poll_s=0.05)
    world.dispatcher.gate.clear()
    owner = world.replica("one")
    held = owner.create(world.batch(1), world.ask)
    world.wait_until(lambda: world.dispatcher.started, "the run has started")
    world.end_leases(owner.engine._replica.owner)
    other = owner.create(world.batch(1), world.ask)
    world.wait_until(lambda: len(world.dispatcher.started) == 2, "it has looked for work since")
    assert world.fence(held.operation_id) == 1
    world.dispatcher.gate.set()
    views = [world.ended(accepted.operation_id) for accepted in (held, other)]
    assert [(view.state, view.counters["runs"]) for view in views] == [(OperationState.SUCCEEDED, 1)] * 2
    assert world.fence(held.operation_id) == 1


class AbsentDatabase(Database):
    """Gone for the next `away` writes that an operation's own thread makes."""

    away = 0

    @contextmanager
    def write(self) -> Iterator[Connection]:
        if self.away and threading.current_thread().name.startswith("ppec-op"):
            self.away -= 1
            raise PpecError("store.unavailable", "away")
        with super().write() as conn:
            yield conn


def test_database_that_is_away_for_a_while_undoes_nothing(world: Any, database_url: str) -> None:
    world.settings(renewal_s=0.1, poll_s=0.05)
    database = AbsentDatabase(database_url)
    # As often as a check-point is tried: the next write after it goes through.
    database.away = 5
    with world.running(database=database) as replica:
        accepted = replica.create(world.batch(4), world.ask)
        world.wait_until(lambda: database.away == 0 and not replica.engine.running, "its owner has let go")
        world.end_leases(replica.engine._replica.owner)
        view = world.ended(accepted.operation_id)
    assert view.state is OperationState.SUCCEEDED
    assert world.fence(view.operation_id) == 2
    assert len(world.fleet.deeds) == 4, "nothing was made twice"
    world.assert_consistent()


def test_replica_that_stops_hands_over_at_once(world: Any) -> None:
    world.settings(renewal_s=60, poll_s=0.05)
    world.dispatcher.gate.clear()
    with world.running(name="one") as first:
        accepted = first.create(world.batch(2), world.ask)
        world.wait_until(lambda: world.dispatcher.started, "the run has started")
    world.dispatcher.gate.set()
    world.replica("two")
    view = world.ended(accepted.operation_id)
    assert view.state is OperationState.SUCCEEDED
    assert view.counters["runs"] == 1, "the run is adopted"


def test_process_started_again_does_not_wait_for_its_own_lease(world: Any, database_url: str) -> None:
    """A lease of ten minutes: the restarted replica knows that its predecessor is dead."""
    world.settings(renewal_s=60, poll_s=0.05)
    world.dispatcher.gate.clear()
    database = CrashingDatabase(database_url, committed=False)
    dying = world.replica("one", database=database)
    accepted = dying.create(world.batch(2), world.ask)
    world.wait_until(lambda: world.dispatcher.started, "the run has started")
    database.dead.set()
    world.bury(dying, leases_end=False)
    world.dispatcher.gate.set()
    world.replica("one")
    assert world.ended(accepted.operation_id).state is OperationState.SUCCEEDED


def test_state_directory_belongs_to_one_process(world: Any) -> None:
    world.replica("one")
    with pytest.raises(PpecError) as refused:
        world.replica("one")
    assert refused.value.code == "resource.in_use"


def test_cancel_of_a_running_create_undoes_it(world: Any) -> None:
    replica = world.replica()
    world.dispatcher.gate.clear()
    accepted = replica.create(world.batch(4), world.ask)
    world.wait_until(lambda: world.dispatcher.started, "the run has started")
    replica.cancel(accepted.operation_id)
    world.wait_until(lambda: world.show(accepted.operation_id).problem, "it has heard of it")
    world.dispatcher.gate.set()
    view = world.ended(accepted.operation_id)
    assert view.state is OperationState.CANCELLED
    assert view.problem is not None
    assert view.problem.code == "operation.cancelled"
    assert {item.state for item in view.items} == {ItemState.UNDONE}
    world.assert_empty()
    with pytest.raises(PpecError) as refused:
        replica.cancel(accepted.operation_id)
    assert refused.value.code == "operation.finished"


@NO_DEAD_THREADS
def test_cancel_on_another_replica_reaches_the_owner(world: Any) -> None:
    world.settings(renewal_s=0.1)
    owner = world.replica("one")
    world.dispatcher.gate.clear()
    accepted = owner.create(world.batch(2), world.ask)
    world.wait_until(lambda: world.dispatcher.started, "the run has started")
    world.replica("other", start=False).cancel(accepted.operation_id)
    world.wait_until(lambda: world.show(accepted.operation_id).problem, "the owner has heard of it")
    world.dispatcher.gate.set()
    assert world.ended(accepted.operation_id).state is OperationState.CANCELLED
    world.assert_empty()


def test_cancel_of_a_queued_create_starts_no_run(world: Any) -> None:
    waiting = world.replica("accepting", start=False)
    accepted = waiting.create(world.batch(4), world.ask)
    waiting.cancel(accepted.operation_id)
    world.replica()
    view = world.ended(accepted.operation_id)
    assert view.state is OperationState.CANCELLED
    assert world.dispatcher.started == []
    world.assert_empty()


def test_cancelled_delete_leaves_what_it_did_not_reach(world: Any) -> None:
    replica = world.replica()
    made = world.ended(replica.create(world.batch(2), world.ask).operation_id)
    world.dispatcher.gate.clear()
    asked = VmsAction(action=VmAction.DELETE, vms=tuple(item.name for item in made.items))
    gone = replica.act(asked, world.ask)
    world.wait_until(lambda: len(world.dispatcher.started) == 2, "the run has started")
    replica.cancel(gone.operation_id)
    assert world.ended(gone.operation_id).state is OperationState.CANCELLED
    world.dispatcher.gate.set()
    assert [world.vm(item.name).record for item in made.items] == ["active", "active"]
    world.assert_consistent()


@NO_DEAD_THREADS
def test_limit_on_running_changes_at_run_time(world: Any) -> None:
    world.settings(max_running=1, poll_s=0.05)
    replica = world.replica()
    world.dispatcher.gate.clear()
    accepted = [replica.create(world.batch(1), world.ask) for _ in range(3)]
    world.wait_until(lambda: replica.engine.running, "one is running")
    states = [world.show(one.operation_id).state for one in accepted]
    assert states.count(OperationState.RUNNING) == 1
    world.settings(max_running=2)
    world.wait_until(lambda: len(replica.engine.running) == 2, "two are running")
    world.dispatcher.gate.set()
    for one in accepted:
        assert world.ended(one.operation_id).state is OperationState.SUCCEEDED


@NO_DEAD_THREADS
def test_pause_between_looks_can_be_undone_however_long_it_was_set(world: Any) -> None:
    """Nothing wakes the engine: it finds the new limit by itself."""
    world.settings(max_running=1, poll_s=1e12)
    replica = world.replica()
    world.dispatcher.gate.clear()
    accepted = [replica.create(world.batch(1), world.ask) for _ in range(2)]
    world.wait_until(lambda: replica.engine.running, "one is running")
    world.settings(max_running=2, poll_s=0.05)
    world.wait_until(lambda: len(replica.engine.running) == 2, "two are running")
    world.dispatcher.gate.set()
    for one in accepted:
        assert world.ended(one.operation_id).state is OperationState.SUCCEEDED


def test_higher_priority_is_claimed_first(world: Any) -> None:
    waiting = world.replica("accepting", start=False)
    made = waiting.create(world.batch(1), world.ask)
    with world.running(name="maker"):
        name = world.ended(made.operation_id).items[0].name
    world.settings(max_running=1, **{"priority.vm.stop": 5})
    first = waiting.create(world.batch(1), world.ask)
    urgent = waiting.act(VmsAction(action=VmAction.STOP, vms=(name,)), world.ask)
    world.replica()
    assert world.ended(urgent.operation_id).started_at < world.ended(first.operation_id).started_at


def test_unusable_setting_is_left_at_its_default(world: Any) -> None:
    world.settings(max_running=-3)
    accepted = world.replica().create(world.batch(1), world.ask)
    assert world.ended(accepted.operation_id).state is OperationState.SUCCEEDED


def test_operation_of_a_kind_that_is_not_known_waits_for_a_newer_replica(world: Any) -> None:
    world.settings(poll_s=0.02)
    accepting = world.replica("accepting", start=False)
    newer = [accepting.create(world.batch(1), world.ask).operation_id for _ in range(2)]
    with world.database.write() as conn:
        conn.execute(update(operation).values(kind="vm.newer"))
        # One is queued; the other's owner has died.
        conn.execute(
            update(operation)
            .where(operation.c.id == newer[1])
            .values(state="running", owner="other", fence=7, lease_until=datetime.now(UTC) - timedelta(seconds=60))
        )
    with capture_logs() as logs:
        replica = world.replica()
        known = replica.create(world.batch(1), world.ask)
        assert world.ended(known.operation_id).state is OperationState.SUCCEEDED
        again = replica.create(world.batch(1), world.ask)
        assert world.ended(again.operation_id).state is OperationState.SUCCEEDED
    assert [world.show(one).state for one in newer] == [OperationState.QUEUED, OperationState.RUNNING]
    assert [world.fence(one) for one in newer] == [0, 7], "nobody claimed them"
    said = [line["kind"] for line in logs if line["event"] == "engine.kind_unknown"]
    assert said == ["vm.newer"], "it is said once"
