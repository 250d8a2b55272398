# SPDX-License-Identifier: Apache-2.0
"""GET /v1/fleet: the live fleet as a snapshot, which is read again as the planner has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from uuid import uuid4

from fastapi.testclient import TestClient
from small_fleet import NOW, SHAPE, add_vms, make_fleet
from sqlalchemy import update

from ppec_contract.api_placement import Policy
from ppec_orchestrator.api.services import Services
from ppec_orchestrator.fleets.reading import read_fleet
from ppec_orchestrator.placement.fleet import PoolState
from ppec_orchestrator.placement.planner import plan
from ppec_orchestrator.placement.reasons import Reason
from ppec_orchestrator.placement.request import PlanRequest
from ppec_orchestrator.roles import Role
from ppec_orchestrator.store import tables as t
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.fleet import load_fleet
from ppec_orchestrator.store.reservations import release, reserve


def test_the_live_fleet_is_exported(ipv4_site: TestClient, services: Services) -> None:
    for name in ("h1", "h2"):
        body = {"name": name, "rack": "r1", "vrf": "red", "address": "192.0.2.1"}
        assert ipv4_site.post("/v1/hosts", json=body).status_code == 201
    response = ipv4_site.get("/v1/fleet")
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    read = read_fleet(response.content, "the fleet").fleet
    with services.database.read() as conn:
        live = load_fleet(conn, now=services.now(), silent_after_s=services.settings.silent_after_s)
    # The mark of a host's last change is the database's own, and no part of a snapshot.
    assert read.hosts == tuple(replace(host, mark=0) for host in live.hosts)
    assert [host.name for host in read.hosts] == ["h1", "h2"]
    assert read.free_addresses == live.free_addresses == {1: 29}


def test_pools_and_drives_are_exported_as_the_planner_sees_them(database: Database, client: TestClient) -> None:
    """Also those that shrank under a VM, or went."""
    shape = replace(SHAPE, pool="ssd", nvme=2)
    with database.write() as conn:
        make_fleet(conn, hosts=3, pool_mib=5000, drives=4)
        live = load_fleet(conn, now=NOW, silent_after_s=30)
        vm_ids = [uuid4() for _ in range(3)]
        request = PlanRequest.alike([(each, each.hex[:9]) for each in vm_ids], shape, "x86_64", policy=Policy.SPREAD)
        add_vms(conn, vm_ids, shape)
        reserve(conn, plan(live, request).placed)
        for host_id, size_mib in ((1, 500), (2, 0)):
            conn.execute(update(t.host_pool).where(t.host_pool.c.host_id == host_id).values(size_mib=size_mib))
        live = load_fleet(conn, now=NOW, silent_after_s=30)
    read = read_fleet(client.get("/v1/fleet").content, "the fleet").fleet
    assert read.hosts == tuple(replace(host, mark=0) for host in live.hosts)
    assert [host.pools["ssd"] for host in read.hosts] == [
        PoolState(500, -500), PoolState(0, -1000), PoolState(5000, 4000),
    ]  # fmt: skip
    assert [(host.cells[0].nvme, host.cells[0].nvme_free) for host in read.hosts] == [(4, 2)] * 3
    assert {vm.profile.shape for host in read.hosts for vm in host.vms} == {shape}
    asked = PlanRequest.alike([(uuid4(), "more")], replace(shape, disk_mib=4001), "x86_64")
    (refused,) = plan(read, asked).refused
    assert refused.reasons == {Reason.DISK: 2, Reason.NO_POOL: 1} == plan(live, asked).refused[0].reasons


def test_a_vm_that_came_and_went_tells_two_exports_apart(database: Database, client: TestClient) -> None:
    """Though every other figure is what it was: whoever takes an export as the fleet of a plan relies on it."""
    with database.write() as conn:
        make_fleet(conn, hosts=1)
    before = read_fleet(client.get("/v1/fleet").content, "the fleet").fleet.hosts
    vm_id = uuid4()
    with database.write() as conn:
        live = load_fleet(conn, now=NOW, silent_after_s=30)
        add_vms(conn, [vm_id])
        reserve(conn, plan(live, PlanRequest.alike([(vm_id, "guest")], SHAPE, "x86_64")).placed)
    between = read_fleet(client.get("/v1/fleet").content, "the fleet").fleet.hosts
    with database.write() as conn:
        assert release(conn, [vm_id], now=lambda: NOW) == 1
    after = read_fleet(client.get("/v1/fleet").content, "the fleet").fleet.hosts
    assert [host.generation for (host,) in (before, between, after)] == [0, 1, 2]
    assert [len(host.vms) for (host,) in (before, between, after)] == [0, 1, 0]
    assert after == (replace(before[0], generation=2),)


def test_an_empty_fleet_is_one_too(client: TestClient) -> None:
    assert read_fleet(client.get("/v1/fleet").content, "the fleet").fleet.hosts == ()


def test_whoever_may_look_may_export(client_as: Callable[[Role], TestClient], client: TestClient) -> None:
    assert client_as(Role.VIEWER).get("/v1/fleet").status_code == 200
    assert client.get("/v1/fleet", headers={"Authorization": "Bearer wrong"}).status_code == 401
