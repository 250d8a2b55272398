# SPDX-License-Identifier: Apache-2.0
"""Many clients and the last room: as many win as there is room, by one orchestrator and by two on one database."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Connection, func, insert, select, update
from starlette.testclient import TestClient
from storage_given import POOL, give_storage
from storage_sums import assert_storage_summed

from ppec_contract.api_placement import GroupRule, Policy, VmSize
from ppec_contract.api_vms import BatchMode, VmsCreate
from ppec_contract.errors import PpecError
from ppec_orchestrator.ipdb.provider import BuiltIn
from ppec_orchestrator.operations import planning as planning_module
from ppec_orchestrator.operations.creation import Creation
from ppec_orchestrator.operations.enqueueing import Ask
from ppec_orchestrator.operations.planning import Planned, Planning
from ppec_orchestrator.placement.plan import Placement, Plan
from ppec_orchestrator.placement.reasons import Reason
from ppec_orchestrator.placement.request import PlanRequest, Profile, Shape, VmRequest, Where
from ppec_orchestrator.store import tables as t
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.operations import NewOperation
from ppec_orchestrator.store.reservations import lock_hosts
from ppec_orchestrator.store.vm_groups import group_of, insert_groups

CLIENTS = 64
VCPUS, MEMORY_MIB, DISK_MIB = 2, 1024, 8192


def acceptor(world: Any, database: Database) -> Creation:
    return Creation(database, Planning(database, silent_after_s=3600, now=world.now), world.now, BuiltIn())


def leave_room_for(database: Database, vms: int) -> None:
    """Of small VMs, over the hosts of the world as evenly as it goes."""
    with database.write() as conn:
        hosts = conn.execute(select(t.host.c.id).order_by(t.host.c.id)).scalars().all()
        for at, host_id in enumerate(hosts):
            mine = vms // len(hosts) + (at < vms % len(hosts))
            room = {"cores": mine, "memory_mib": mine * MEMORY_MIB}
            conn.execute(update(t.host_cell).where(t.host_cell.c.host_id == host_id).values(room))
            conn.execute(update(t.host).where(t.host.c.id == host_id).values(disk_mib=10**7))


def race(acceptors: list[Creation], bodies: list[VmsCreate]) -> Counter[str]:
    """All at once; how each ended."""
    start = threading.Barrier(len(bodies))

    def one(number: int) -> str:
        start.wait(60)
        try:
            made = acceptors[number % len(acceptors)].create(bodies[number], Ask(f"client-{number}"))
        except PpecError as error:
            return error.code
        assert isinstance(made, NewOperation)
        return "won"

    with ThreadPoolExecutor(len(bodies)) as pool:
        return Counter(pool.map(one, range(len(bodies))))


def check_sums(database: Database, vms: int, *, pooled: bool = False) -> None:
    """Every table says that so many small VMs are there, and no host has given more than it has."""
    with database.read() as conn:
        cells = conn.execute(select(t.host_cell)).all()
        assert all(cell.cores_used <= cell.cores and cell.memory_used_mib <= cell.memory_mib for cell in cells)
        assert sum(cell.cores_used for cell in cells) == vms
        assert sum(cell.memory_used_mib for cell in cells) == vms * MEMORY_MIB
        own_mib = conn.execute(select(func.sum(t.host.c.disk_used_mib))).scalar_one()
        pools_mib = conn.execute(select(func.sum(t.host_pool.c.used_mib))).scalar_one()
        assert (pools_mib if pooled else own_mib) == vms * DISK_MIB
        assert (own_mib if pooled else pools_mib) in {0, None}
        for table in (t.vm, t.allocation, t.allocation_cell, t.operation_item):
            assert conn.execute(select(func.count()).select_from(table)).scalar() == vms, table.name
        granted = conn.execute(select(t.address.c.vm_id).where(t.address.c.vm_id.is_not(None))).scalars().all()
        assert len(set(granted)) == len(granted) == vms
        by_host = select(t.allocation.c.host_id, func.sum(t.allocation_cell.c.cores)).join(
            t.allocation_cell, t.allocation_cell.c.vm_id == t.allocation.c.vm_id
        )
        held = dict(conn.execute(by_host.group_by(t.allocation.c.host_id)).all())
        assert {cell.host_id: cell.cores_used for cell in cells if cell.cores_used} == held


@pytest.mark.parametrize("orchestrators", [1, 2])
@pytest.mark.parametrize("slots", [1, 10, 100])
def test_of_64_clients_as_many_win_as_there_are_slots(
    world: Any, open_database: Callable[[], Database], slots: int, orchestrators: int
) -> None:
    """For a hundred slots each client asks for four VMs: a hundred and more are wanted by 64 whatever happens."""
    each = 1 if slots < CLIENTS else 4
    leave_room_for(world.database, slots)
    acceptors = [acceptor(world, open_database()) for _ in range(orchestrators)]
    policies = list(Policy)
    bodies = [world.batch(each, policy=policies[number % len(policies)]) for number in range(CLIENTS)]
    ends = race(acceptors, bodies)
    assert ends == {"won": slots // each, "placement.no_capacity": CLIENTS - slots // each}
    check_sums(world.database, slots)


@pytest.mark.parametrize("orchestrators", [1, 2])
@pytest.mark.parametrize("what", ["pool", "drives"])
def test_of_64_clients_as_many_win_as_there_is_left_of_pools_or_drives(
    world: Any, open_database: Callable[[], Database], what: str, orchestrators: int
) -> None:
    """Of all else there is enough. On three hosts, ten slots and parts that are too small for one more."""
    leave_room_for(world.database, 300)
    for number, mine in ((1, 4), (2, 3), (3, 3)):
        give_storage(world, f"h{number}", pool_mib=mine * DISK_MIB + DISK_MIB - 1, drives=2 * mine + 1)
    size = VmSize(vcpus=VCPUS, memory_mib=MEMORY_MIB, disk_mib=DISK_MIB, nvme_drives=2)
    wanted: dict[str, Any] = {"pool": POOL} if what == "pool" else {"flavor": None, "size": size}
    acceptors = [acceptor(world, open_database()) for _ in range(orchestrators)]
    policies = list(Policy)
    bodies = [world.batch(1, policy=policies[number % len(policies)], **wanted) for number in range(CLIENTS)]
    assert race(acceptors, bodies) == {"won": 10, "placement.no_capacity": CLIENTS - 10}
    check_sums(world.database, 10, pooled=what == "pool")
    with world.database.read() as conn:
        assert_storage_summed(conn)


@pytest.mark.parametrize("orchestrators", [1, 2])
def test_unequal_batches_fill_the_room_to_the_last_slot(
    world: Any, open_database: Callable[[], Database], orchestrators: int
) -> None:
    """Best effort takes the rest, whatever it is."""
    leave_room_for(world.database, 50)
    acceptors = [acceptor(world, open_database()) for _ in range(orchestrators)]
    bodies = [world.batch(1 + number % 7, mode=BatchMode.BEST_EFFORT) for number in range(32)]
    ends = race(acceptors, bodies)
    assert set(ends) <= {"won", "placement.no_capacity"}
    with world.database.read() as conn:
        placed = conn.execute(select(func.count()).select_from(t.allocation)).scalar()
    assert placed == 50


def insert_vms(conn: Connection, placements: Sequence[Placement]) -> None:
    row = {
        "record": "creating", "flavor": "small", "image_id": 1, "vcpus": VCPUS, "memory_mib": MEMORY_MIB,
        "disk_mib": DISK_MIB, "user_data": "", "labels": {}, "created_at": datetime.now(UTC), "operation_id": "op",
    }  # fmt: skip
    conn.execute(insert(t.vm), [row | {"id": place.vm_id, "name": place.name} for place in placements])


def test_only_what_clashed_is_planned_again(world: Any) -> None:
    """Six VMs on three hosts, of which one begins to drain between plan and commit: four places stay as they were."""
    leave_room_for(world.database, 18)
    planning = Planning(world.database, silent_after_s=3600, now=world.now)
    shape = Shape(VCPUS, MEMORY_MIB, DISK_MIB)
    request = PlanRequest.alike([(uuid4(), f"v{n}") for n in range(6)], shape, "x86_64", policy=Policy.SPREAD)
    plans: list[Plan] = []

    def commit(writes: Callable[[Connection], Planned]) -> Planned:
        if not plans:
            with world.database.write() as conn:
                conn.execute(update(t.host).where(t.host.c.name == "h1").values(draining=True))
        with world.database.write() as conn:
            return writes(conn)

    def writes(conn: Connection, planned: Planned) -> Planned:
        plans.append(planned.plan)
        insert_vms(conn, planned.plan.placed)
        planned.reserve(conn)
        return planned

    assert planning.carry_through(request, commit, writes).passes == 2
    first, second = ({place.name: place.host for place in plan.placed} for plan in plans)
    assert Counter(first.values()) == {"h1": 2, "h2": 2, "h3": 2}
    assert {name: host for name, host in second.items() if first[name] != "h1"} == {
        name: host for name, host in first.items() if host != "h1"
    }
    assert Counter(second.values()) == {"h2": 3, "h3": 3}
    assert [place.cells for place in plans[1].placed] == [(0,)] * 6
    with world.database.read() as conn:
        assert conn.execute(select(func.count()).select_from(t.allocation)).scalar() == 6


def test_vms_that_stand_apart_do_though_planned_at_once(world: Any) -> None:
    """Two plans on one snapshot choose the same host: it has room for both, and only its generation tells. They are of
    two orchestrators: those of one take turns."""
    leave_room_for(world.database, 30)
    plannings = [Planning(world.database, silent_after_s=3600, now=world.now) for _ in range(2)]
    rule = GroupRule(name="web")
    profile = Profile(Shape(VCPUS, MEMORY_MIB, DISK_MIB), "x86_64", Where(host="h2"))
    requests = [PlanRequest((VmRequest(uuid4(), f"v{n}", profile, groups=(group_of(rule),)),)) for n in range(2)]
    passes = []

    def commit_in(number: int) -> Callable[[Callable[[Connection], Planned]], Planned]:
        def commit(writes: Callable[[Connection], Planned]) -> Planned:
            if number == 0 and not passes:
                # The other one is planned and committed meanwhile.
                passes.append(plannings[1].carry_through(requests[1], commit_in(1), writes_of).passes)
            with world.database.write() as conn:
                return writes(conn)

        return commit

    def writes_of(conn: Connection, planned: Planned) -> Planned:
        if planned.plan.placed:
            insert_vms(conn, planned.plan.placed)
            insert_groups(conn, {place.vm_id: [rule] for place in planned.plan.placed})
            planned.reserve(conn)
        return planned

    late = plannings[0].carry_through(requests[0], commit_in(0), writes_of)
    assert (late.passes, passes) == (2, [1])
    # On the host as it is now, the other one stands there.
    (refused,) = late.plan.refused
    assert refused.reasons[Reason.ANTI_AFFINITY] == 1


def test_a_turn_is_not_waited_for_without_end(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has it may wait for a database that doesn't answer."""
    monkeypatch.setattr(planning_module, "_LONGEST_TURN_S", 0.01)
    leave_room_for(world.database, 30)
    planning = Planning(world.database, silent_after_s=3600, now=world.now)
    request = PlanRequest.alike([(uuid4(), "v1")], Shape(VCPUS, MEMORY_MIB, DISK_MIB), "x86_64")

    def commit(writes: Callable[[Connection], Planned]) -> Planned:
        with world.database.write() as conn:
            return writes(conn)

    def writes(conn: Connection, planned: Planned) -> Planned:
        insert_vms(conn, planned.plan.placed)
        planned.reserve(conn)
        return planned

    with planning._turn:
        assert len(planning.carry_through(request, commit, writes).plan.placed) == 1
        # It wasn't its own to give back.
        assert planning._turn.locked()
    with planning._in_turn():
        assert planning._turn.locked()
    assert not planning._turn.locked()


