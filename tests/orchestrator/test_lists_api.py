# SPDX-License-Identifier: Apache-2.0
"""Lists and labels through the API: cursors and the lists they belong to, streams of lines, refusals."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from ppec_contract.model import MAX_LABELS
from ppec_lab.fleet_in_store import write_fleet
from ppec_lab.generated_fleet import generate
from ppec_orchestrator.api.services import Services
from ppec_orchestrator.roles import Role
from ppec_orchestrator.store import tables

LINES = {"accept": "application/x-ndjson"}


@pytest.fixture
def fleet(client: TestClient, services: Services) -> TestClient:
    """Forty hosts with 1,200 VMs: more than one part of a stream."""
    write_fleet(services.database, generate(100, 1200, seed=3), services.now())
    return client


def names(items: list[dict[str, Any]]) -> list[str]:
    return [item["name"] for item in items]


def whole(client: TestClient, url: str) -> list[dict[str, Any]]:
    answer = client.get(url, headers=LINES)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/x-ndjson")
    return [json.loads(line) for line in answer.content.splitlines()]


def paged(client: TestClient, url: str) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    cursor = ""
    while True:
        page = client.get(url + cursor).json()
        items += page["items"]
        if page["next_cursor"] is None:
            return items
        cursor = f"&cursor={page['next_cursor']}"


@pytest.mark.parametrize(
    "url",
    ["/v1/vms?", "/v1/hosts?", "/v1/vms?q=web&label=tier=web", "/v1/hosts?label=power=feed-1", "/v1/vms?q=nothing"],
)
def test_a_stream_is_what_the_pages_are_together(fleet: TestClient, url: str) -> None:
    together = paged(fleet, f"{url}&limit=500")
    assert whole(fleet, url) == together
    assert names(together) == sorted(names(together))
    assert len({item.get("vm_id", item["name"]) for item in together}) == len(together)


def test_a_stream_goes_on_from_a_cursor(fleet: TestClient) -> None:
    page = fleet.get("/v1/vms?limit=100").json()
    cursor = page["next_cursor"]
    assert names(page["items"] + whole(fleet, f"/v1/vms?cursor={cursor}")) == names(whole(fleet, "/v1/vms"))


def test_an_error_of_a_stream_is_a_problem(fleet: TestClient) -> None:
    refused = fleet.get("/v1/vms?cursor=x", headers=LINES)
    assert (refused.status_code, refused.json()["code"]) == (422, "request.invalid")


def test_a_cursor_is_of_its_list_and_filters_alone(fleet: TestClient) -> None:
    cursor = fleet.get("/v1/vms?limit=7&label=tier=web&label=env=prod").json()["next_cursor"]
    same = "/v1/vms?label=env=prod&label=tier=web"
    assert fleet.get(f"{same}&limit=9&cursor={cursor}").status_code == 200
    for other in ("/v1/vms?label=tier=web", f"{same}&q=a", "/v1/hosts?label=tier=web&label=env=prod", "/v1/vms?q=y"):
        refused = fleet.get(f"{other}&cursor={cursor}")
        assert (refused.status_code, refused.json()["code"]) == (422, "request.invalid")
        assert "other filters" in refused.json()["detail"]


@pytest.mark.parametrize(
    "content",
    [["", 1], ["", None], ["", ["a"]], [1, "a"], {"a": 1}, "a", ["", "a", "b"], ["", "\ud800"], ["", "a\x00/"], 1e999],
)
def test_a_made_up_cursor_is_refused(client: TestClient, content: Any) -> None:
    cursor = base64.urlsafe_b64encode(json.dumps(content).encode()).decode().rstrip("=")
    for url in ("/v1/vms", "/v1/hosts", "/v1/racks"):
        refused = client.get(f"{url}?cursor={cursor}")
        assert (refused.status_code, refused.json()["code"]) == (422, "request.invalid")


def test_a_cursor_that_was_tampered_with_is_refused(fleet: TestClient) -> None:
    cursor = fleet.get("/v1/vms?limit=1").json()["next_cursor"]
    mark = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))[0]
    for key in (1, "a", "a/b", "a\x00/1", "\ud800/1"):
        made_up = base64.urlsafe_b64encode(json.dumps([mark, key]).encode()).decode().rstrip("=")
        assert fleet.get(f"/v1/vms?cursor={made_up}").json()["code"] == "request.invalid"


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=501", "record=gone", "observed=gone", "architecture=z80", "q=%00", "q=a%0Ab", "label=",
              "label=%00", "&".join(["label=a"] * 9), f"q={'a' * 129}"]
)  # fmt: skip
def test_filters_that_can_not_be_meant_are_refused(client: TestClient, query: str) -> None:
    assert client.get(f"/v1/vms?{query}").json()["code"] == "request.invalid"


# --- labels ----------------------------------------------------------------------------------------------------------


def test_labels_of_a_host_are_set_found_and_removed(ipv4_site: TestClient, services: Services) -> None:
    host = {"name": "h1", "rack": "r1", "vrf": "red", "address": "192.0.2.1", "labels": {"zone": "a", "gpu": ""}}
    assert ipv4_site.post("/v1/hosts", json=host).json()["labels"] == {"zone": "a", "gpu": ""}
    for query in ("label=gpu", "label=gpu=", "label=zone=a&label=gpu", "q=ZONE=A"):
        assert names(ipv4_site.get(f"/v1/hosts?{query}").json()["items"]) == ["h1"]
    changed = ipv4_site.patch("/v1/hosts/h1/labels", json={"labels": {"zone": "b", "gpu": None, "new": "x"}})
    assert changed.json()["labels"] == {"zone": "b", "new": "x"}
    for query in ("label=gpu", "label=zone=a", "q=gpu"):
        assert ipv4_site.get(f"/v1/hosts?{query}").json()["items"] == []
    assert names(ipv4_site.get("/v1/hosts?label=zone=b&q=new=x").json()["items"]) == ["h1"]
    with services.database.read() as conn:
        rows = conn.execute(select(tables.host_label.c.key, tables.host_label.c.value)).all()
    assert dict(map(tuple, rows)) == {"zone": "b", "new": "x"}


def test_labels_of_a_vm_are_set_found_and_removed(fleet: TestClient) -> None:
    vm = fleet.get("/v1/vms?record=active&limit=1").json()["items"][0]
    for ref in (vm["name"], vm["vm_id"]):
        changed = fleet.patch(f"/v1/vms/{ref}/labels", json={"labels": {"tier": "odd", "note": "50%", "app": None}})
        assert changed.json() == vm | {"labels": {"tier": "odd", "note": "50%", "env": vm["labels"]["env"]}}
    for query in ("label=tier=odd", "label=note", "q=note=50%25"):
        assert names(fleet.get(f"/v1/vms?{query}").json()["items"]) == [vm["name"]]
    assert vm["name"] not in names(paged(fleet, f"/v1/vms?label=tier={vm['labels']['tier']}"))


def test_labels_have_bounds_and_a_refusal_changes_nothing(
    ipv4_site: TestClient, client_as: Callable[[Role], TestClient]
) -> None:
    host = {"name": "h1", "rack": "r1", "vrf": "red", "address": "192.0.2.1"}
    ipv4_site.post("/v1/hosts", json=host | {"labels": {f"k{n}": "" for n in range(MAX_LABELS)}})
    before = ipv4_site.get("/v1/hosts/h1").json()
    for labels in ({"a=b": ""}, {"": "x"}, {"a" * 65: ""}, {"a": "b" * 257}, {"a": "\n"}, {"a": 1}, {}, {"more": "x"}):
        refused = ipv4_site.patch("/v1/hosts/h1/labels", json={"labels": labels})
        assert (refused.status_code, refused.json()["code"]) == (422, "request.invalid"), labels
    assert ipv4_site.get("/v1/hosts/h1").json() == before
    assert ipv4_site.patch("/v1/hosts/h1/labels", json={"labels": {"k0": None, "more": "x"}}).status_code == 200
    for path in ("hosts", "vms"):
        gone = ipv4_site.patch(f"/v1/{path}/none/labels", json={"labels": {"a": "b"}})
        assert gone.json()["code"] in ("host.not_found", "vm.not_found")
        viewer = client_as(Role.VIEWER).patch(f"/v1/{path}/h1/labels", json={"labels": {"a": "b"}})
        assert viewer.json()["code"] == "auth.forbidden"
