# SPDX-License-Identifier: Apache-2.0
"""Who may not call is refused before any of the body is read, whatever the route."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from starlette.types import Message, Receive

from ppec_orchestrator.api import auth
from ppec_orchestrator.api.app import ROUTERS, create_app
from ppec_orchestrator.api.audited import CHANGING, AuditedRoute
from ppec_orchestrator.api.bodies import MAX_STRANGERS_BYTES
from ppec_orchestrator.api.services import Services
from ppec_orchestrator.roles import Role
from ppec_orchestrator.store.tokens import Token, TokenBook, create_token


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """The same on every database: one is enough."""
    return sqlite_url


def changing_routes(app: FastAPI) -> Iterator[tuple[str, str, str]]:
    """Name, method and path of every route that changes something."""
    for path, methods in app.openapi()["paths"].items():
        for method in CHANGING & {name.upper() for name in methods}:
            yield methods[method.lower()]["operationId"], method, path.replace("{", "").replace("}", "")


async def never() -> Message:
    raise AssertionError("the body was asked for")


def ask(
    app: FastAPI,
    method: str,
    path: str,
    headers: dict[str, str],
    *,
    query: str = "",
    receive: Receive = never,
) -> tuple[int, list[Message]]:
    """The answer to a request whose body, unless another is given, never comes: reading it fails."""
    sent: list[Message] = []

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
        "query_string": query.encode(),
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
    routes = [
        one
        for one in changing_routes(app)
        if one[0] not in ("enrol_host", "put_report", "patch_report", "post_heartbeat")
    ]
    asked = {name: ask(app, method, path, {"authorization": token}) for name, method, path in routes}
    assert {name: status for name, (status, _) in asked.items()} == dict.fromkeys(asked, 403)
    for name, (_, sent) in asked.items():
        assert (b"connection", b"close") in sent[0]["headers"], name


class CountingTokens(TokenBook):
    """Counts how often it is asked who has a token."""

    asked = 0

    def remembered(self, token: str, *, now: datetime) -> Token | None:
        self.asked += 1
        return super().remembered(token, now=now)


def test_a_caller_is_asked_for_once(services: Services, client: TestClient) -> None:
    """Before the body is read; the endpoint gets the same answer."""
    tokens = CountingTokens(services.database)
    counted = TestClient(create_app(replace(services, tokens=tokens)), headers=client.headers)
    assert counted.post("/v1/vrfs", json={"name": "red"}).status_code == 201
    assert tokens.asked == 1
    assert counted.get("/v1/vrfs").status_code == 200
    assert tokens.asked == 2


def test_who_takes_long_for_a_body_is_asked_for_again(
    app: FastAPI, services: Services, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token may be no more by then."""
    monkeypatch.setattr(auth, "_STANDS_S", 0.0)
    with services.database.write() as conn:
        until = clock() + timedelta(seconds=10)
        token = create_token(conn, "brief", Role.ADMIN, now=clock(), expires_at=until)
    body = b'{"name": "red"}'

    async def at_last() -> Message:
        clock.forward(3600)
        return {"type": "http.request", "body": body, "more_body": False}

    headers = {"authorization": f"Bearer {token}", "content-length": str(len(body))}
    status, _ = ask(app, "POST", "/v1/vrfs", headers, receive=at_last)
    assert status == 401


async def endlessly() -> Message:
    return {"type": "http.request", "body": b"x" * 16_384, "more_body": True}


def test_body_that_was_not_read_to_its_end_is_not_waited_for(app: FastAPI, client: TestClient) -> None:
    """Whatever it is refused for."""
    assert client.put("/v1/images/small?format=raw", content=b"x" * 1024).status_code == 201
    token = {"authorization": client.headers["Authorization"]}
    other = f"format=raw&sha256={'0' * 64}"
    asked = [
        ask(app, "POST", "/v1/enrol", {}, receive=endlessly),
        ask(app, "POST", "/v1/vrfs", token, receive=endlessly),
        ask(app, "POST", "/v1/vrfs", token | {"content-length": "100000"}),
        ask(app, "PUT", "/v1/images/small", token, query=other),
        ask(app, "PUT", "/v1/nothing", token | {"transfer-encoding": "chunked"}),
    ]
    assert [status for status, _ in asked] == [413, 413, 413, 409, 404]
    for _, sent in asked:
        assert (b"connection", b"close") in sent[0]["headers"]


def test_body_that_was_read_keeps_the_connection(client: TestClient) -> None:
    answers = [
        client.put("/v1/images/small?format=raw", content=b"x" * 1024),
        client.post("/v1/vrfs", json={"name": "red"}),
        client.post("/v1/vrfs", json={"name": "red"}),
        client.post("/v1/vrfs", json={"name": "Bad Name"}),
        client.delete("/v1/vrfs/red"),
        client.get("/v1/vrfs/red"),
    ]
    assert [answer.status_code for answer in answers] == [201, 201, 409, 422, 204, 404]
    assert [answer.headers.get("connection") for answer in answers] == [None] * 6


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
