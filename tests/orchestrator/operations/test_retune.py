# SPDX-License-Identifier: Apache-2.0
"""A host's VMs change their cells by the host's own plan; the record has them where the host has them, always."""

from __future__ import annotations

import random
import threading
from itertools import count
from typing import Any
from uuid import UUID

import pytest
from engine_crashes import QUICK, CrashingDatabase
from sqlalchemy import insert, select

from ppec_contract.api_hosts import HostRetune
from ppec_contract.api_operations import ItemState, OperationState
from ppec_contract.api_placement import Policy
from ppec_contract.api_vms import VmAction, VmResize, VmsAction
from ppec_contract.errors import PpecError
from ppec_contract.retune import RetuneBounds, RetuneWant
from ppec_contract.vm import Size
from ppec_orchestrator.dispatch.simulated import Fault
from ppec_orchestrator.placement.demand import CELL_RESOURCES
from ppec_orchestrator.store import seats, sizes, tables
from ppec_orchestrator.store.seats import shares_over

CELL_0 = HostRetune(want=RetuneWant(cells=(0,)))


@pytest.fixture
def two_cells(world: Any) -> Any:
    """Each host has a second cell, empty and of the first one's size."""
    with world.database.write() as conn:
        first = conn.execute(select(tables.host_cell)).mappings().all()
        conn.execute(insert(tables.host_cell), [{**row, "cell": 1} for row in first])
    return world


def made(world: Any, size: int = 3) -> tuple[str, ...]:
    """VMs in cell 0 of host h1."""
    with world.running(name="maker") as maker:
        view = world.ended(maker.create(world.batch(size, host="h1", policy=Policy.PACK), world.ask).operation_id)
        assert view.state is OperationState.SUCCEEDED, view.problem
    names = tuple(item.name for item in view.items)
    assert {world.vm(name).cells for name in names} == {(0,)}
    return names


def used(world: Any) -> dict[int, tuple[int, int]]:
    """Of h1, by the record: cores and memory in use per cell."""
    with world.database.read() as conn:
        rows = conn.execute(select(tables.host_cell).where(tables.host_cell.c.host_id == 1))
        return {row.cell: (row.cores_used, row.memory_used_mib) for row in rows}


def assert_exact(world: Any) -> None:
    """Each VM is in the cells that its host has it in, and the sums are what they sum up."""
    there = {str(vm.vm_id): vm.cells for mine in world.fleet.vms.values() for vm in mine.values()}
    with world.database.read() as conn:
        rows = conn.execute(select(tables.allocation_cell)).all()
        sums = {(row.host_id, row.cell): (0, 0) for row in conn.execute(select(tables.host_cell))}
        hosts = dict(conn.execute(select(tables.allocation.c.vm_id, tables.allocation.c.host_id)).all())
        found = {(row.host_id, row.cell): (row.cores_used, row.memory_used_mib) for row in conn.execute(
            select(tables.host_cell)
        )}  # fmt: skip
    recorded: dict[str, tuple[int, ...]] = {}
    for row in sorted(rows, key=lambda row: row.cell):
        recorded[str(row.vm_id)] = (*recorded.get(str(row.vm_id), ()), row.cell)
        cores, memory_mib = sums[hosts[row.vm_id], row.cell]
        sums[hosts[row.vm_id], row.cell] = (cores + row.cores, memory_mib + row.memory_mib)
    assert recorded == there
    assert found == sums


def retuned(world: Any, asked: HostRetune = CELL_0) -> Any:
    with world.running(name="retuner") as replica:
        return world.ended(replica.retune("h1", asked, world.ask).operation_id)


