# SPDX-License-Identifier: Apache-2.0
"""VMs for which others change cells first: planned, shown, and made, or made elsewhere; the record agrees with the
hosts to the cell, whatever breaks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import Any
from uuid import UUID

import pytest
from cells_opened import SEVEN, WIDE, actions, announce, assert_exact, created, resize_cell, split_host, wide
from engine_crashes import QUICK, CrashingDatabase
from sqlalchemy import insert, select, update

from ppec_contract.api_hosts import HostRetune
from ppec_contract.api_operations import ItemState, OperationState
from ppec_contract.api_placement import Policy, VmSize
from ppec_contract.api_vms import BatchMode, VmAction, VmsAction, VmsCreate
from ppec_contract.errors import PpecError
from ppec_contract.retune import RetuneWant
from ppec_contract.version import Capability
from ppec_orchestrator.dispatch import simulated
from ppec_orchestrator.dispatch.simulated import Fault
from ppec_orchestrator.operations.plan_shown import show_plan
from ppec_orchestrator.store import seats, tables


@pytest.fixture
def split(world: Any) -> Any:
    return split_host(world)


def test_without_moves_it_is_refused_and_told_which_would_help(split: Any) -> None:
    with split.running(name="creator") as replica, pytest.raises(PpecError, match="found no place") as refused:
        replica.create(wide(max_moves=0), split.ask)
    kinds = [change["kind"] for change in refused.value.details["changes"]]
    assert "retune" in kinds
    assert_exact(split)


OLDER = tuple(each for each in Capability if each is not Capability.SEVERAL_RETUNES)


def test_no_cell_is_opened_on_a_host_whose_agent_knows_one_retune_of_an_operation(split: Any) -> None:
    """It would answer the second with the first one's result. Its own cells are opened once it is up to date."""
    with split.running(name="creator") as replica:
        announce(split, "h1", capabilities=OLDER)
        with pytest.raises(PpecError, match="found no place") as refused:
            replica.create(wide(), split.ask)
        assert "retune" not in [change["kind"] for change in refused.value.details["changes"]]
        announce(split, "h1")
        view = split.ended(replica.create(wide(), split.ask).operation_id)
    assert view.state is OperationState.SUCCEEDED, view.problem
    assert_exact(split)


def test_a_host_whose_agent_is_older_is_still_retuned_by_hand(split: Any) -> None:
    announce(split, "h1", capabilities=OLDER)
    with split.running(name="creator") as replica:
        asked = HostRetune(want=RetuneWant(cells=(1,)))
        assert split.ended(replica.retune("h1", asked, split.ask).operation_id).state is OperationState.SUCCEEDED
    assert split.vm("right").cells == (0,)
    assert_exact(split)


def test_the_host_opens_the_cell_and_then_makes_the_vm(split: Any) -> None:
    view = created(split, wide())
    assert view.state is OperationState.SUCCEEDED, view.problem
    assert actions(split) == ["PlanRetune", "RetuneHost", "CreateVms"]
    want = split.dispatcher.started[0].hosts["h1"].parameters
    assert (want["want"]["cells"], want["want"]["vcpus"], want["bounds"]["moves"]) == ([1], 16, 1)
    assert (split.vm("wide").host, split.vm("wide").cells, split.vm("right").cells) == ("h1", (1,), (0,))
    assert_exact(split)


def test_what_fits_as_it_is_moves_nobody(split: Any) -> None:
    view = created(split, wide(size=VmSize(vcpus=12, memory_mib=1024, disk_mib=8192)))
    assert view.state is OperationState.SUCCEEDED, view.problem
    assert actions(split) == ["CreateVms"]
    assert_exact(split)


def test_a_batch_is_made_in_the_order_of_its_plan(split: Any) -> None:
    """Beside `wide`, once `right` has left its cell, there is a core for `late`."""
    late = {"name": "late", "size": VmSize(vcpus=2, memory_mib=1024, disk_mib=8192)}
    resize_cell(split, 1, 1, cores=9)
    items = ({"name": "wide", "size": WIDE, "priority": 1}, late)
    view = created(split, wide(name=None, size=None, items=items, mode=BatchMode.BEST_EFFORT, host="h1"))
    assert view.state is OperationState.SUCCEEDED, view.problem
    assert actions(split) == ["PlanRetune", "RetuneHost", "CreateVms"]
    assert {split.vm("wide").cells, split.vm("late").cells} == {(1,)}
    assert_exact(split)


