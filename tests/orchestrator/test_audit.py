# SPDX-License-Identifier: Apache-2.0
"""Who changed what: every change, made or refused, leaves one line, with no secret in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from structlog.testing import capture_logs

from ppec_orchestrator.api.audited import CHANGING
from ppec_orchestrator.api.services import Services
from ppec_orchestrator.audit import audit
from ppec_orchestrator.roles import Role

HOST = {"name": "h1", "rack": "r1", "vrf": "red", "address": "192.0.2.1"}


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """The same on every database: one is enough."""
    return sqlite_url


def lines(logs: Any) -> list[tuple[str, str, str, str]]:
    """Caller, action, subject and outcome of the audit lines among these."""
    found = [line for line in logs if line["event"] == "audit"]
    return [(line["caller"], line["action"], line["subject"], line["outcome"]) for line in found]


def test_every_changing_route_leaves_a_line_when_it_refuses(
    app: FastAPI, client_as: Callable[[Role], TestClient]
) -> None:
    viewer, walked = client_as(Role.VIEWER), 0
    for path, methods in app.openapi()["paths"].items():
        for method in CHANGING & {name.upper() for name in methods}:
            action = methods[method.lower()]["operationId"]
            if action in ("put_report", "patch_report", "post_heartbeat"):
                continue  # What hosts observe is no change of anybody's.
            body = {"host": "h9", "token": "x" * 43, "csr_pem": "x"} if action == "enrol_host" else None
            with capture_logs() as logs:
                refused = viewer.request(method, path.replace("{", "").replace("}", ""), json=body)
            assert refused.status_code == 403, (action, refused.text)
            found = [line for line in logs if line["event"] == "audit"]
            assert [(line["action"], line["outcome"]) for line in found] == [(action, "refused")], action
            caller = "" if action == "enrol_host" else "test-viewer"
            assert (found[0]["caller"], found[0]["code"]) == (caller, refused.json()["code"])
            walked += 1
    assert walked > 20


def test_changes_are_told_with_what_they_were_about(client: TestClient) -> None:
    with capture_logs() as logs:
        for path, body in (
            ("datacentres", {"name": "dc1", "region": "north"}),
            ("clusters", {"name": "c1", "datacentre": "dc1"}),
            ("racks", {"name": "r1", "cluster": "c1"}),
            ("vrfs", {"name": "red"}),
            ("hosts", HOST),
        ):
            assert client.post(f"/v1/{path}", json=body).status_code == 201
        prefix = {"vrf": "red", "cidr": "10.0.0.0/27", "bridge": "br0", "cluster": "c1"}
        number = client.post("/v1/prefixes", json=prefix).json()["prefix_id"]
        assert client.delete(f"/v1/prefixes/{number}").status_code == 204
        assert client.put("/v1/images/small?format=raw", content=b"x" * 1024).status_code == 201
        assert client.patch("/v1/hosts/h1", json={"draining": True}).status_code == 200
        token = client.post("/v1/hosts/h1/enrolment-token").json()["token"]
        assert client.delete("/v1/hosts/h1").status_code == 204
    assert lines(logs) == [
        ("test-admin", "create_datacentre", "dc1", "done"),
        ("test-admin", "create_cluster", "c1", "done"),
        ("test-admin", "create_rack", "r1", "done"),
        ("test-admin", "create_vrf", "red", "done"),
        ("test-admin", "create_host", "h1", "done"),
        ("test-admin", "create_prefix", "10.0.0.0/27", "done"),
        ("test-admin", "delete_prefix", str(number), "done"),
        ("test-admin", "import_image", "small", "done"),
        ("test-admin", "update_host", "h1", "done"),
        ("test-admin", "make_enrolment_token", "h1", "done"),
        ("test-admin", "delete_host", "h1", "done"),
    ]
    assert token not in str(logs)


def test_changes_of_a_prefix_are_told_with_their_values(client: TestClient) -> None:
    with capture_logs() as logs:
        client.post("/v1/vrfs", json={"name": "red"})
        client.post("/v1/datacentres", json={"name": "dc1", "region": "north"})
        prefix = {"vrf": "red", "cidr": "10.0.0.0/27", "bridge": "br0", "region": "north", "gateway": "10.0.0.1"}
        number = client.post("/v1/prefixes", json=prefix).json()["prefix_id"]
        change = {"last": "10.0.0.20", "nameservers": ["10.0.0.3"], "vlan": None}
        assert client.patch(f"/v1/prefixes/{number}", json=change).status_code == 200
        assert client.delete(f"/v1/prefixes/{number}?force=true").status_code == 204
    told = [(line["prefix"], line["given"]) for line in logs if "prefix" in line]
    assert told == [
        ("10.0.0.0/27 of red", 'gateway="10.0.0.1" bridge="br0" region="north"'),
        ("10.0.0.0/27 of red", 'last="10.0.0.20" vlan=null nameservers=["10.0.0.3"]'),
        ("10.0.0.0/27 of red", "force=true"),
    ]


def test_change_that_broke_off_after_its_commit_is_told(client: TestClient, services: Services) -> None:
    """The record of the image is gone; only its file can't be removed."""
    made = client.put("/v1/images/small?format=raw", content=b"x" * 1024).json()
    path = services.images.path(made["sha256"])
    path.unlink()
    (path / "in-the-way").mkdir(parents=True)
    with capture_logs() as logs:
        failed = TestClient(client.app, headers=client.headers).delete("/v1/images/small")
    assert (failed.status_code, failed.json()["code"]) == (500, "internal.error")
    assert client.get("/v1/images/small").status_code == 404
    assert lines(logs) == [("test-admin", "delete_image", "small", "failed")]