def test_plan_is_made_kept_carried_out_and_recorded(two_cells: Any) -> None:
    world, names = two_cells, made(two_cells)
    before = used(world)
    view = retuned(world)
    assert (view.kind, view.state) == ("host.retune", OperationState.SUCCEEDED), view.problem
    assert [(step.name, step.state) for step in view.steps] == [
        ("accept", "done"), ("plan", "done"), ("retune", "done"),
    ]  # fmt: skip
    plan = view.retune.plan
    assert (view.retune.host, view.retune.plan_only, plan.opened) == ("h1", False, (0,))
    assert sorted(move.name for move in plan.moves) == sorted(names)
    assert [(item.name, item.state, item.host) for item in view.items] == [
        (name, ItemState.SUCCEEDED, "h1") for name in sorted(names)
    ]
    assert [request.action for request in world.dispatcher.started][-2:] == ["PlanRetune", "RetuneHost"]
    assert world.dispatcher.started[-1].hosts["h1"].parameters["plan"] == plan.model_dump(mode="json")
    assert {world.vm(name).cells for name in names} == {(1,)}
    assert {pin.pcpu >= 1000 for name in names for pin in world.vm(name).pins} == {True}
    assert used(world) == {0: before[1], 1: before[0]}
    assert_exact(world)
    assert view.counters["runs"] == 2


def test_plan_only_changes_nothing(two_cells: Any) -> None:
    world, names = two_cells, made(two_cells)
    view = retuned(world, CELL_0.model_copy(update={"plan_only": True}))
    assert (view.state, view.items, len(view.retune.plan.moves)) == (OperationState.SUCCEEDED, (), 3)
    assert view.steps[1].detail == "3 moves, 3072 MiB, opens cells 0"
    assert world.dispatcher.started[-1].action == "PlanRetune"
    assert {world.vm(name).cells for name in names} == {(0,)}
    assert_exact(world)


def test_what_fits_already_needs_no_run(two_cells: Any) -> None:
    world = two_cells
    view = retuned(world)
    assert (view.state, view.retune.plan.moves) == (OperationState.SUCCEEDED, ())
    assert [request.action for request in world.dispatcher.started] == ["PlanRetune"]


def test_plan_that_is_not_possible_is_the_operation_s_problem(two_cells: Any) -> None:
    world = two_cells
    made(world)
    view = retuned(world, HostRetune(want=RetuneWant(cells=(0,)), bounds=RetuneBounds(moves=2)))
    assert (view.state, view.problem.code) == (OperationState.FAILED, "retune.not_possible")
    assert (view.items, view.retune.plan) == ((), None)
    assert [(step.name, step.state) for step in view.steps] == [
        ("accept", "undone"), ("plan", "failed"), ("retune", "pending"),
    ]  # fmt: skip
    assert_exact(world)


def test_retune_that_was_taken_back_changes_nothing(two_cells: Any) -> None:
    world, names = two_cells, made(two_cells)
    before = used(world)
    world.fleet.faults = lambda action, host, vm: Fault.of("retune.failed") if action == "RetuneHost" else None
    view = retuned(world)
    assert (view.state, view.problem.code) == (OperationState.FAILED, "retune.failed")
    assert {item.problem.code for item in view.items} == {"retune.failed"}
    assert {world.vm(name).cells for name in names} == {(0,)}
    assert used(world) == before
    assert_exact(world)


def test_vms_that_stayed_moved_are_recorded_where_they_are(two_cells: Any) -> None:
    world, names = two_cells, sorted(made(two_cells))
    second = world.vm(names[1]).vm_id

    def faults(action: str, host: str, vm: UUID) -> Fault | None:
        return Fault.of("retune.failed", done=True) if (action, vm) == ("RetuneHost", second) else None

    world.fleet.faults = faults
    view = retuned(world)
    assert (view.state, view.problem.code) == (OperationState.FAILED, "retune.failed")
    assert [world.vm(name).cells for name in names] == [(1,), (1,), (0,)]
    assert_exact(world)
    world.fleet.faults = lambda action, host, vm: None
    assert retuned(world).state is OperationState.SUCCEEDED
    assert [world.vm(name).cells for name in names] == [(1,), (1,), (1,)]
    assert_exact(world)


def test_answer_that_never_came_is_made_up_for_by_the_next_one(two_cells: Any) -> None:
    world, names = two_cells, sorted(made(two_cells))
    lost = Fault.of("host.unreachable", whole_host=True, done=True)
    world.fleet.faults = lambda action, host, vm: lost if action == "RetuneHost" else None
    view = retuned(world)
    assert (view.state, view.problem.code) == (OperationState.FAILED, "host.unreachable")
    world.fleet.faults = lambda action, host, vm: None
    with world.running(name="again") as replica:
        for name in names:
            asked = VmsAction(action=VmAction.PAUSE, vms=(name,))
            world.ended(replica.act(asked, world.ask).operation_id)
    assert_exact(world)
    assert world.vm(names[0]).cells == (1,)


