# SPDX-License-Identifier: Apache-2.0
"""A stranger is told that who calls must be known, and nothing else of a request: not what is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

# Public on purpose.
PUBLIC = {
    "get_health": "load balancers, and whoever waits for a start, have no token",
    "get_openapi": "it is the same everywhere, and says how to call",
    "enrol_host": "a host that enrols has nothing but the one-time token in its body",
}
QUERY, PATH, BODY = "?bogus=1&bogus=%ff", "Not%20A%00Name", b'{"bogus": 1, "bogus": '
FAULTS = {
    "query": (QUERY, "", None),
    "path": ("", PATH, None),
    "body": ("", "", BODY),
    "everything": (QUERY, PATH, BODY),
}


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """The same on every database: one is enough."""
    return sqlite_url


def asked(app: FastAPI, fault: str) -> Iterator[tuple[str, int, str]]:
    """What each operation of the document answers a stranger with such a request: its name, the status, the code."""
    query, in_path, body = FAULTS[fault]
    stranger = TestClient(app)
    for path, methods in app.openapi()["paths"].items():
        for method, operation in methods.items():
            at = re.sub(r"\{(\w+)\}", in_path or r"\1", path)
            answer = stranger.request(
                method, at + query, content=body, headers={"content-type": "application/json"} if body else None
            )
            yield operation["operationId"], answer.status_code, answer.json().get("code", "")


@pytest.mark.parametrize("fault", FAULTS)
def test_who_calls_is_asked_first_on_every_route(app: FastAPI, fault: str) -> None:
    answers = {name: (status, code) for name, status, code in asked(app, fault) if name not in PUBLIC}
    assert len(answers) > 60
    assert {name: told for name, told in answers.items() if told != (401, "auth.required")} == {}


def test_what_is_public_asks_for_no_token_and_refuses_what_is_wrong(app: FastAPI) -> None:
    answers = {name: status for name, status, _ in asked(app, "everything") if name in PUBLIC}
    assert answers == dict.fromkeys(PUBLIC, 422)