def test_the_plan_shows_its_moves_and_is_carried_out_as_shown(split: Any) -> None:
    with split.running(name="creator") as replica:
        ports = replica._ports
        plan = show_plan(ports.database, ports.planning, split.now, wide(), split.ask.caller)
        (placed,) = plan.placed
        assert (placed.host, placed.cells, placed.candidates) == ("h1", (1,), 1)
        assert [(m.vm, m.cells_before, m.cells_after) for m in placed.moves] == [("right", (1,), (0,))]
        assert plan.executable
        assert actions(split) == []
        view = split.ended(replica.execute(plan.plan_id, split.ask).operation_id)
    assert view.state is OperationState.SUCCEEDED, view.problem
    assert actions(split) == ["PlanRetune", "RetuneHost", "CreateVms"]
    assert_exact(split)


def test_a_plan_whose_vm_has_moved_since_is_outdated(split: Any) -> None:
    with split.running(name="creator") as replica:
        ports = replica._ports
        plan = show_plan(ports.database, ports.planning, split.now, wide(), split.ask.caller)
        asked = HostRetune(want=RetuneWant(cells=(1,)))
        assert split.ended(replica.retune("h1", asked, split.ask).operation_id).state is OperationState.SUCCEEDED
        with pytest.raises(PpecError) as outdated:
            replica.execute(plan.plan_id, split.ask)
    assert outdated.value.code == "plan.outdated"
    assert_exact(split)


@pytest.mark.parametrize("action", ["PlanRetune", "RetuneHost"])
@pytest.mark.parametrize("code", ["retune.not_possible", "agent.busy"])
def test_a_host_that_opens_nothing_is_left_for_another(split: Any, action: str, code: str) -> None:
    """h2 has room by now; the moved VM is where its host has it."""

    def faults(which: str, host: str, vm_id: UUID) -> Fault | None:
        resize_cell(split, 2, 0, cores=10)
        return Fault.of(code) if (which, host) == (action, "h1") else None

    split.fleet.faults = faults
    view = created(split, wide())
    assert view.state is OperationState.SUCCEEDED, view.problem
    assert (split.vm("wide").host, split.vm("right").cells) == ("h2", (1,))
    assert_exact(split)


def test_another_host_opens_its_own_cells_by_a_plan_of_its_own(split: Any) -> None:
    """h2 has two cells as h1 has, with VMs of its own in them."""
    with split.database.write() as conn:
        first = conn.execute(select(tables.host_cell).where(tables.host_cell.c.host_id == 2)).mappings().one()
        conn.execute(insert(tables.host_cell), [{**first, "cell": 1, "cores_used": 0, "memory_used_mib": 0}])
        conn.execute(update(tables.host).where(tables.host.c.id == 2).values(report_digest="two cells"))
    with split.running(name="maker") as maker:
        size = VmSize(vcpus=14, memory_mib=1024, disk_mib=8192)
        for name in ("fills", "stays"):
            asked = VmsCreate(image="debian", name=name, size=size, policy=Policy.PACK, host="h2")
            assert split.ended(maker.create(asked, split.ask).operation_id).state is OperationState.SUCCEEDED
        gone = maker.act(VmsAction(action=VmAction.DELETE, vms=("fills",)), split.ask)
        split.ended(gone.operation_id)
    busy, stays = split.vm("busy-2"), split.vm("stays")
    assert (busy.cells, stays.cells) == ((0,), (1,))
    split.dispatcher.started.clear()
    split.fleet.faults = lambda action, host, vm_id: (
        Fault.of("retune.failed") if (action, host) == ("RetuneHost", "h1") else None
    )
    view = created(split, wide())
    assert view.state is OperationState.SUCCEEDED, view.problem
    assert actions(split) == ["PlanRetune", "RetuneHost", "PlanRetune", "RetuneHost", "CreateVms"]
    assert (split.vm("wide").host, split.vm("wide").cells, split.vm("busy-2").cells) == ("h2", (0,), (1,))
    assert_exact(split)


def test_without_another_host_it_fails_for_the_hosts_reason_and_leaves_nothing(split: Any) -> None:
    split.fleet.faults = lambda action, host, vm_id: Fault.of("retune.failed") if action == "RetuneHost" else None
    view = created(split, wide())
    assert view.state is OperationState.FAILED
    (item,) = view.items
    assert (item.state, item.problem.code) == (ItemState.FAILED, "retune.failed")
    assert split.vm("right").cells == (1,)
    assert_exact(split)


