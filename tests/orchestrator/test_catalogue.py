# SPDX-License-Identifier: Apache-2.0
"""Data centres, clusters, racks, flavors and VRFs: the same endpoints, the same answers."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

DATACENTRE = {"name": "dc1", "region": "north"}
CLUSTER = {"name": "c1", "datacentre": "dc1"}
RACK = {"name": "r1", "cluster": "c1"}
FLAVOR = {"name": "small", "vcpus": 2, "memory_mib": 512, "disk_mib": 1024}
ORDINARY = {
    "nvme_drives": 0,
    "max_vcpus": None,
    "max_memory_mib": None,
    "numa": {"cpus": "dedicated", "smt": "prefer", "multi_cell": False, "huge_page_kib": 0},
}
SPECIAL = {
    "nvme_drives": 2,
    "max_vcpus": 8,
    "max_memory_mib": 1024,
    "numa": {"cpus": "dedicated", "smt": "isolate", "multi_cell": True, "huge_page_kib": 2048},
}
VRF = {"name": "red"}
NO_RULE = {"n_plus_one": {"mode": "off", "level": "host"}}
CASES = [
    pytest.param("datacentres", DATACENTRE, {}, [], id="datacentres"),
    pytest.param(
        "clusters", CLUSTER, {"architecture": "x86_64"} | NO_RULE, [("datacentres", DATACENTRE)], id="clusters"
    ),
    pytest.param(
        "clusters",
        CLUSTER | {"n_plus_one": {"mode": "warn", "level": "rack"}},
        {"architecture": "x86_64"},
        [("datacentres", DATACENTRE)],
        id="clusters-with-a-rule",
    ),
    pytest.param("racks", RACK, {}, [("datacentres", DATACENTRE), ("clusters", CLUSTER)], id="racks"),
    pytest.param("flavors", FLAVOR, ORDINARY, [], id="flavors"),
    pytest.param("flavors", FLAVOR | SPECIAL, {}, [], id="flavors-with-a-policy"),
    pytest.param("vrfs", VRF, {"description": ""}, [], id="vrfs"),
]
Needed = list[tuple[str, dict[str, Any]]]


def _make(client: TestClient, path: str, body: dict[str, Any]) -> Any:
    response = client.post(f"/v1/{path}", json=body)
    assert response.status_code == 201, response.text
    return response.json()


@pytest.mark.parametrize(("path", "body", "filled_in", "needed"), CASES)
def test_a_resource_lives_and_dies(
    client: TestClient, path: str, body: dict[str, Any], filled_in: dict[str, Any], needed: Needed
) -> None:
    for other, values in needed:
        _make(client, other, values)
    view = body | filled_in
    assert _make(client, path, body) == view
    assert client.get(f"/v1/{path}/{body['name']}").json() == view
    assert client.get(f"/v1/{path}").json() == {"items": [view], "next_cursor": None}
    again = client.post(f"/v1/{path}", json=body)
    assert (again.status_code, again.json()["code"].split(".")[1]) == (409, "exists")
    assert client.delete(f"/v1/{path}/{body['name']}").status_code == 204
    gone = client.get(f"/v1/{path}/{body['name']}")
    assert (gone.status_code, gone.json()["code"].split(".")[1]) == (404, "not_found")
    assert client.delete(f"/v1/{path}/{body['name']}").status_code == 404


@pytest.mark.parametrize(
    ("path", "body", "code"),
    [
        ("clusters", CLUSTER, "datacentre.not_found"),
        ("racks", RACK, "cluster.not_found"),
    ],
)
def test_a_reference_must_exist(client: TestClient, path: str, body: dict[str, Any], code: str) -> None:
    refused = client.post(f"/v1/{path}", json=body)
    assert (refused.status_code, refused.json()["code"]) == (404, code)
    assert client.get(f"/v1/{path}").json()["items"] == []


def test_what_is_referred_to_stays(client: TestClient) -> None:
    for path, body in (("datacentres", DATACENTRE), ("clusters", CLUSTER), ("racks", RACK)):
        _make(client, path, body)
    for path, name in (("datacentres", "dc1"), ("clusters", "c1")):
        refused = client.delete(f"/v1/{path}/{name}")
        assert (refused.status_code, refused.json()["code"]) == (409, "resource.in_use")
        assert client.get(f"/v1/{path}/{name}").status_code == 200


def test_pages_hold_everything_once(client: TestClient) -> None:
    names = [f"v{index:02}" for index in range(7)]
    for name in reversed(names):
        _make(client, "vrfs", {"name": name})
    seen, cursor, pages = [], None, 0
    while True:
        params = {"limit": 3} | ({"cursor": cursor} if cursor else {})
        page = client.get("/v1/vrfs", params=params).json()
        seen += [item["name"] for item in page["items"]]
        pages += 1
        if (cursor := page["next_cursor"]) is None:
            break
    assert (seen, pages) == (names, 3)


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=501", "limit=x", "cursor=%25", "cursor=MQ", "cursor=bnVsbA", "cursor=Ilx1MDAwMCI"]
)
def test_a_page_that_can_not_be_is_refused(client: TestClient, query: str) -> None:
    refused = client.get(f"/v1/vrfs?{query}")
    assert (refused.status_code, refused.json()["code"]) == (422, "request.invalid")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"vcpus": 3}, "vm.odd_vcpus"),
        ({"vcpus": 0}, "request.invalid"),
        ({"vcpus": -2}, "request.invalid"),
        ({"vcpus": 2**31}, "request.invalid"),
        ({"vcpus": "2"}, "request.invalid"),
        ({"memory_mib": 1.5}, "request.invalid"),
        ({"disk_mib": True}, "request.invalid"),
        ({"name": "{{ lookup('pipe','id') }}"}, "request.invalid"),
        ({"name": "../etc"}, "request.invalid"),
        ({"name": "a\n"}, "request.invalid"),
        ({"extra": 1}, "request.invalid"),
        ({"max_vcpus": 5}, "vm.odd_vcpus"),
        ({"vcpus": 4, "max_vcpus": 2}, "request.invalid"),
        ({"max_memory_mib": 256}, "request.invalid"),
        ({"memory_mib": 513, "numa": {"huge_page_kib": 2048}}, "request.invalid"),
        ({"max_memory_mib": 515, "numa": {"huge_page_kib": 2048}}, "request.invalid"),
        ({"numa": {"huge_page_kib": 4096}}, "request.invalid"),
        ({"numa": {"cpus": "shared", "multi_cell": True}}, "request.invalid"),
        ({"numa": {"cpus": "shared", "smt": "isolate"}}, "request.invalid"),
        ({"numa": None}, "request.invalid"),
    ],
)
def test_a_bad_flavor_is_refused_and_changes_nothing(client: TestClient, change: dict[str, Any], code: str) -> None:
    refused = client.post("/v1/flavors", json=FLAVOR | change)
    assert (refused.status_code, refused.json()["code"]) == (422, code)
    assert client.get("/v1/flavors").json()["items"] == []
