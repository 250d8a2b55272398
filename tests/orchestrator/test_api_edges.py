# SPDX-License-Identifier: Apache-2.0
"""The API's edges: who is let in, and how every kind of bad request is answered."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from ppec_orchestrator.api.services import Services
from ppec_orchestrator.roles import Role
from ppec_orchestrator.store.tokens import create_token

PROBLEM = "application/problem+json"
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """The edges are the same on every database: one is enough."""
    return sqlite_url


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": "Basic abc"},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer " + "x" * 5000},
    ],
)
def test_without_a_good_token_nobody_comes_in(app: FastAPI, headers: dict[str, str]) -> None:
    refused = TestClient(app).get("/v1/flavors", headers=headers)
    assert (refused.status_code, refused.json()["code"]) == (401, "auth.required")
    assert refused.headers["www-authenticate"] == "Bearer"
    assert refused.headers["content-type"] == PROBLEM


@pytest.mark.parametrize(
    ("role", "method", "path", "status"),
    [
        (Role.VIEWER, "GET", "/v1/vrfs", 200),
        (Role.VIEWER, "POST", "/v1/vrfs", 403),
        (Role.OPERATOR, "POST", "/v1/vrfs", 403),
        (Role.OPERATOR, "DELETE", "/v1/vrfs/red", 403),
        (Role.ADMIN, "POST", "/v1/vrfs", 201),
    ],
)
def test_roles(client_as: Callable[[Role], TestClient], role: Role, method: str, path: str, status: int) -> None:
    response = client_as(role).request(method, path, json={"name": "red"} if method == "POST" else None)
    assert response.status_code == status


def test_a_token_ends(app: FastAPI, services: Services, clock: Callable[[], object]) -> None:
    now = services.now()
    with services.database.write() as conn:
        token = create_token(conn, "short", Role.VIEWER, now=now, expires_at=now + timedelta(seconds=60))
    client = TestClient(app, headers={"Authorization": f"Bearer {token}"})
    assert client.get("/v1/vrfs").status_code == 200
    clock.forward(61)  # type: ignore[attr-defined]
    assert client.get("/v1/vrfs").status_code == 401


def test_authentication_comes_before_validation(app: FastAPI) -> None:
    assert TestClient(app).post("/v1/vrfs", json={"nonsense": 1}).status_code == 401


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b'{"name": "a", "name": "b"}', 400, "request.malformed"),
        (b'{"name": NaN}', 400, "request.malformed"),
        (b'{"name": 99999999999999999999}', 400, "request.malformed"),
        (b"[" * 5000, 400, "request.malformed"),
        (b'{"name": "\xff"}', 400, "request.malformed"),
        (b"[]", 400, "request.malformed"),
        (b"", 422, "request.invalid"),
        (b'{"name": "\\ud800"}', 400, "request.malformed"),
        (b'{"name": "' + b"a" * 70_000 + b'"}', 413, "request.too_large"),
    ],
)
def test_bad_bodies(client: TestClient, body: bytes, status: int, code: str) -> None:
    refused = client.post("/v1/vrfs", content=body, headers=JSON)
    assert (refused.status_code, refused.json()["code"]) == (status, code)
    assert refused.headers["content-type"] == PROBLEM
    assert client.get("/v1/vrfs").json()["items"] == []


def test_a_body_without_a_declared_length_is_counted(client: TestClient) -> None:
    sent = []

    def endless() -> object:
        yield b'{"name": "'
        while len(sent) < 1000:
            sent.append(1)
            yield b"a" * 1024

    refused = client.post("/v1/vrfs", content=endless(), headers=JSON)  # type: ignore[arg-type]
    assert (refused.status_code, refused.json()["code"]) == (413, "request.too_large")


def test_a_body_that_is_not_called_json_is_refused(client: TestClient) -> None:
    refused = client.post("/v1/vrfs", content=b'{"name": "a"}', headers={"Content-Type": "text/plain"})
    assert refused.json()["code"] == "request.invalid"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "request.unknown_method"),
        ("GET", "/v1/nothing", 404, "request.unknown_method"),
        ("GET", "/v1/vrfs/", 404, "request.unknown_method"),
        ("PUT", "/v1/vrfs", 405, "request.method_not_allowed"),
        ("GET", "/v1/vrfs/%00", 422, "request.invalid"),
        ("GET", "/v1/vrfs/%ff", 404, "vrf.not_found"),
    ],
)
def test_bad_paths(client: TestClient, method: str, path: str, status: int, code: str) -> None:
    refused = client.request(method, path)
    assert (refused.status_code, refused.json()["code"]) == (status, code)
    assert refused.headers["content-type"] == PROBLEM


def test_an_unforeseen_fault_shows_an_incident_and_no_traceback(
    app: FastAPI, client: TestClient, capfd: pytest.CaptureFixture[str]
) -> None:
    @app.get("/v1/broken")
    def broken() -> None:
        raise ZeroDivisionError("secret inside")

    answer = client.get("/v1/broken")
    assert (answer.status_code, answer.json()["code"]) == (500, "internal.error")
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text
    assert answer.json()["details"]["incident"] in capfd.readouterr().out


def test_a_database_that_is_gone_is_try_again(client: TestClient, services: Services) -> None:
    assert client.get("/v1/health").status_code == 200
    with services.database.write() as conn:
        conn.exec_driver_sql("ALTER TABLE vrf RENAME TO vrf_gone")
    gone = client.get("/v1/vrfs")
    assert (gone.status_code, gone.json()["code"]) == (503, "store.unavailable")
    assert gone.headers["retry-after"] == "1"
    assert "vrf_gone" not in gone.text
