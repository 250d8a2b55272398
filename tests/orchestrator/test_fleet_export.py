# SPDX-License-Identifier: Apache-2.0
"""GET /v1/fleet: the live fleet as a snapshot, which is read again as the planner has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fastapi.testclient import TestClient

from ppec_orchestrator.api.services import Services
from ppec_orchestrator.fleets.reading import read_fleet
from ppec_orchestrator.roles import Role
from ppec_orchestrator.store.fleet import load_fleet


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
    # How often hosts changed is the database's own count, and no part of a snapshot.
    assert read.hosts == tuple(replace(host, generation=0, mark=0) for host in live.hosts)
    assert [host.name for host in read.hosts] == ["h1", "h2"]
    assert read.free_addresses == live.free_addresses == {1: 29}


def test_an_empty_fleet_is_one_too(client: TestClient) -> None:
    assert read_fleet(client.get("/v1/fleet").content, "the fleet").fleet.hosts == ()


def test_whoever_may_look_may_export(client_as: Callable[[Role], TestClient], client: TestClient) -> None:
    assert client_as(Role.VIEWER).get("/v1/fleet").status_code == 200
    assert client.get("/v1/fleet", headers={"Authorization": "Bearer wrong"}).status_code == 401