def test_a_vm_that_is_at_work_elsewhere_is_not_moved(split: Any) -> None:
    asked = VmsAction(action=VmAction.STOP, vms=("right",))
    stop = split.replica("accepting", start=False).act(asked, split.ask)
    with split.database.write() as conn:
        theirs = {"state": "running", "owner": "somebody", "lease_until": split.now() + timedelta(hours=1)}
        conn.execute(update(tables.operation).where(tables.operation.c.id == stop.operation_id).values(theirs))
    view = created(split, wide())
    assert view.state is OperationState.FAILED
    assert view.items[0].problem.code == "retune.outdated"
    assert stop.operation_id in view.items[0].problem.detail
    assert actions(split) == ["PlanRetune"]
    assert_exact(split)


@contextmanager
def changed_before_the_commit(world: Any, cores: int) -> Iterator[Any]:
    """A replica whose first plan is made before the first cell of h1 is told to have so many cores."""
    with world.running(name="creator") as replica:
        planning = replica._ports.planning
        planned = planning.planned

        def too_early(request: Any, course: Any) -> Any:
            found = planned(request, course)
            if course.passes == 1:
                resize_cell(world, 1, 0, cores=cores)
            return found

        planning.planned = too_early
        yield replica


def test_the_room_is_looked_at_as_it_will_be(split: Any) -> None:
    """There is none for the moved VM any more: the plan is not committed."""
    with changed_before_the_commit(split, cores=5) as replica, pytest.raises(PpecError) as refused:
        replica.create(wide(), split.ask)
    assert refused.value.code == "placement.no_capacity"
    assert_exact(split)


def test_a_host_that_changed_in_other_ways_still_has_the_room(split: Any) -> None:
    """The room is counted again, with the moves."""
    with changed_before_the_commit(split, cores=8) as replica:
        view = split.ended(replica.create(wide(), split.ask).operation_id)
    assert view.state is OperationState.SUCCEEDED, view.problem
    assert view.counters["planning_passes"] == 1
    assert_exact(split)


def test_a_move_that_another_commit_counts_on_is_not_counted_twice(split: Any) -> None:
    """Both are for the cell that `right` leaves: what it leaves is enough for one of them."""
    other = split.replica("other", start=False)
    with split.running(name="creator") as replica:
        planning = replica._ports.planning
        planned = planning.planned

        def too_early(request: Any, course: Any) -> Any:
            found = planned(request, course)
            if course.passes == 1:
                other.create(wide(name="theirs", size=SEVEN, host="h1"), split.ask)
            return found

        planning.planned = too_early
        with pytest.raises(PpecError) as refused:
            replica.create(wide(name="ours", size=SEVEN, host="h1"), split.ask)
    assert refused.value.code == "placement.no_capacity"


def test_a_vm_that_is_not_made_yet_is_not_moved(split: Any) -> None:
    """Its host does not have it: it would not move, and `wide` would have its place. `left` costs more to move."""
    with split.running(name="maker") as maker:
        gone = maker.act(VmsAction(action=VmAction.DELETE, vms=("right",)), split.ask)
        split.ended(gone.operation_id)
        size = VmSize(vcpus=8, memory_mib=1024, disk_mib=8192)
        filler = VmsCreate(image="debian", name="filler", size=size, policy=Policy.PACK, host="h1")
        split.ended(maker.create(filler, split.ask).operation_id)
    size = VmSize(vcpus=4, memory_mib=512, disk_mib=8192)
    waiting = split.replica("accepting", start=False).create(wide(name="waits", size=size, host="h1"), split.ask)
    with split.database.write() as conn:
        theirs = {"state": "running", "owner": "somebody", "lease_until": split.now() + timedelta(hours=1)}
        conn.execute(update(tables.operation).where(tables.operation.c.id == waiting.operation_id).values(theirs))
    with split.running(name="maker") as maker:
        gone = maker.act(VmsAction(action=VmAction.DELETE, vms=("filler",)), split.ask)
        split.ended(gone.operation_id)
    assert (split.vm("waits").cells, split.vm("left").cells) == ((1,), (0,))
    split.dispatcher.started.clear()
    view = created(split, wide(host="h1"))
    assert view.state is OperationState.SUCCEEDED, view.problem
    assert actions(split) == ["PlanRetune", "RetuneHost", "CreateVms"]
    assert [split.vm(name).cells for name in ("wide", "left", "waits")] == [(0,), (1,), (1,)]


