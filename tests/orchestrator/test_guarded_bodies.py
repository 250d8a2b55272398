# SPDX-License-Identifier: Apache-2.0
"""Who may not call is refused before any of the body is read, whatever the route."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from starlette.types import Message

from ppec_orchestrator.api.app import ROUTERS
from ppec_orchestrator.api.audited import CHANGING, AuditedRoute
from ppec_orchestrator.api.bodies import MAX_STRANGERS_BYTES
from ppec_orchestrator.roles import Role


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """The same on every database: one is enough."""
    return sqlite_url


def changing_routes(app: FastAPI) -> Iterator[tuple[str, str, str]]:
    """Name, method and path of every route that changes something."""
    for path, methods in app.openapi()["paths"].items():
        for method in CHANGING & {name.upper() for name in methods}:
            yield methods[method.lower()]["operationId"], method, path.replace("{", "").replace("}", "")


def ask(app: FastAPI, method: str, path: str, headers: dict[str, str]) -> tuple[int, list[Message]]:
    """The answer to a request whose body never comes: reading it fails."""
    sent: list[Message] = []

    async def receive() -> Message:
        raise AssertionError("the body was asked for")

    async def send(message: Message) -> None:
        sent.append(message)

    all_headers = {"content-type": "application/json", "content-length": "60000", **headers}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "https",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"format=raw",
        "headers": [(name.encode(), value.encode()) for name, value in all_headers.items()],
        "client": ("192.0.2.7", 1),
        "server": ("o", 443),
    }
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], sent


def test_nobody_elses_body_is_read(app: FastAPI) -> None:
    asked = {name: ask(app, method, path, {}) for name, method, path in changing_routes(app) if name != "enrol_host"}
    assert len(asked) > 20
    assert {name: status for name, (status, _) in asked.items()} == dict.fromkeys(asked, 401)
    for name, (_, sent) in asked.items():
        assert (b"connection", b"close") in sent[0]["headers"], name


def test_nor_is_that_of_a_caller_of_too_low_a_role(app: FastAPI, client_as: Callable[[Role], TestClient]) -> None:
    token = client_as(Role.VIEWER).headers["Authorization"]
    routes = [one for one in changing_routes(app) if one[0] not in ("enrol_host", "put_report", "post_heartbeat")]
    refused = {name: ask(app, method, path, {"authorization": token})[0] for name, method, path in routes}
    assert refused == dict.fromkeys(refused, 403)


def test_enrolment_takes_a_short_body_only(app: FastAPI) -> None:
    stranger = TestClient(app)
    body: dict[str, Any] = {"host": "h1", "token": "x" * 43, "csr_pem": "x" * MAX_STRANGERS_BYTES}
    refused = stranger.post("/v1/enrol", json=body)
    assert (refused.status_code, refused.json()["code"]) == (413, "request.too_large")
    largest = stranger.post("/v1/enrol", json=body | {"csr_pem": "\n" * 16_000})
    assert largest.json()["code"] == "enrolment.token_invalid"


def test_every_route_with_a_body_is_guarded_but_one(app: FastAPI) -> None:
    strangers = [name for name, method, path in changing_routes(app) if ask_is_open(app, method, path)]
    assert strangers == ["enrol_host"]


def ask_is_open(app: FastAPI, method: str, path: str) -> bool:
    """Whether the body was asked for: the fault is ours then, for reading it fails."""
    try:
        return ask(app, method, path, {})[0] not in (401, 403)
    except AssertionError:
        return True


def test_routes_are_what_the_document_says(app: FastAPI) -> None:
    """The tests above walk the document: nothing that changes something may be missing from it."""
    documented = {name for name, _, _ in changing_routes(app)}
    routes = [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]
    changing = [route for route in routes if CHANGING & set(route.methods or ())]
    assert {route.name for route in changing} == documented
    assert [route.name for route in changing if not isinstance(route, AuditedRoute)] == []
