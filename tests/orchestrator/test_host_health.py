# SPDX-License-Identifier: Apache-2.0
"""What a host says of its health, parts, drift and use: kept, shown, and an event for each change of a level."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import func, insert, select, update

from ppec_contract.host import Heartbeat, HostReport
from ppec_orchestrator.api.services import Services
from ppec_orchestrator.liveness import LivenessBook
from ppec_orchestrator.report_intake import ReportIntake
from ppec_orchestrator.store import tables
from ppec_orchestrator.store.host_health import KEPT_EVENTS

STARTED = 1_000_000
PARTS = {
    "cpu": {"model": "A CPU", "sockets": 2, "cores": 8, "threads": 16},
    "drives": [{"name": "nvme0n1", "size_mib": 1024, "rotational": False, "model": "M", "serial": "S", "cell": 1}],
    "file_systems": [{"path": "/var/lib/ppec/vms", "size_mib": 1000, "free_mib": 500}],
    "nics": [{"name": "eth0", "mac": "m", "state": "up", "speed_mbit": 25000, "master": "br0", "cell": 0}],
    "drift": [{"kind": "pins", "vm_id": str(uuid4()), "name": "web", "before": "0:2", "after": "0:3"}],
}
USE = {"memory_available_mib": 77, "free_mib": {"/var/lib/ppec/vms": 501}, "vms": []}
REPORT: dict[str, Any] = {
    "host": "h1",
    "boot_id": "b",
    "agent_version": "0.1.0",
    "api_version": 1,
    "capabilities": [],
    "architecture": "x86_64",
    "domain_type": "qemu",
    "libvirt_version": "9.0.0",
    "qemu_version": "7.2.0",
    "kernel_version": "6.1",
    "cells": [],
    "disk_mib": 10,
    "disk_free_mib": 10,
    "bridges": [],
    "vms": [],
    **PARTS,
}


def vitals(**levels: str) -> dict[str, Any]:
    health = [{"check": check, "level": level, "found": f"{check} is {level}"} for check, level in levels.items()]
    return {"health": health, "use": USE}


class HostAgent:
    """Speaks for h1 as its agent would; each message is later than the last."""

    def __init__(self, client: TestClient) -> None:
        self.client = client
        self.sequence = 0

    def put(self, said: dict[str, Any] | None, report: dict[str, Any] = REPORT) -> None:
        answer = self.client.put("/v1/hosts/h1/report", json=self._message(said) | {"report": report})
        assert answer.status_code == 200, answer.text

    def beat(self, said: dict[str, Any] | None, sequence: int | None = None) -> None:
        message = self._message(said) | {"digest": HostReport.model_validate(REPORT).digest()}
        if sequence is not None:
            message["sequence"] = sequence
        answer = self.client.post("/v1/hosts/h1/heartbeat", json=message)
        assert answer.status_code == 200, answer.text

    def _message(self, said: dict[str, Any] | None) -> dict[str, Any]:
        self.sequence += 1
        return {"agent_started_at_unix_ms": STARTED, "sequence": self.sequence, "vitals": said}


@pytest.fixture
def site(ipv4_site: TestClient, services: Services) -> TestClient:
    host = {"name": "h1", "rack": "r1", "vrf": "red", "address": "192.0.2.1"}
    assert ipv4_site.post("/v1/hosts", json=host).status_code == 201
    with services.database.write() as conn:
        conn.execute(update(tables.host).values(enrolled_at=services.now()))
    return ipv4_site


@pytest.fixture
def agent(site: TestClient, host_client: Callable[[str], TestClient]) -> HostAgent:
    return HostAgent(host_client("h1"))


def events(site: TestClient, query: str = "") -> list[tuple[Any, ...]]:
    items = site.get(f"/v1/hosts/h1/events{query}").json()["items"]
    return [(event["check"], event["before"], event["after"]) for event in items]


def test_a_host_shows_its_parts_drift_health_and_use(site: TestClient, agent: HostAgent) -> None:
    bare = site.get("/v1/hosts/h1").json()
    assert (bare["health_level"], bare["drift_count"], bare["cpu"], bare["use"]) == (None, 0, None, None)
    agent.put(vitals(disk="ok", clock="warning"))
    view = site.get("/v1/hosts/h1").json()
    assert {name: view[name] for name in PARTS} == PARTS
    assert view["use"] == USE
    assert view["health"] == vitals(disk="ok", clock="warning")["health"]
    (row,) = site.get("/v1/hosts").json()["items"]
    assert (row["health_level"], row["drift_count"], row["drives"], row["health"]) == ("warning", 1, [], [])
    agent.put(None, REPORT | {"drift": []})
    assert site.get("/v1/hosts/h1").json()["drift"] == []
    assert site.get("/v1/hosts").json()["items"][0]["drift_count"] == 0


def test_a_vm_shows_what_it_uses(site: TestClient, agent: HostAgent, services: Services) -> None:
    vm_id = uuid4()
    image = {"name": "i", "format": "raw", "architecture": "x86_64", "sha256": "0" * 64}
    row = {"id": vm_id, "name": "v1", "record": "active", "flavor": "f", "vcpus": 2, "memory_mib": 512, "disk_mib": 9}
    with services.database.write() as conn:
        conn.execute(insert(tables.image).values(id=1, size_bytes=512, virtual_size_mib=1, **image))
        conn.execute(
            insert(tables.vm).values(image_id=1, labels={}, created_at=services.now(), operation_id="o", **row)
        )
    use = {"vm_id": str(vm_id), "cpu_time_ms": 5, "memory_mib": 6, "disk_mib": 7}
    agent.put(vitals(disk="ok") | {"use": USE | {"vms": [use]}})
    # A host says nothing of another's VM.
    assert site.get(f"/v1/vms/{vm_id}").json()["use"] is None
    with services.database.write() as conn:
        conn.execute(insert(tables.allocation).values(vm_id=vm_id, host_id=1, disk_mib=9))
    assert site.get(f"/v1/vms/{vm_id}").json()["use"] == use
    assert site.get("/v1/vms").json()["items"][0]["use"] is None


def test_an_event_for_each_change_of_a_level_and_for_nothing_else(site: TestClient, agent: HostAgent) -> None:
    agent.put(vitals(disk="ok", clock="warning", ecc="note"))
    assert events(site) == [("clock", None, "warning")]
    agent.beat(None)
    agent.beat(vitals(disk="ok", clock="warning", ecc="note"))
    assert len(events(site)) == 1
    agent.beat(vitals(disk="error", clock="warning", ecc="note"))
    agent.beat(vitals(disk="ok", clock="ok", ecc="note"))
    expected = [
        ("clock", "warning", "ok"),
        ("disk", "error", "ok"),
        ("disk", "ok", "error"),
        ("clock", None, "warning"),
    ]
    assert sorted(events(site)[:2]) == expected[:2]
    assert events(site)[2:] == expected[2:]
    assert events(site, "?limit=1") == events(site)[:1]
    assert site.get("/v1/hosts/h9/events").json()["code"] == "host.not_found"


def test_a_message_that_is_late_changes_no_health(site: TestClient, agent: HostAgent) -> None:
    agent.put(vitals(disk="ok"))
    agent.beat(vitals(disk="ok"))
    agent.beat(vitals(disk="error"), sequence=1)
    assert site.get("/v1/hosts/h1").json()["health_level"] == "ok"
    assert events(site) == []


@pytest.mark.parametrize("found", ["x" * 5000, "a\x00b", "a\x1b[2J"], ids=["long", "nul", "escape"])
def test_health_without_bounds_is_refused_whole(site: TestClient, agent: HostAgent, found: str) -> None:
    agent.put(vitals(disk="ok"))
    before = site.get("/v1/hosts/h1").json()
    hostile = {"health": [{"check": "disk", "level": "error", "found": found}], "use": USE}
    message = {"agent_started_at_unix_ms": STARTED, "sequence": 2, "vitals": hostile}
    beat = message | {"digest": HostReport.model_validate(REPORT).digest()}
    for refused in (
        agent.client.post("/v1/hosts/h1/heartbeat", json=beat),
        agent.client.put("/v1/hosts/h1/report", json=message | {"report": REPORT}),
    ):
        assert (refused.status_code, refused.json()["code"]) == (422, "request.invalid")
        assert len(refused.text) < 2000
    assert site.get("/v1/hosts/h1").json() == before
    assert events(site) == []


def test_what_was_stored_before_there_were_bounds_hides_no_host(
    site: TestClient, agent: HostAgent, services: Services
) -> None:
    agent.put(vitals(disk="ok"))
    unbounded = REPORT | {"drift": [{"kind": "pins", "after": "x" * 5000}]}
    with services.database.write() as conn:
        conn.execute(update(tables.host).values(report=unbounded))
    view = site.get("/v1/hosts/h1").json()
    assert (view["name"], view["health_level"], view["drift"]) == ("h1", "ok", [])
    agent.put(vitals(disk="ok"), REPORT | {"disk_mib": 11})
    assert site.get("/v1/hosts/h1").json()["drift"] == PARTS["drift"]


def test_an_unchanged_word_writes_nothing(site: TestClient, agent: HostAgent, services: Services) -> None:
    agent.put(vitals(disk="ok"))
    before = services.database.commits
    for _ in range(3):
        agent.beat(vitals(disk="ok") | {"use": USE | {"memory_available_mib": 78}})
    assert services.database.commits == before
    assert site.get("/v1/hosts/h1").json()["use"]["memory_available_mib"] == 78


def test_another_process_records_no_event_twice(site: TestClient, agent: HostAgent, services: Services) -> None:
    agent.put(vitals(disk="error"))
    services.reports.vitals.forget("h1")
    agent.beat(vitals(disk="error"))
    assert events(site) == [("disk", None, "error")]


def test_what_another_process_heard_meanwhile_is_not_forgotten(
    site: TestClient, agent: HostAgent, services: Services
) -> None:
    agent.put(vitals(disk="ok"))
    other = ReportIntake(services.database, LivenessBook(lambda seen: (), silent_after_s=60), services.settings)
    agent.sequence += 1
    beat = {
        "agent_started_at_unix_ms": STARTED,
        "sequence": agent.sequence,
        "digest": HostReport.model_validate(REPORT).digest(),
        "vitals": vitals(disk="error"),
    }
    other.heartbeat("h1", Heartbeat.model_validate_json(json.dumps(beat)), now=services.now())
    assert site.get("/v1/hosts/h1").json()["health_level"] == "error"
    agent.beat(vitals(disk="ok"))
    assert site.get("/v1/hosts/h1").json()["health_level"] == "ok"
    assert events(site) == [("disk", "error", "ok"), ("disk", "ok", "error")]


def test_only_the_latest_events_are_kept_and_they_go_with_their_host(
    site: TestClient, agent: HostAgent, services: Services
) -> None:
    agent.put(vitals())
    checks = {f"c{number}": "error" for number in range(KEPT_EVENTS - 1)}
    agent.beat(vitals(**checks))
    agent.beat(vitals(**(checks | {"c0": "ok", "c1": "ok"})))
    assert len(events(site, f"?limit={KEPT_EVENTS}")) == KEPT_EVENTS
    assert {check for check, _, level in events(site, "?limit=2") if level == "ok"} == {"c0", "c1"}
    assert site.delete("/v1/hosts/h1").status_code == 204
    with services.database.read() as conn:
        assert conn.execute(select(func.count()).select_from(tables.host_event)).scalar_one() == 0