def test_vms_that_another_operation_works_on_are_not_moved(two_cells: Any) -> None:
    world, names = two_cells, made(two_cells)
    waiting = world.replica("accepting", start=False)
    # Nobody who knows the kind works on it, so it stays as it is.
    stop = waiting.act(VmsAction(action=VmAction.STOP, vms=names[:1]), world.ask)
    with world.database.write() as conn:
        conn.execute(tables.operation.update().where(tables.operation.c.id == stop.operation_id).values(kind="vm.new"))
    view = retuned(world)
    assert (view.state, view.problem.code) == (OperationState.FAILED, "vm.wrong_state")
    assert stop.operation_id in view.problem.detail
    assert (view.items, view.retune.plan) == ((), None)
    assert_exact(world)


def test_a_host_s_plan_for_another_host_s_vm_changes_nothing(two_cells: Any) -> None:
    """Were it to be believed, a host could say of any VM what state it is in, and where."""
    world = two_cells
    with world.running(name="maker") as maker:
        view = world.ended(maker.create(world.batch(1, host="h2", policy=Policy.PACK), world.ask).operation_id)
    (name,) = (item.name for item in view.items)
    vm_id = world.vm(name).vm_id
    world.fleet.vms["h1"][vm_id] = world.fleet.vms["h2"][vm_id]
    view = retuned(world)
    assert (view.state, view.problem.code) == (OperationState.FAILED, "vm.wrong_state")
    assert view.problem.details == {"host": "h1", "placed_on": "h2"}
    assert (view.items, view.retune.plan, world.vm(name).cells) == ((), None, (0,))
    assert world.dispatcher.started[-1].action == "PlanRetune"


def test_vms_of_a_retune_are_nobody_else_s(two_cells: Any) -> None:
    world, names = two_cells, made(two_cells)
    carrying_out = world.dispatcher.gates["RetuneHost"] = threading.Event()
    with world.running(name="retuner") as replica:
        accepted = replica.retune("h1", CELL_0, world.ask)
        world.wait_until(lambda: world.show(accepted.operation_id).items, "it knows its VMs")
        with pytest.raises(PpecError) as refused:
            replica.act(VmsAction(action=VmAction.DELETE, vms=names[:1]), world.ask)
        assert refused.value.code == "vm.wrong_state"
        carrying_out.set()
        assert world.ended(accepted.operation_id).state is OperationState.SUCCEEDED


def test_cancelled_retune_is_found_where_it_got(two_cells: Any) -> None:
    world = two_cells
    made(world)
    world.dispatcher.gate.clear()
    with world.running(name="retuner") as replica:
        accepted = replica.retune("h1", CELL_0, world.ask)
        world.wait_until(lambda: len(world.dispatcher.started) == 2, "it has asked for a plan")
        replica.cancel(accepted.operation_id)
        view = world.ended(accepted.operation_id)
    world.dispatcher.gate.set()
    assert view.state is OperationState.CANCELLED
    assert_exact(world)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("committed", [False, True])
@pytest.mark.parametrize("broken", [False, True])
def test_crash_at_every_write_of_a_retune(two_cells: Any, database_url: str, committed: bool, broken: bool) -> None:
    """Each write is once the last of its process; the next one carries out the same plan, and the record is exact."""
    world = two_cells
    world.settings(**QUICK)
    names = made(world)
    second = world.vm(sorted(names)[1]).vm_id
    stays = Fault.of("retune.failed", done=True)
    for at in count(1):
        cell = world.vm(names[0]).cells[0]
        asked = HostRetune(want=RetuneWant(cells=(cell,)))
        database = CrashingDatabase(database_url, committed=committed)
        dying = world.replica(f"dying-{at}", database=database)
        database.arm(at)
        if broken:
            world.fleet.faults = lambda action, host, vm: stays if (action, vm) == ("RetuneHost", second) else None
        accepted = world.replica("accepting", start=False).retune("h1", asked, world.ask)
        world.wait_until(lambda a=accepted, d=database: d.dead.is_set() or world.over(a.operation_id), "crash or end")
        world.bury(dying)
        crashed = database.dead.is_set()
        with world.running(name="heir"):
            view = world.ended(accepted.operation_id)
        assert view.state is (OperationState.FAILED if broken else OperationState.SUCCEEDED), view.problem
        assert_exact(world)
        if broken:
            world.fleet.faults = lambda action, host, vm: None
            assert retuned(world, asked).state is OperationState.SUCCEEDED
            assert_exact(world)
        if not crashed:
            assert at > 4, "there were writes to die at"
            return


