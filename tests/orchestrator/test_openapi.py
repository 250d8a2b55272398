# SPDX-License-Identifier: Apache-2.0
"""The OpenAPI document in docs/ is the API's."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.routing import Route

from ppec_orchestrator.api.openapi import openapi_document, rendered

DOCUMENT = Path(__file__).parents[2] / "docs" / "openapi.json"


def test_the_document_is_current() -> None:
    regenerate = "python -m ppec_orchestrator.api.openapi docs/openapi.json"
    assert DOCUMENT.read_text(encoding="utf-8") == rendered(), f"the API changed: run `{regenerate}`"


def test_every_operation_has_a_name_of_its_own_and_says_how_it_fails() -> None:
    document = openapi_document()
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    names = [operation["operationId"] for operation in operations]
    assert len(set(names)) == len(names)
    for operation in operations:
        assert operation["summary"]
        assert "application/problem+json" in operation["responses"]["default"]["content"]


def test_every_reference_leads_somewhere() -> None:
    document = openapi_document()
    text = rendered()
    named = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert named <= set(document["components"]["schemas"])


def test_the_api_serves_it_to_everyone_and_takes_no_query(app: FastAPI) -> None:
    stranger = TestClient(app)
    served = stranger.get("/v1/openapi.json")
    assert (served.status_code, served.headers["content-type"]) == (200, "application/json")
    assert served.json() == openapi_document()
    refused = stranger.get("/v1/openapi.json?bogus=1")
    assert (refused.status_code, refused.json()["code"]) == (422, "request.invalid")
    assert refused.json()["hint"] == "GET /v1/openapi.json takes no query parameters."


def test_no_route_is_one_of_fastapis_own(app: FastAPI) -> None:
    """They take any query."""
    assert [route.path for route in app.routes if type(route) is Route] == []