def test_a_host_that_would_move_more_than_is_allowed_moves_nobody(split: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_much(*asked: Any) -> Any:
        plan = planned(*asked)
        (move,) = plan.moves
        return plan.model_copy(update={"moves": (move, move.model_copy(update={"vm_id": UUID(int=7)}))})

    planned = simulated.planned
    monkeypatch.setattr(simulated, "planned", too_much)
    view = created(split, wide())
    assert view.state is OperationState.FAILED
    assert "2 moves" in view.items[0].problem.detail
    assert actions(split)[0] == "PlanRetune"
    assert "RetuneHost" not in actions(split)
    assert_exact(split)


# --- several openings on one host -------------------------------------------------------------------------------------


@pytest.fixture
def quarters(world: Any) -> Any:
    """h1 has four cells, each half full of a VM of its own; only there a VM of a whole cell can come."""
    world.settings(**QUICK)
    announce(world)
    with world.database.write() as conn:
        first = conn.execute(select(tables.host_cell).where(tables.host_cell.c.host_id == 1)).mappings().one()
        conn.execute(insert(tables.host_cell), [{**first, "cell": number} for number in range(1, 4)])
        conn.execute(update(tables.host).where(tables.host.c.id != 1).values(draining=True))
    world.fleet.cells = 4
    size = VmSize(vcpus=8, memory_mib=1024, disk_mib=8192)
    with world.running(name="maker") as maker:
        for number in range(8):
            asked = VmsCreate(image="debian", name=f"v{number}", size=size, policy=Policy.PACK)
            assert world.ended(maker.create(asked, world.ask).operation_id).state is OperationState.SUCCEEDED
        gone = maker.act(
            VmsAction(action=VmAction.DELETE, vms=tuple(f"v{number}" for number in (1, 3, 5, 7))), world.ask
        )
        world.ended(gone.operation_id)
    world.dispatcher.started.clear()
    return world


def two_wide(world: Any) -> Any:
    return created(world, wide(count=2, mode=BatchMode.BEST_EFFORT))


def test_a_cell_is_opened_after_the_other(quarters: Any) -> None:
    view = two_wide(quarters)
    assert view.state is OperationState.SUCCEEDED, view.problem
    assert actions(quarters) == ["PlanRetune", "RetuneHost", "CreateVms"] * 2
    assert_exact(quarters)


def test_each_vm_has_an_answer_of_its_own(quarters: Any) -> None:
    """The host has no time for the first one; what it said of that is not its answer to the second."""
    asked: list[str] = []

    def faults(action: str, host: str, vm_id: UUID) -> Fault | None:
        asked.append(action)
        return Fault.of("agent.busy") if asked.count("PlanRetune") == 1 and action == "PlanRetune" else None

    quarters.fleet.faults = faults
    view = two_wide(quarters)
    assert view.state is OperationState.PARTIAL
    assert actions(quarters)[:4] == ["PlanRetune", "PlanRetune", "RetuneHost", "CreateVms"]
    assert sorted(item.state for item in view.items) == [ItemState.FAILED, ItemState.SUCCEEDED]
    assert_exact(quarters)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("committed", [False, True])
def test_crash_at_every_write_of_a_create_with_a_retune(split: Any, database_url: str, committed: bool) -> None:
    for at in count(1):
        database = CrashingDatabase(database_url, committed=committed)
        dying = split.replica(f"dying-{at}", database=database)
        database.arm(at)
        name = f"wide-{at}"
        accepted = split.replica("accepting", start=False).create(wide(name=name), split.ask)
        split.wait_until(lambda a=accepted, d=database: d.dead.is_set() or split.over(a.operation_id), "crash or end")
        split.bury(dying)
        crashed = database.dead.is_set()
        with split.running(name="heir") as heir:
            view = split.ended(accepted.operation_id)
            assert view.state is OperationState.SUCCEEDED, (at, view.problem, view.items)
            assert_exact(split)
            split.assert_consistent()
            assert (split.vm(name).cells, split.vm("right").cells) == ((1,), (0,))
            made = [vm for action, _, vm in split.fleet.deeds if action == "CreateVms"]
            assert len(made) == len(set(made)), "nothing was made twice"
            gone = heir.act(VmsAction(action=VmAction.DELETE, vms=(name,)), split.ask)
            assert split.ended(gone.operation_id).state is OperationState.SUCCEEDED
            _back(split)
        if not crashed:
            assert at > 5, "there were writes to die at"
            return


def _back(world: Any) -> None:
    """`right` is in the second cell again: for the host, and so for the record."""
    right = world.vm("right")
    mine = world.fleet.vms["h1"]
    mine[right.vm_id] = mine[right.vm_id].model_copy(update={"cells": (1,)})
    with world.database.write() as conn:
        seats.follow(conn, {right.vm_id: (1,)})