def test_change_the_database_may_have_made_is_told(client: TestClient, services: Services) -> None:
    with services.database.write() as conn:
        conn.exec_driver_sql("DROP TABLE vrf")
    with capture_logs() as logs:
        assert client.post("/v1/vrfs", json={"name": "red"}).status_code >= 500
    assert lines(logs) == [("test-admin", "create_vrf", "red", "failed")]


def test_what_failed_or_changes_nothing_leaves_none(client: TestClient) -> None:
    with capture_logs() as logs:
        assert client.post("/v1/racks", json={"name": "r9", "cluster": "c9"}).status_code == 404
        assert client.post("/v1/vrfs", json={"name": "Bad Name"}).status_code == 422
        assert client.get("/v1/vrfs").status_code == 200
        assert TestClient(client.app).delete("/v1/vrfs/red").status_code == 401
    assert lines(logs) == []


def test_enrolment_is_told_without_its_token(ipv4_site: TestClient, app: FastAPI) -> None:
    assert ipv4_site.post("/v1/hosts", json=HOST).status_code == 201
    body = {"host": "h1", "token": "T0KEN" * 8, "csr_pem": "CSRCSR"}
    with capture_logs() as logs:
        assert TestClient(app).post("/v1/enrol", json=body).status_code == 403
    assert lines(logs) == [("", "enrol_host", "h1", "refused")]
    assert "T0KEN" not in str(logs)
    assert "CSRCSR" not in str(logs)


def test_a_name_as_long_as_a_book_is_cut(app: FastAPI) -> None:
    with capture_logs() as logs:
        TestClient(app).post("/v1/enrol", json={"host": "a" * 63, "token": "x" * 43, "csr_pem": "x"})
        TestClient(app).delete(f"/v1/vrfs/{'a' * 5000}")
    assert all(len(line[2]) <= 256 for line in lines(logs))


def test_every_value_is_cut() -> None:
    with capture_logs() as logs:
        audit("c" * 999, "a" * 999, "s" * 999, "done", operation="o" * 999)
    (line,) = logs
    assert [len(line[name]) for name in ("caller", "action", "subject", "operation")] == [256] * 4
