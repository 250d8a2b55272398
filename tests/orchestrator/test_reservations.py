# SPDX-License-Identifier: Apache-2.0
"""Reservations: room and addresses are taken together or not at all, and never twice. On both databases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from uuid import UUID, uuid4

import pytest
from small_fleet import NOW, SHAPE, add_vms, held, make_fleet
from sqlalchemy import delete, update

from ppec_contract.errors import PpecError
from ppec_orchestrator.placement.plan import Placement
from ppec_orchestrator.placement.planner import plan
from ppec_orchestrator.placement.reasons import Reason
from ppec_orchestrator.placement.request import PlanRequest, Shape
from ppec_orchestrator.store import tables as t
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.faults import TransactionLostError
from ppec_orchestrator.store.fleet import load_fleet
from ppec_orchestrator.store.ipdb import addresses_of
from ppec_orchestrator.store.reservations import LostRaceError, release, reserve

POOLED, DRIVEN = replace(SHAPE, pool="ssd"), replace(SHAPE, nvme=2)
SHAPES = pytest.mark.parametrize("shape", [SHAPE, POOLED, DRIVEN], ids=["plain", "pool", "drives"])


def commit(database: Database, vm_ids: list[UUID], placements: Sequence[Placement], shape: Shape = SHAPE) -> None:
    with database.write() as conn:
        add_vms(conn, vm_ids, shape)
        reserve(conn, placements)


def plan_on(database: Database, vm_ids: list[UUID], shape: Shape = SHAPE) -> tuple[Placement, ...]:
    with database.read() as conn:
        fleet = load_fleet(conn, now=NOW, silent_after_s=30)
    request = PlanRequest.alike([(v, f"v{v.hex[:12]}") for v in vm_ids], shape, "x86_64")
    return plan(fleet, request).placed


def expected(vms: int, shape: Shape = SHAPE) -> dict[str, int]:
    disk = {"disk_mib": 0 if shape.pool else 1000, "pools_mib": 1000 if shape.pool else 0, "drives": shape.nvme}
    per_vm = {"cores": 2, "memory_mib": 1024, **disk, "allocations": 1, "cells": 1, "addresses": 1}
    return {name: vms * figure for name, figure in per_vm.items()}


NOTHING = expected(0)


@SHAPES
def test_what_is_reserved_is_given_back_whole(database: Database, shape: Shape) -> None:
    vm_ids = [uuid4() for _ in range(3)]
    with database.write() as conn:
        make_fleet(conn, pool_mib=2000, drives=4)
    placements = plan_on(database, vm_ids, shape)
    with database.write() as conn:
        add_vms(conn, vm_ids, shape)
        reserve(conn, placements)
        granted = addresses_of(conn, vm_ids)
    assert len({a.address for addresses in granted.values() for a in addresses}) == 3
    with database.read() as conn:
        assert held(conn) == expected(3, shape)
    with database.write() as conn:
        assert release(conn, vm_ids) == 3
    with database.write() as conn:
        assert release(conn, vm_ids) == 0
        assert held(conn) == NOTHING


@SHAPES
def test_a_plan_whose_room_is_gone_loses_and_leaves_nothing(database: Database, shape: Shape) -> None:
    """One kind of room alone: of the others there is enough."""
    with database.write() as conn:
        make_fleet(conn, hosts=1, cores=2 if shape is SHAPE else 8, pool_mib=1999, drives=3)
    first, second = [uuid4()], [uuid4()]
    both = [plan_on(database, first, shape), plan_on(database, second, shape)]
    with database.write() as conn:
        add_vms(conn, first, shape)
        reserve(conn, both[0])
    with pytest.raises(LostRaceError) as lost:
        commit(database, second, both[1], shape)
    assert lost.value.details == {"hosts": ["h1"]}
    with database.read() as conn:
        assert held(conn) == expected(1, shape)


def test_a_pool_that_went_or_shrank_after_the_plan_takes_nothing(database: Database) -> None:
    with database.write() as conn:
        make_fleet(conn, hosts=1, pool_mib=1000)
    vm_ids = [uuid4()]
    placements = plan_on(database, vm_ids, POOLED)
    for change in (update(t.host_pool).values(size_mib=999), delete(t.host_pool)):
        with database.write() as conn:
            conn.execute(change)
        with pytest.raises(LostRaceError):
            commit(database, vm_ids, placements, POOLED)
    with database.read() as conn:
        assert held(conn) == NOTHING


def test_a_plan_that_still_fits_does_not_lose_to_another_on_the_same_host(database: Database) -> None:
    with database.write() as conn:
        make_fleet(conn, hosts=1, cores=4)
    first, second = [uuid4()], [uuid4()]
    both = [plan_on(database, first), plan_on(database, second)]
    for vm_ids, placements in zip((first, second), both, strict=True):
        with database.write() as conn:
            add_vms(conn, vm_ids)
            reserve(conn, placements)
    with database.read() as conn:
        assert held(conn) == expected(2)


def test_a_host_that_began_to_drain_after_the_plan_takes_nothing(database: Database) -> None:
    with database.write() as conn:
        make_fleet(conn, hosts=1)
    vm_ids = [uuid4()]
    placements = plan_on(database, vm_ids)
    with database.write() as conn:
        conn.execute(update(t.host).values(draining=True))
    with pytest.raises(LostRaceError):
        commit(database, vm_ids, placements)


def test_too_few_addresses_roll_the_whole_batch_back(database: Database) -> None:
    with database.write() as conn:
        make_fleet(conn, hosts=1, cores=8, addresses="10.0.0.0/30")
    vm_ids = [uuid4() for _ in range(3)]
    stale = plan_on(database, vm_ids[:2]) + plan_on(database, vm_ids[2:])
    with pytest.raises(PpecError) as refused:
        commit(database, vm_ids, stale)
    assert refused.value.code == "address.exhausted"
    with database.read() as conn:
        assert held(conn) == NOTHING


def test_the_record_decides_the_fleet(database: Database) -> None:
    with database.write() as conn:
        make_fleet(conn, hosts=3)
        conn.execute(update(t.host).where(t.host.c.id == 1).values(enrolled_at=None))
        conn.execute(update(t.host).where(t.host.c.id == 2).values(last_seen_at=datetime(2026, 11, 19, tzinfo=UTC)))
    vm_ids = [uuid4() for _ in range(3)]
    assert {p.host for p in plan_on(database, vm_ids)} == {"h3"}
    with database.read() as conn:
        fleet = load_fleet(conn, now=NOW, silent_after_s=30)
    request = PlanRequest.alike([(uuid4(), "v")], Shape(6, 64, 1), "x86_64")
    assert plan(fleet, request).refused[0].reasons == {Reason.SILENT: 2, Reason.VM_LARGER_THAN_CELL: 1}


@SHAPES
@pytest.mark.parametrize("room", [1, 7])
def test_of_many_clients_racing_for_the_last_room_exactly_as_many_win_as_there_is_room(
    open_database: Callable[[], Database], room: int, shape: Shape
) -> None:
    replicas = [open_database(), open_database()]
    cores = 2 * room if shape is SHAPE else 64
    with replicas[0].write() as conn:
        make_fleet(conn, 1, cores, "10.0.0.0/24", pool_mib=1000 * room + 999, drives=2 * room + 1)

    def client(number: int) -> bool:
        database, vm_id = replicas[number % 2], uuid4()
        for _ in range(200):
            placements = plan_on(database, [vm_id], shape)
            if not placements:
                return False
            try:
                with database.write() as conn:
                    add_vms(conn, [vm_id], shape)
                    reserve(conn, placements)
            except (LostRaceError, TransactionLostError):
                continue
            return True
        raise AssertionError("a client neither won nor was refused")

    with ThreadPoolExecutor(8) as pool:
        won = sum(pool.map(client, range(24)))
    assert won == room
    with replicas[0].read() as conn:
        assert held(conn) == expected(room, shape)


def test_reserving_nothing_changes_nothing(database: Database) -> None:
    with database.write() as conn:
        make_fleet(conn)
        reserve(conn, ())
        assert held(conn) == NOTHING
