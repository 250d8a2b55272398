# SPDX-License-Identifier: Apache-2.0
"""Reservations: room and addresses are taken together or not at all, and never twice. On both databases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from ipaddress import ip_network
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Connection, func, insert, select, update

from ppec_contract.errors import PpecError
from ppec_orchestrator.ipdb.ranges import usable_range
from ppec_orchestrator.placement.planner import plan
from ppec_orchestrator.placement.request import Placement, PlanRequest, Reason, Shape, VmRequest
from ppec_orchestrator.store import tables as t
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.faults import TransactionLostError
from ppec_orchestrator.store.fleet import load_fleet
from ppec_orchestrator.store.ipdb import insert_ipv4_rows
from ppec_orchestrator.store.reservations import LostRaceError, release, reserve

NOW = datetime(2026, 11, 20, tzinfo=UTC)
SHAPE = Shape(vcpus=2, memory_mib=1024, disk_mib=1000)


def make_fleet(conn: Connection, hosts: int = 2, cores: int = 4, addresses: str = "10.0.0.0/26") -> None:
    """`hosts` hosts of one cell each in one rack, served by one prefix."""
    conn.execute(insert(t.datacentre).values(id=1, name="d1", region="r"))
    conn.execute(insert(t.cluster).values(id=1, name="c1", datacentre_id=1, architecture="x86_64"))
    conn.execute(insert(t.rack).values(id=1, name="r1", cluster_id=1))
    conn.execute(insert(t.vrf).values(id=1, name="red", description=""))
    usable = usable_range(ip_network(addresses))
    conn.execute(
        insert(t.prefix).values(
            id=1, vrf_id=1, cidr=addresses, family=4, bridge="br0", cluster_id=1, nameservers=[],
            first=str(usable.first), last=str(usable.last),
        )
    )  # fmt: skip
    insert_ipv4_rows(conn, 1, usable)
    conn.execute(
        insert(t.image).values(
            id=1, name="i", format="raw", architecture="x86_64", sha256="0" * 64, size_bytes=1, virtual_size_mib=1
        )
    )
    for n in range(1, hosts + 1):
        conn.execute(
            insert(t.host).values(
                id=n, name=f"h{n}", rack_id=1, vrf_id=1, address="192.0.2.1", port=7443, enrolled_at=NOW,
                last_seen_at=NOW, disk_mib=1_000_000,
            )
        )  # fmt: skip
        conn.execute(
            insert(t.host_cell).values(host_id=n, cell=0, socket=0, threads_per_core=1, cores=cores, memory_mib=65536)
        )


def add_vms(conn: Connection, vm_ids: list[UUID]) -> None:
    conn.execute(
        insert(t.vm),
        [
            {
                "id": vm_id, "name": f"v{vm_id.hex[:12]}", "record": "creating", "flavor": "f", "image_id": 1,
                "vcpus": 2,                 "memory_mib": 1024, "disk_mib": 1000,
                "user_data": "", "labels": {}, "created_at": NOW,
                "operation_id": "op",
            }
            for vm_id in vm_ids
        ],
    )  # fmt: skip


def commit(database: Database, vm_ids: list[UUID], placements: Sequence[Placement]) -> None:
    with database.write() as conn:
        add_vms(conn, vm_ids)
        reserve(conn, placements)


def plan_on(database: Database, vm_ids: list[UUID]) -> tuple[Placement, ...]:
    with database.read() as conn:
        fleet = load_fleet(conn, now=NOW, silent_after_s=30)
    request = PlanRequest(tuple(VmRequest(v, f"v{v.hex[:12]}") for v in vm_ids), SHAPE, "x86_64")
    return plan(fleet, request).placed


def held(conn: Connection) -> dict[str, int]:
    """What every table says is in use."""
    return {
        "cores": conn.execute(select(func.sum(t.host_cell.c.cores_used))).scalar_one(),
        "memory_mib": int(conn.execute(select(func.sum(t.host_cell.c.memory_used_mib))).scalar_one()),
        "disk_mib": int(conn.execute(select(func.sum(t.host.c.disk_used_mib))).scalar_one()),
        "allocations": conn.execute(select(func.count()).select_from(t.allocation)).scalar_one(),
        "cells": conn.execute(select(func.count()).select_from(t.allocation_cell)).scalar_one(),
        "addresses": conn.execute(
            select(func.count()).select_from(t.address).where(t.address.c.vm_id.is_not(None))
        ).scalar_one(),
    }


NOTHING = {"cores": 0, "memory_mib": 0, "disk_mib": 0, "allocations": 0, "cells": 0, "addresses": 0}


def expected(vms: int) -> dict[str, int]:
    per_vm = {"cores": 2, "memory_mib": 1024, "disk_mib": 1000, "allocations": 1, "cells": 1, "addresses": 1}
    return {name: vms * figure for name, figure in per_vm.items()}


def test_what_is_reserved_is_given_back_whole(database: Database) -> None:
    vm_ids = [uuid4() for _ in range(3)]
    with database.write() as conn:
        make_fleet(conn)
    placements = plan_on(database, vm_ids)
    with database.write() as conn:
        add_vms(conn, vm_ids)
        granted = reserve(conn, placements)
    assert len({a.address for addresses in granted.values() for a in addresses}) == 3
    with database.read() as conn:
        assert held(conn) == expected(3)
    with database.write() as conn:
        assert release(conn, vm_ids) == 3
    with database.write() as conn:
        assert release(conn, vm_ids) == 0
        assert held(conn) == NOTHING


def test_a_plan_whose_room_is_gone_loses_and_leaves_nothing(database: Database) -> None:
    with database.write() as conn:
        make_fleet(conn, hosts=1, cores=2)
    first, second = [uuid4()], [uuid4()]
    both = [plan_on(database, first), plan_on(database, second)]
    with database.write() as conn:
        add_vms(conn, first)
        reserve(conn, both[0])
    with pytest.raises(LostRaceError) as lost:
        commit(database, second, both[1])
    assert lost.value.details == {"hosts": ["h1"]}
    with database.read() as conn:
        assert held(conn) == expected(1)


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
    request = PlanRequest((VmRequest(uuid4(), "v"),), Shape(6, 64, 1), "x86_64")
    assert plan(fleet, request).refused[0].reasons == {Reason.SILENT: 2, Reason.VM_LARGER_THAN_CELL: 1}


@pytest.mark.parametrize("room", [1, 7])
def test_of_many_clients_racing_for_the_last_room_exactly_as_many_win_as_there_is_room(
    open_database: Callable[[], Database], room: int
) -> None:
    replicas = [open_database(), open_database()]
    with replicas[0].write() as conn:
        make_fleet(conn, hosts=1, cores=2 * room, addresses="10.0.0.0/24")

    def client(number: int) -> bool:
        database, vm_id = replicas[number % 2], uuid4()
        for _ in range(200):
            placements = plan_on(database, [vm_id])
            if not placements:
                return False
            try:
                with database.write() as conn:
                    add_vms(conn, [vm_id])
                    reserve(conn, placements)
            except (LostRaceError, TransactionLostError):
                continue
            return True
        raise AssertionError("a client neither won nor was refused")

    with ThreadPoolExecutor(8) as pool:
        won = sum(pool.map(client, range(24)))
    assert won == room
    with replicas[0].read() as conn:
        assert held(conn) == expected(room)


def test_reserving_nothing_changes_nothing(database: Database) -> None:
    with database.write() as conn:
        make_fleet(conn)
        assert reserve(conn, ()) == {}
        assert held(conn) == NOTHING
