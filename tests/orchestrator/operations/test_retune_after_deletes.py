# SPDX-License-Identifier: Apache-2.0
"""The policy "retune after deletes": one per host that lost VMs, in the queue with the end of the delete."""

from __future__ import annotations

import threading
from collections import Counter
from datetime import timedelta
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
from engine_crashes import QUICK, CrashingDatabase
from sqlalchemy import insert, select, update
from structlog.testing import capture_logs

from ppec_contract.api_hosts import HostRetune
from ppec_contract.api_operations import OperationState
from ppec_contract.api_placement import Policy
from ppec_contract.api_vms import VmAction, VmsAction
from ppec_contract.retune import RetuneBounds
from ppec_orchestrator.dispatch.simulated import Fault
from ppec_orchestrator.operations.enqueueing import Ask
from ppec_orchestrator.operations.planning import Planning
from ppec_orchestrator.operations.retune_policy import after_deletes
from ppec_orchestrator.store import operations as store
from ppec_orchestrator.store import tables
from ppec_orchestrator.store.paging import Slice


@pytest.fixture
def two_cells(world: Any) -> Any:
    """Each host has a second cell, empty and of the first one's size."""
    with world.database.write() as conn:
        first = conn.execute(select(tables.host_cell)).mappings().all()
        conn.execute(insert(tables.host_cell), [{**row, "cell": 1} for row in first])
    return world


@pytest.fixture
def on(two_cells: Any) -> Any:
    two_cells.settings(retune_after_deletes=True)
    return two_cells


def made(world: Any, size: int = 2, host: str = "h1", **more: str) -> tuple[str, ...]:
    """VMs of a host: in its cell 0, as long as they fit there."""
    with world.running(name="maker") as maker:
        asked = world.batch(size, host=host, policy=Policy.PACK, **more)
        view = world.ended(maker.create(asked, world.ask).operation_id)
        assert view.state is OperationState.SUCCEEDED, view.problem
    return tuple(item.name for item in view.items)


def gone(world: Any, *names: str) -> Any:
    """The delete of these VMs, ended, as the engine stops right after it."""
    with world.running(name="deleter") as replica:
        return world.ended(replica.act(VmsAction(action=VmAction.DELETE, vms=names), world.ask).operation_id)


def retunes(world: Any) -> list[Any]:
    """Every retune there is, oldest first."""
    reader = world.replica("reader", start=False)
    return sorted(reader.page(Slice(), world.operations_of_kind("host.retune")).items, key=lambda view: view.created_at)


def ended_retunes(world: Any) -> list[Any]:
    with world.running(name="retuner"):
        return [world.ended(one.operation_id) for one in retunes(world)]


def rows(world: Any) -> dict[str, Any]:
    with world.database.read() as conn:
        return {row.id: row for row in conn.execute(select(tables.operation))}


def test_off_by_default(two_cells: Any) -> None:
    assert gone(two_cells, *made(two_cells)).state is OperationState.SUCCEEDED
    two_cells.settings(retune_after_deletes=False)
    assert gone(two_cells, *made(two_cells)).state is OperationState.SUCCEEDED
    assert retunes(two_cells) == []


def test_whole_cell_is_open_after_a_delete_leaves_two_half_full(on: Any) -> None:
    """Two full cells lose half of their VMs; then what is left of the first one is found in the second one."""
    world = on
    names = made(world, 4, flavor="half")
    first, second = ([name for name in names if world.vm(name).cells == (cell,)] for cell in (0, 1))
    assert (len(first), len(second), cores_in_use(world)) == (2, 2, {0: 8, 1: 8})
    with capture_logs() as logs:
        deleted = gone(world, first[0], second[0])
    (view,) = ended_retunes(world)
    assert (view.state, view.created_by) == (OperationState.SUCCEEDED, "policy")
    assert (view.retune.host, view.retune.plan_only, view.retune.plan.opened) == ("h1", False, (0,))
    assert view.retune.want == HostRetune().want, "a whole cell"
    assert [move.name for move in view.retune.plan.moves] == [first[1]]
    assert [world.vm(name).cells for name in (first[1], second[1])] == [(1,), (1,)]
    assert cores_in_use(world) == {0: 0, 1: 8}
    assert after(world, view.operation_id) == deleted.operation_id
    (told,) = [line for line in logs if line["event"] == "audit"]
    assert (told["caller"], told["action"], told["subject"]) == ("policy", "retune_host", "h1")
    assert (told["operation"], told["outcome"]) == (view.operation_id, "done")


def cores_in_use(world: Any) -> dict[int, int]:
    """Of h1, by the record."""
    with world.database.read() as conn:
        found = conn.execute(select(tables.host_cell).where(tables.host_cell.c.host_id == 1))
        return {row.cell: row.cores_used for row in found}