def test_plans_of_one_orchestrator_are_made_after_one_another(world: Any) -> None:
    """The second is asked for while the first is committed: it sees what that took, and no plan is made in vain. Who
    doesn't wait is planned meanwhile."""
    leave_room_for(world.database, 30)
    planning = Planning(world.database, silent_after_s=3600, now=world.now)
    shape = Shape(VCPUS, MEMORY_MIB, DISK_MIB)
    requests = [PlanRequest.alike([(uuid4(), f"v{n}")], shape, "x86_64", policy=Policy.PACK) for n in range(3)]
    order: list[str] = []

    def committed_in(name: str, meanwhile: Callable[[], None]) -> Callable[[Callable[[Connection], Planned]], Planned]:
        def commit(writes: Callable[[Connection], Planned]) -> Planned:
            meanwhile()
            with world.database.write() as conn:
                planned = writes(conn)
            order.append(name)
            return planned

        return commit

    def writes(conn: Connection, planned: Planned) -> Planned:
        insert_vms(conn, planned.plan.placed)
        planned.reserve(conn)
        return planned

    def nothing() -> None:
        pass

    with ThreadPoolExecutor(1) as pool:
        seconds: list[Future[Planned]] = []

        def others_ask() -> None:
            commit = committed_in("second", nothing)
            seconds.append(pool.submit(planning.carry_through, requests[1], commit, writes))
            planning.carry_through(requests[2], committed_in("hasty", nothing), writes, wait=False)
            assert not wait(seconds, timeout=0.5).done

        first = planning.carry_through(requests[0], committed_in("first", others_ask), writes)
        second = seconds[0].result(60)
    assert (order, first.passes, second.passes) == (["hasty", "first", "second"], 1, 1)


