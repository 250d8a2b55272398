# SPDX-License-Identifier: Apache-2.0
"""What tests of plans ask the API for."""

from __future__ import annotations

from typing import Any

from starlette.testclient import TestClient

BODY = {"flavor": "half", "image": "debian"}


def planned(api: TestClient, **body: Any) -> dict[str, Any]:
    answer = api.post("/v1/plans", json=BODY | body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def created(world: Any, api: TestClient, **body: Any) -> dict[str, str]:
    """Where each VM came to stand."""
    answer = api.post("/v1/vms", json=BODY | body)
    assert answer.status_code == 202, answer.text
    assert world.ended(answer.json()["operation_id"]).state == "succeeded"
    return {item["vm"]["name"] if "vm" in item else item["name"]: item["host"] for item in answer.json()["items"]}


def code(answer: Any) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]
