# SPDX-License-Identifier: Apache-2.0
"""Query strings: what a route doesn't take is refused, whatever the route; nothing is left out or read as something
else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from starlette.types import Message

from ppec_orchestrator.api.app import ROUTERS
from ppec_orchestrator.api.queries import QueryParameters, StrictQueryRoute
from ppec_orchestrator.roles import Role


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """The same on every database: one is enough."""
    return sqlite_url


def routes() -> dict[str, APIRoute]:
    """Every route of the API, by its name."""
    return {route.name: route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)}


def refused(answer: Any) -> dict[str, Any]:
    assert (answer.status_code, answer.json()["code"]) == (422, "request.invalid"), answer.text
    return dict(answer.json())


def test_a_misspelt_filter_is_no_filter_and_is_refused(ipv4_site: TestClient) -> None:
    problem = refused(ipv4_site.get("/v1/vms?record=failed&lable=tier=web&hosts=zzz"))
    assert problem["detail"] == (
        "request: query.lable: there is no such parameter; query.hosts: there is no such parameter"
    )
    assert problem["hint"].startswith("GET /v1/vms takes these query parameters: limit, cursor, ")
    assert "label" in problem["hint"]


def test_every_route_refuses_what_it_does_not_declare(app: FastAPI, client: TestClient) -> None:
    """Also where nothing is declared, and before a body is read."""
    walked = 0
    for path, methods in app.openapi()["paths"].items():
        for method, operation in methods.items():
            if operation["operationId"] in ("put_report", "patch_report", "post_heartbeat"):
                continue  # For hosts alone: below.
            at = path.replace("{prefix_id}", "1").replace("{hold_id}", "1").replace("{", "").replace("}", "")
            problem = refused(client.request(method.upper(), f"{at}?bogus=1"))
            assert "query.bogus: there is no such parameter" in problem["detail"], operation["operationId"]
            assert f"{method.upper()} {path} takes " in problem["hint"]
            walked += 1
    assert walked > 50


def test_the_routes_know_what_the_document_says(app: FastAPI) -> None:
    documented = {
        operation["operationId"]: {
            one["name"]: one["schema"].get("type") == "array"
            for one in operation.get("parameters", ())
            if one["in"] == "query"
        }
        for methods in app.openapi()["paths"].values()
        for operation in methods.values()
    }
    known = {name: dict(QueryParameters.of_route(route.dependant).may_repeat) for name, route in routes().items()}
    assert known == documented
    assert {name for parameters in known.values() for name, several in parameters.items() if several} == {"label"}
    assert [name for name, route in routes().items() if not isinstance(route, StrictQueryRoute)] == []


def test_a_host_says_nothing_but_its_message(ipv4_site: TestClient, host_client: Callable[[str], TestClient]) -> None:
    host = {"name": "h1", "rack": "r1", "vrf": "red", "address": "192.0.2.1"}
    assert ipv4_site.post("/v1/hosts", json=host).status_code == 201
    beat = {"agent_started_at_unix_ms": 1, "sequence": 1, "digest": "0" * 64}
    assert host_client("h1").post("/v1/hosts/h1/heartbeat", json=beat).status_code == 200
    problem = refused(host_client("h1").post("/v1/hosts/h1/heartbeat?x=1", json=beat))
    assert problem["hint"] == "POST /v1/hosts/{host}/heartbeat takes no query parameters."


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("/v1/vms?limit=1&limit=2", "query.limit: it is given 2 times, wanted once"),
        ("/v1/vms?host=a&host=b&host=a", "query.host: it is given 3 times, wanted once"),
        ("/v1/hosts?q=a&q=a", "query.q: it is given 2 times, wanted once"),
        ("/v1/vrfs?=1", "query.: there is no such parameter"),
        ("/v1/vrfs?Limit=1", "query.Limit: there is no such parameter"),
        ("/v1/addresses?foo=1", "query.foo: there is no such parameter"),
        ("/v1/vms?q=%ff%fe", "query: it is no UTF-8"),
        ("/v1/vms?%ff=a", "query: it is no UTF-8"),
        ("/v1/vms?q=%ed%a0%80", "query: it is no UTF-8"),
    ],
)
def test_what_is_no_query_of_the_route_is_refused(client: TestClient, url: str, fault: str) -> None:
    assert fault in refused(client.get(url))["detail"]


@pytest.mark.parametrize("url", ["/v1/vms?label=a&label=b", "/v1/vms?q=%C3%A9+%26", "/v1/vms?host", "/v1/vrfs?&"])
def test_what_may_be_asked_still_is(client: TestClient, url: str) -> None:
    assert client.get(url).status_code == 200


def test_bytes_that_are_not_escaped_are_refused(app: FastAPI, client: TestClient) -> None:
    """They would be read as Latin-1."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    headers = [(b"authorization", client.headers["authorization"].encode())]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "scheme": "https",
        "path": "/v1/vms", "raw_path": b"/v1/vms", "query_string": "q=é".encode(), "headers": headers,
        "client": ("192.0.2.7", 1), "server": ("o", 443),
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 422
    assert b"percent-encoded" in sent[1]["body"]


def test_who_may_not_call_is_told_that_first(app: FastAPI, client_as: Callable[[Role], TestClient]) -> None:
    for path in ("/v1/vms", "/v1/addresses", "/v1/hosts/h1"):
        assert TestClient(app).get(f"{path}?bogus=1").status_code == 401
    assert client_as(Role.VIEWER).post("/v1/vrfs?bogus=1", json={"name": "red"}).json()["code"] == "auth.forbidden"


def test_a_flood_of_names_is_told_in_part(client: TestClient) -> None:
    problem = refused(client.get("/v1/vms?" + "&".join(f"{'x' * 200}{number}" for number in range(200))))
    assert problem["detail"].endswith("(and 192 more)")
    assert len(problem["detail"]) < 1000