def test_a_plan_that_is_only_shown_has_its_turn_too(world: Any) -> None:
    """Whoever commits then waits for it before his transaction begins."""
    planning = Planning(world.database, silent_after_s=3600, now=world.now)
    request = PlanRequest.alike([(uuid4(), "v")], Shape(VCPUS, MEMORY_MIB, DISK_MIB), "x86_64")
    with ThreadPoolExecutor(1) as pool:
        with planning._in_turn():
            shown = pool.submit(planning.shown, request)
            assert not wait([shown], timeout=0.5).done
        plan, fleet = shown.result(60)
    assert (len(plan.placed), len(fleet.hosts)) == (1, 3)


def test_while_a_plan_is_made_an_execution_waits_outside_its_transaction(world: Any, api: TestClient) -> None:
    """Else nobody could write for as long."""
    plan_id = api.post("/v1/plans", json={"flavor": "half", "image": "debian", "name": "web"}).json()["plan_id"]
    live = world.replicas[0]._creation._planning.fleet
    with ThreadPoolExecutor(1) as pool:
        with live._lock:
            executed = pool.submit(api.post, f"/v1/plans/{plan_id}/execute")
            assert not wait([executed], timeout=0.5).done
            world.settings(lease_s=600)
        assert executed.result(60).status_code == 202