def test_one_per_host_that_lost_vms_after_everything_else(on: Any) -> None:
    world = on
    names = made(world, host="h1") + made(world, host="h2")
    kept = made(world, host="h3")
    gone(world, *names)
    assert Counter(view.retune.host for view in retunes(world)) == {"h1": 1, "h2": 1}
    by_id = rows(world)
    assert {by_id[view.operation_id].priority for view in retunes(world)} == {-100}
    assert {view.state for view in ended_retunes(world)} == {OperationState.SUCCEEDED}
    assert {world.vm(name).cells for name in kept} == {(0,)}


def test_vm_that_stayed_is_no_loss(on: Any) -> None:
    world = on
    names = made(world, host="h1") + made(world, host="h2")
    stays = {world.vm(name).vm_id for name in names[:2]}
    failed = Fault.of("hypervisor.failed")
    world.fleet.faults = lambda action, host, vm: failed if action == "DeleteVms" and vm in stays else None
    assert gone(world, *names).state is OperationState.PARTIAL
    assert [view.retune.host for view in retunes(world)] == ["h2"]


def test_cancelled_delete_counts_for_what_it_deleted(on: Any) -> None:
    """It ends backwards, and what is gone is gone."""
    world = on
    names = made(world)
    waiting = world.replica("accepting", start=False)
    deleted = waiting.act(VmsAction(action=VmAction.DELETE, vms=names), world.ask)
    with world.database.write() as conn:
        mine = tables.operation_item.c.operation_id == deleted.operation_id
        first = mine & (tables.operation_item.c.position == 0)
        conn.execute(update(tables.operation_item).where(first).values(state="succeeded"))
    waiting.cancel(deleted.operation_id)
    with world.running(name="deleter"):
        assert world.ended(deleted.operation_id).state is OperationState.CANCELLED
    assert [view.retune.host for view in retunes(world)] == ["h1"]


@pytest.mark.parametrize("what", ["silent", "draining", "one cell", "never enrolled"])
def test_hosts_that_are_let_alone(on: Any, what: str) -> None:
    world = on
    names = made(world)
    changes = {
        "silent": {"last_seen_at": world.now() - timedelta(seconds=3700)},
        "draining": {"draining": True},
        "never enrolled": {"enrolled_at": None},
    }
    with world.database.write() as conn:
        if what in changes:
            conn.execute(update(tables.host).where(tables.host.c.id == 1).values(**changes[what]))
        else:
            conn.execute(tables.host_cell.delete().where(tables.host_cell.c.cell == 1))
    assert gone(world, *names).state is OperationState.SUCCEEDED
    assert retunes(world) == []


@pytest.mark.parametrize("plan_only", [False, True])
def test_open_retune_of_the_host_is_enough_unless_it_only_plans(on: Any, plan_only: bool) -> None:
    world = on
    names = made(world, host="h1") + made(world, host="h2")
    accepted = world.replica("accepting", start=False).retune("h1", HostRetune(plan_only=plan_only), world.ask)
    held_back(world, accepted.operation_id)
    gone(world, *names)
    hosts = [view.retune.host for view in retunes(world)]
    assert sorted(hosts) == (["h1", "h1", "h2"] if plan_only else ["h1", "h2"])


def held_back(world: Any, operation_id: str) -> None:
    """Not to be claimed for an hour."""
    later = world.now() + timedelta(hours=1)
    with world.database.write() as conn:
        mine = tables.operation.c.id == operation_id
        conn.execute(update(tables.operation).where(mine).values(lease_until=later))


def test_two_deletes_at_once_make_one(on: Any, open_database: Any) -> None:
    """The later end waits for the earlier one, and then sees its retune."""
    world = on
    names = made(world)
    accepting = world.replica("accepting", start=False)
    contexts = []
    for name in names:
        deleted = accepting.act(VmsAction(action=VmAction.DELETE, vms=(name,)), world.ask)
        with world.database.write() as conn:
            mine = tables.operation_item.c.operation_id == deleted.operation_id
            conn.execute(update(tables.operation_item).where(mine).values(state="succeeded"))
        ports = prepared(open_database(), world)
        contexts.append(SimpleNamespace(ports=ports, operation_id=deleted.operation_id))

    def end(context: Any) -> None:
        with context.ports.database.write() as conn:
            after_deletes(context, conn)

    earlier, later = contexts
    other = threading.Thread(target=end, args=(later,))
    with earlier.ports.database.write() as conn:
        after_deletes(earlier, conn)
        other.start()
        # If nothing held it up it would be through by now.
        other.join(timeout=1)
        assert other.is_alive(), "the later end waits"
    other.join(timeout=30)
    assert not other.is_alive()
    (view,) = retunes(world)
    assert after(world, view.operation_id) == earlier.operation_id