def share(cores: int, memory_mib: int) -> dict[Any, int]:
    return {**dict.fromkeys(CELL_RESOURCES, 0), "cores": cores, "memory_mib": memory_mib}


def test_shares_of_a_vm_go_where_its_host_has_it() -> None:
    assert shares_over({0: share(2, 1024)}, (1,)) == {1: share(2, 1024)}
    two = {0: share(2, 1024), 1: share(1, 512)}
    assert shares_over(two, (1, 3)) == {1: share(1, 512), 3: share(2, 1024)}
    assert shares_over({0: share(3, 1025)}, (1, 2)) == {1: share(2, 513), 2: share(1, 512)}
    assert shares_over({0: share(2, 513), 2: share(1, 512)}, (5,)) == {5: share(3, 1025)}


def test_cell_that_the_host_never_reported_moves_nothing(world: Any) -> None:
    """There is one cell by the record, whatever the host says."""
    names = made(world)
    before = used(world)
    assert retuned(world).state is OperationState.SUCCEEDED
    assert {world.vm(name).cells for name in names} == {(0,)}
    assert used(world) == before


@pytest.mark.parametrize("seed", range(6))
def test_whatever_goes_wrong_the_record_becomes_what_the_host_holds(two_cells: Any, seed: int) -> None:
    """Retunes, resizes and power switches, done or not, told of or not; then the host reports once."""
    world, names, dice = two_cells, made(two_cells), random.Random(seed)

    def faults(action: str, host: str, vm: UUID) -> Fault | None:
        if dice.random() > 0.3:
            return None
        code = dice.choice(["host.unreachable", "hypervisor.failed", "agent.unavailable"])
        return Fault.of(code, whole_host=dice.random() < 0.5, done=dice.random() < 0.5)

    world.fleet.faults = faults
    done = 0
    with world.running() as replica:
        for _ in range(10):
            name, what = dice.choice(names), dice.choice(["retune", "retune", "resize", "resize", "stop", "start"])
            try:
                if what == "retune":
                    accepted = replica.retune("h1", HostRetune(want=RetuneWant(cells=(dice.randrange(2),))), world.ask)
                elif what == "resize":
                    size = VmResize(vcpus=dice.choice([2, 4, 8]), memory_mib=dice.choice([512, 2048]))
                    accepted = replica.resize(name, size, world.ask)
                else:
                    accepted = replica.act(VmsAction(action=VmAction(what), vms=(name,)), world.ask)
            except PpecError as refused:
                if refused.code != "host.no_capacity":
                    raise
                continue
            done += world.ended(accepted.operation_id).state is OperationState.SUCCEEDED
    assert done, "something worked out"
    infos = dict(world.fleet.vms["h1"])
    with world.database.write() as conn:
        seats.follow(conn, {vm_id: info.cells for vm_id, info in infos.items()})
        sizes.follow_report(conn, infos)
    assert_exact(world)
    with world.database.read() as conn:
        shares = {row.vm_id: row for row in conn.execute(select(tables.allocation_cell))}
    for vm_id, info in infos.items():
        view, later = world.vm(str(vm_id)), info.pending or info
        assert (view.vcpus, view.memory_mib) == (later.vcpus, later.memory_mib)
        assert view.held == (Size(vcpus=info.vcpus, memory_mib=info.memory_mib) if info.pending else None)
        largest = (max(info.vcpus, later.vcpus) // 2, max(info.memory_mib, later.memory_mib))
        assert (shares[vm_id].cores, shares[vm_id].memory_mib) == largest