# SQLite has one writer at a time, whose turn every write waits for.
@pytest.mark.postgres
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("at_least", [4, 5])
def test_claim_of_some_waits_for_nobody(world: Any, open_database: Callable[[], Database], at_least: int) -> None:
    """One of three hosts is locked by a transaction under way: the other two have four slots."""
    leave_room_for(world.database, 6)
    mine = acceptor(world, open_database())
    body = world.batch(6, mode=BatchMode.BEST_EFFORT, at_least=at_least)
    with world.database.write() as conn:
        lock_hosts(conn, {2})
        # In this very thread: were the lock waited for, the test would not go on.
        if at_least == 5:
            with pytest.raises(PpecError) as refused:
                mine.create(body, Ask("tester"))
            assert refused.value.code == "placement.conflict"
        else:
            made = mine.create(body, Ask("tester"))
            assert isinstance(made, NewOperation)
            assert sorted(Counter(item.host for item in made.items).items(), key=str) == [
                ("h1", 2), ("h3", 2), (None, 2),
            ]  # fmt: skip
            problem = next(item.problem for item in made.items if item.problem)
            assert problem.code == "placement.conflict"
    with world.database.read() as conn:
        count = conn.execute(select(func.count()).select_from(t.allocation)).scalar()
    assert count == (4 if at_least == 4 else 0)


def test_claims_of_some_get_no_more_than_there_is(world: Any, open_database: Callable[[], Database]) -> None:
    leave_room_for(world.database, 40)
    acceptors = [acceptor(world, open_database()) for _ in range(2)]
    bodies = [world.batch(6, mode=BatchMode.BEST_EFFORT, at_least=2) for _ in range(24)]
    ends = race(acceptors, bodies)
    assert set(ends) <= {"won", "placement.no_capacity", "placement.conflict"}
    with world.database.read() as conn:
        placed = conn.execute(select(func.count()).select_from(t.allocation)).scalar_one()
        refused = t.operation_item.c.state == "refused"
        assert conn.execute(select(func.count()).select_from(t.operation_item).where(~refused)).scalar() == placed
        of_operations = select(func.count()).select_from(t.operation_item).where(~refused)
        fewest = conn.execute(of_operations.group_by(t.operation_item.c.operation_id)).scalars().all()
    assert placed <= 40
    assert all(2 <= count <= 6 for count in fewest)
    # Whoever waits finds what is left.
    left = 40 - placed
    if left:
        assert race(acceptors[:1], [world.batch(left)]) == {"won": 1}
