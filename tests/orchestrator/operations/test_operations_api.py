# SPDX-License-Identifier: Apache-2.0
"""The endpoints of VMs and operations, on the whole API with simulated hosts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from structlog.testing import capture_logs

from ppec_orchestrator.api.app import create_app
from ppec_orchestrator.api.services import make_services
from ppec_orchestrator.settings import Settings
from ppec_orchestrator.store.clock import utc_now
from ppec_orchestrator.store.tokens import Role, create_token

BODY = {"flavor": "small", "image": "debian", "name": "web", "count": 2}


@pytest.fixture
def clients(world: Any, tmp_path: Path) -> Iterator[dict[str, TestClient]]:
    """A client per role."""
    replica = world.replica()
    services = dataclasses.replace(
        make_services(Settings(state_dir=tmp_path / "state"), world.database), operations=replica
    )
    with world.database.write() as conn:
        tokens = {role: create_token(conn, role.value, role, now=utc_now()) for role in Role}
    app = create_app(services)
    made = {
        role.value: TestClient(app, headers={"Authorization": f"Bearer {token}"}, raise_server_exceptions=False)
        for role, token in tokens.items()
    }
    yield made
    for client in made.values():
        client.close()


@pytest.fixture
def operator(clients: dict[str, TestClient]) -> TestClient:
    return clients["operator"]


def test_create_is_accepted_with_a_location_and_then_listed(world: Any, operator: TestClient) -> None:
    answer = operator.post("/v1/vms", json=BODY)
    assert answer.status_code == 202, answer.text
    operation_id = answer.json()["operation_id"]
    assert answer.headers["location"] == f"/v1/operations/{operation_id}"
    assert world.ended(operation_id).state == "succeeded"
    listed = operator.get("/v1/vms").json()["items"]
    assert [vm["name"] for vm in listed] == ["web-1", "web-2"]
    assert all(vm["addresses"] and vm["host"] and vm["cells"] and vm["record"] == "active" for vm in listed)
    one = operator.get("/v1/vms/web-1").json()
    assert one == operator.get(f"/v1/vms/{one['vm_id']}").json() == listed[0]


def test_list_is_paged_and_narrowed(world: Any, operator: TestClient) -> None:
    world.ended(operator.post("/v1/vms", json=BODY | {"count": 5, "policy": "spread"}).json()["operation_id"])
    names, cursor = [], None
    while True:
        page = operator.get("/v1/vms", params={"limit": 2} | ({"cursor": cursor} if cursor else {})).json()
        names += [vm["name"] for vm in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert names == [f"web-{n}" for n in range(1, 6)]
    on_h1 = operator.get("/v1/vms", params={"host": "h1"}).json()["items"]
    assert {vm["host"] for vm in on_h1} == {"h1"}
    assert operator.get("/v1/vms", params={"record": "failed"}).json()["items"] == []
    assert operator.get("/v1/vms", params={"name": "web-3"}).json()["items"][0]["name"] == "web-3"
    assert operator.get("/v1/vms", params={"cursor": "bm9uc2Vuc2U"}).json()["code"] == "request.invalid"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"at_least": 1}, "at_least goes with mode best-effort or most-vcpus"),
        ({"at_least": 3, "mode": "best-effort"}, "more than the 2 VMs wanted"),
        ({"at_least": 3, "mode": "most-vcpus"}, "more than the 2 VMs wanted"),
        ({"at_least": 0, "mode": "best-effort"}, "at_least"),
    ],
)
def test_at_least_is_of_a_best_effort_and_no_more_than_all(
    operator: TestClient, more: dict[str, Any], said: str
) -> None:
    answer = operator.post("/v1/vms", json=BODY | more)
    assert (answer.status_code, answer.json()["code"]) == (422, "request.invalid")
    assert said in answer.text


def test_at_least_gets_what_fits_or_nothing(world: Any, operator: TestClient) -> None:
    """Three hosts have room for two VMs of a half each."""
    body = BODY | {"flavor": "half", "count": 9, "mode": "best-effort"}
    refused = operator.post("/v1/vms", json=body | {"at_least": 7})
    assert (refused.status_code, refused.json()["code"]) == (409, "placement.no_capacity")
    assert operator.get("/v1/vms").json()["items"] == []
    made = operator.post("/v1/vms", json=body | {"at_least": 6})
    assert made.status_code == 202, made.text
    # As of every best effort that did not get all.
    assert world.ended(made.json()["operation_id"]).state == "partial"
    assert len([vm for vm in operator.get("/v1/vms").json()["items"] if vm["record"] == "active"]) == 6


def test_refusal_counts_its_reasons(operator: TestClient) -> None:
    answer = operator.post("/v1/vms", json=BODY | {"flavor": "half", "count": 9})
    assert answer.status_code == 409
    problem = answer.json()
    assert problem["code"] == "placement.no_capacity"
    assert sum(problem["details"]["reasons"].values()) == 3
    assert operator.get("/v1/operations").json()["items"] == []


def test_idempotency_key_gives_the_same_answer_once(world: Any, operator: TestClient) -> None:
    key = {"Idempotency-Key": "abc-1"}
    first = operator.post("/v1/vms", json=BODY, headers=key)
    again = operator.post("/v1/vms", json=BODY, headers=key)
    assert first.json()["operation_id"] == again.json()["operation_id"]
    assert again.headers["location"] == first.headers["location"]
    other = operator.post("/v1/vms", json=BODY | {"count": 1}, headers=key)
    assert (other.status_code, other.json()["code"]) == (409, "request.idempotency_mismatch")
    world.ended(first.json()["operation_id"])
    assert len(operator.get("/v1/operations").json()["items"]) == 1


def test_actions_and_delete_are_operations(world: Any, operator: TestClient) -> None:
    world.ended(operator.post("/v1/vms", json=BODY).json()["operation_id"])
    stop = operator.post("/v1/vms/actions", json={"action": "stop", "vms": ["web-1", "web-2"]})
    assert (stop.status_code, stop.json()["kind"]) == (202, "vm.stop")
    assert world.ended(stop.json()["operation_id"]).state == "succeeded"
    for name in ("web-1", "web-2"):
        gone = operator.delete(f"/v1/vms/{name}")
        assert (gone.status_code, gone.json()["kind"]) == (202, "vm.delete")
        assert world.ended(gone.json()["operation_id"]).state == "succeeded"
    assert operator.get("/v1/vms/web-1").json()["code"] == "vm.not_found"
    world.assert_empty()
    kinds = [one["kind"] for one in operator.get("/v1/operations").json()["items"]]
    assert kinds == ["vm.delete", "vm.delete", "vm.stop", "vm.create"]
    assert len(operator.get("/v1/operations", params={"kind": "vm.delete"}).json()["items"]) == 2


def told(logs: Any) -> list[tuple[str, str, str, str]]:
    """Of the audit lines: what was done, to what, by which operation."""
    found = [line for line in logs if line["event"] == "audit"]
    return [(line["action"], line.get("asked", ""), line["subject"], line.get("operation", "")) for line in found]


def test_audit_lines_say_what_was_done_to_which_vms(world: Any, operator: TestClient) -> None:
    with capture_logs() as logs:
        made = operator.post("/v1/vms", json=BODY | {"count": 1}).json()
        nameless = operator.post("/v1/vms", json={"flavor": "small", "image": "debian", "host": "h1"}).json()
        for one in (made, nameless):
            world.ended(one["operation_id"])
        ids = [str(one["items"][0]["vm_id"]) for one in (made, nameless)]
        acts = []
        for action in ("stop", "start"):
            acts.append(operator.post("/v1/vms/actions", json={"action": action, "vms": ids}).json())
            world.ended(acts[-1]["operation_id"])
        gone = operator.delete(f"/v1/vms/{ids[0]}").json()
        assert operator.post("/v1/vms/actions", json={"action": "explode", "vms": ids}).status_code == 422
    made_up = nameless["items"][0]["name"]
    assert made_up.startswith("vm-")
    assert told(logs) == [
        ("create_vms", "", "web", made["operation_id"]),
        ("create_vms", "", made_up, nameless["operation_id"]),
        ("act_on_vms", "stop", f"web {made_up}", acts[0]["operation_id"]),
        ("act_on_vms", "start", f"web {made_up}", acts[1]["operation_id"]),
        ("delete_vm", "", "web", gone["operation_id"]),
    ]


def test_audit_line_of_a_large_batch_is_short_and_counts_the_rest(operator: TestClient) -> None:
    names = [f"{'n' * 55}-{number}" for number in range(9)]
    with capture_logs() as logs:
        answer = operator.post("/v1/vms", json={"flavor": "small", "image": "debian", "names": names})
    assert answer.status_code == 202, answer.text
    assert [line[2] for line in told(logs)] == [f"{' '.join(names[:3])} and 6 more"]


def test_viewer_may_look_but_not_change(clients: dict[str, TestClient]) -> None:
    viewer = clients["viewer"]
    assert viewer.get("/v1/vms").status_code == 200
    assert viewer.get("/v1/operations").status_code == 200
    for method, path, body in (
        ("POST", "/v1/vms", BODY),
        ("POST", "/v1/vms/actions", {"action": "stop", "vms": ["a"]}),
        ("DELETE", "/v1/vms/a", None),
        ("POST", "/v1/operations/op-1/cancel", None),
    ):
        assert viewer.request(method, path, json=body).json()["code"] == "auth.forbidden"


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for block in text.strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        if lines:
            found.append((lines["event"], json.loads(lines["data"])))
    return found


def test_operation_is_streamed_to_its_end(world: Any, operator: TestClient) -> None:
    world.dispatcher.gate.clear()
    operation_id = operator.post("/v1/vms", json=BODY).json()["operation_id"]
    world.wait_until(lambda: world.dispatcher.started, "the run has started")
    seen: list[str] = []
    with operator.stream("GET", f"/v1/operations/{operation_id}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        text = ""
        for part in answer.iter_text():
            text += part
            seen.append(part)
            # The run goes on only once the watcher has seen it running.
            world.dispatcher.gate.set()
    events = events_of(text)
    assert events[0][0] == "operation"
    assert events[0][1]["state"] == "running"
    assert events[-1][0] == "end"
    assert events[-1][1]["state"] == "succeeded"
    assert events[-1][1] == operator.get(f"/v1/operations/{operation_id}").json()


def test_ended_and_unknown_operations_can_be_watched_too(world: Any, operator: TestClient) -> None:
    operation_id = operator.post("/v1/vms", json=BODY).json()["operation_id"]
    world.ended(operation_id)
    events = events_of(operator.get(f"/v1/operations/{operation_id}/events").text)
    assert [name for name, _ in events] == ["operation", "end"]
    assert operator.get("/v1/operations/op-nowhere/events").json()["code"] == "operation.not_found"


def test_cancel_answers_with_the_operation(world: Any, operator: TestClient) -> None:
    world.dispatcher.gate.clear()
    operation_id = operator.post("/v1/vms", json=BODY).json()["operation_id"]
    answer = operator.post(f"/v1/operations/{operation_id}/cancel")
    assert (answer.status_code, answer.json()["cancel_requested"]) == (202, True)
    world.wait_until(lambda: world.show(operation_id).problem, "its owner has heard of it")
    world.dispatcher.gate.set()
    assert world.ended(operation_id).state == "cancelled"
    again = operator.post(f"/v1/operations/{operation_id}/cancel")
    assert (again.status_code, again.json()["code"]) == (409, "operation.finished")
    assert operator.post("/v1/operations/op-nowhere/cancel").json()["code"] == "operation.not_found"


@pytest.mark.parametrize(
    "body",
    [
        {**BODY, "name": "{{ lookup('pipe', 'id') }}"},
        {**BODY, "name": "../etc"},
        {**BODY, "count": 0},
        {**BODY, "count": 10**9},
        {**BODY, "surprise": 1},
        {**BODY, "user_data": "x" * 70_000},
        {**BODY, "names": ["a", "a"], "count": 1, "name": None},
    ],
)
def test_bad_requests_change_nothing(world: Any, operator: TestClient, body: dict[str, Any]) -> None:
    answer = operator.post("/v1/vms", json=body)
    assert (answer.status_code, answer.json()["code"]) == (422, "request.invalid")
    assert operator.get("/v1/operations").json()["items"] == []
    world.assert_empty()


def test_retune_is_accepted_under_its_key_and_shows_its_plan(
    world: Any, clients: dict[str, TestClient], operator: TestClient
) -> None:
    made = operator.post("/v1/vms", json={**BODY, "host": "h1"}).json()
    world.ended(made["operation_id"])
    asked = {"want": {"cells": [0]}, "plan_only": True}

    def retune(host: str, body: Any, client: TestClient = operator) -> Any:
        return client.post(f"/v1/hosts/{host}/retune", json=body, headers={"Idempotency-Key": "k"})

    with capture_logs() as logs:
        answer = retune("h1", asked)
    assert answer.status_code == 202, answer.text
    body = answer.json()
    assert answer.headers["location"] == f"/v1/operations/{body['operation_id']}"
    assert (body["kind"], body["items"]) == ("host.retune", [])
    assert (body["retune"]["host"], body["retune"]["plan"]) == ("h1", None)
    told = [(line["action"], line["subject"], line["operation"]) for line in logs if line["event"] == "audit"]
    assert told == [("retune_host", "h1", body["operation_id"])]
    assert world.ended(body["operation_id"]).state == "succeeded"
    again = retune("h1", asked).json()
    assert again["operation_id"] == body["operation_id"]
    assert [move["name"] for move in again["retune"]["plan"]["moves"]] == ["web-1", "web-2"]
    assert operator.get(f"/v1/operations/{body['operation_id']}").json() == again
    assert operator.get(f"/v1/operations/{made['operation_id']}").json()["retune"] is None
    assert retune("h1", {}).json()["code"] == "request.idempotency_mismatch"
    assert operator.post("/v1/hosts/h9/retune", json={}).json()["code"] == "host.not_found"
    assert operator.post("/v1/hosts/h1/retune", json={"bounds": {"moves": -1}}).json()["code"] == "request.invalid"
    assert retune("h1", asked, clients["viewer"]).status_code == 403


def test_resize_is_accepted_or_refused_with_what_is_free(
    world: Any, clients: dict[str, TestClient], operator: TestClient
) -> None:
    made = operator.post("/v1/vms", json={**BODY, "count": 1, "host": "h1"}).json()
    world.ended(made["operation_id"])
    answer = operator.patch("/v1/vms/web", json={"vcpus": 4}, headers={"Idempotency-Key": "k"})
    assert (answer.status_code, answer.json()["kind"]) == (202, "vm.resize")
    operation_id = answer.json()["operation_id"]
    assert answer.headers["location"] == f"/v1/operations/{operation_id}"
    assert world.ended(operation_id).state == "succeeded"
    again = operator.patch("/v1/vms/web", json={"vcpus": 4}, headers={"Idempotency-Key": "k"}).json()
    assert (again["operation_id"], again["items"][0]["resized"]) == (
        operation_id, {"vcpus": "now", "memory_mib": "unchanged"},
    )  # fmt: skip
    shown = operator.get("/v1/vms/web").json()
    assert (shown["vcpus"], shown["memory_mib"], shown["held"]) == (4, 1024, None)
    refused = operator.patch("/v1/vms/web", json={"vcpus": 18})
    assert (refused.status_code, refused.json()["code"]) == (409, "host.no_capacity")
    assert refused.json()["details"]["free"] == 6
    for body in ({}, {"vcpus": 3}, {"vcpus": None}, {"memory_mib": 1}, {"disk_mib": 9}):
        assert operator.patch("/v1/vms/web", json=body).status_code == 422, body
    assert operator.patch("/v1/vms/nobody", json={"vcpus": 2}).status_code == 404
    assert clients["viewer"].patch("/v1/vms/web", json={"vcpus": 2}).status_code == 403