def prepared(database: Any, world: Any) -> Any:
    planning = Planning(database, silent_after_s=3600, now=world.now)
    return SimpleNamespace(database=database, planning=planning, now=world.now)


def after(world: Any, operation_id: str) -> str:
    """The delete that a retune came from."""
    with world.database.read() as conn:
        return str(store.data_of(conn, operation_id, "accept")["after"])


@pytest.mark.parametrize("asked_by", ["policy", "somebody"])
def test_what_is_not_possible_is_a_failure_only_to_who_asked(on: Any, asked_by: str) -> None:
    world = on
    world.settings(retune_max_moves=0)
    names = made(world)
    gone(world, names[0])
    (view,) = ended_retunes(world)
    assert (view.state, view.problem, view.retune.plan, view.items) == (OperationState.SUCCEEDED, None, None, ())
    assert view.steps[1].detail == "1 moves would open cell 0, 0 are allowed"
    assert world.dispatcher.started[-1].action == "PlanRetune"
    assert world.vm(names[1]).cells == (0,)
    with world.running(name="retuner") as replica:
        asked = replica.retune("h1", HostRetune(bounds=RetuneBounds(moves=0)), Ask(asked_by))
        view = world.ended(asked.operation_id)
    assert (view.state, view.problem.code) == (OperationState.FAILED, "retune.not_possible")


def test_other_failures_are_told(on: Any) -> None:
    world = on
    world.fleet.faults = lambda action, host, vm: Fault.of("hypervisor.failed") if action == "PlanRetune" else None
    gone(world, made(world)[0])
    (view,) = ended_retunes(world)
    assert (view.state, view.problem.code) == (OperationState.FAILED, "hypervisor.failed")


def test_bounds_are_the_policy_s(on: Any) -> None:
    world = on
    world.settings(retune_max_moves=3, retune_max_memory_mib=4096)
    gone(world, made(world)[0])
    (view,) = retunes(world)
    assert view.retune.bounds == RetuneBounds(moves=3, memory_mib=4096)


def test_unusable_settings_are_left_at_their_default_and_said(on: Any) -> None:
    world = on
    world.settings(retune_max_moves=257, retune_max_memory_mib=4096)
    with capture_logs() as logs:
        gone(world, made(world)[0])
    assert retunes(world)[0].retune.bounds == RetuneBounds(memory_mib=4096)
    world.settings(retune_after_deletes=1)
    with capture_logs() as more:
        gone(world, made(world)[0])
    assert len(retunes(world)) == 1, "a number is no yes"
    said = [(one["setting"], one["found"]) for one in (*logs, *more) if one["event"] == "setting.unusable"]
    assert said == [("operations.retune_max_moves", 257), ("operations.retune_after_deletes", 1)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("committed", [False, True])
def test_crash_at_every_write_of_a_delete_and_its_retune(on: Any, database_url: str, committed: bool) -> None:
    """Each write is once the last of its process; the heir ends both, and there is one retune of each host."""
    world = on
    world.settings(**QUICK)
    for at in count(1):
        first, second = made(world, host="h1"), made(world, host="h2")
        known = {view.operation_id for view in retunes(world)}
        database = CrashingDatabase(database_url, committed=committed)
        dying = world.replica(f"dying-{at}", database=database)
        database.arm(at)
        asked = VmsAction(action=VmAction.DELETE, vms=(first[0], second[0]))
        deleted = world.replica("accepting", start=False).act(asked, world.ask)

        def over(operation_id: str = deleted.operation_id, known: set[str] = known) -> bool:
            if not world.over(operation_id):
                return False
            mine = [view for view in retunes(world) if view.operation_id not in known]
            return len(mine) == 2 and all(one.state.ended for one in mine)

        world.wait_until(lambda d=database, o=over: d.dead.is_set() or o(), "crash or end")
        world.bury(dying)
        crashed = database.dead.is_set()
        with world.running(name="heir") as heir:
            assert world.ended(deleted.operation_id).state is OperationState.SUCCEEDED
            mine = [world.ended(view.operation_id) for view in retunes(world) if view.operation_id not in known]
            assert sorted(view.retune.host for view in mine) == ["h1", "h2"]
            assert {view.state for view in mine} == {OperationState.SUCCEEDED}
            assert {after(world, view.operation_id) for view in mine} == {deleted.operation_id}
            assert {world.vm(name).cells for name in (first[1], second[1])} == {(1,)}
            world.settings(retune_after_deletes=False)
            left = heir.act(VmsAction(action=VmAction.DELETE, vms=(first[1], second[1])), world.ask)
            assert world.ended(left.operation_id).state is OperationState.SUCCEEDED
            world.settings(retune_after_deletes=True)
        world.assert_empty()
        if not crashed:
            assert at > 8, "there were writes to die at"
            return
