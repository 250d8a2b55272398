# SPDX-License-Identifier: Apache-2.0
"""What a request can say of where its VMs go. On the whole API."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from plan_requests import BODY, code, created, planned
from sqlalchemy import Connection, select, update
from starlette.testclient import TestClient

from ppec_orchestrator.operations import creation
from ppec_orchestrator.store import tables


def test_items_have_sizes_of_their_own(world: Any, api: TestClient) -> None:
    size = {"vcpus": 4, "memory_mib": 2048, "disk_mib": 9000}
    items = [{"name": "a"}, {"name": "b", "flavor": "small"}, {"name": "c", "size": size}]
    created(world, api, items=items)
    listed = {vm["name"]: vm for vm in api.get("/v1/vms").json()["items"]}
    assert {name: (vm["flavor"], vm["vcpus"], vm["disk_mib"]) for name, vm in listed.items()} == {
        "a": ("half", 8, 8192),
        "b": ("small", 2, 8192),
        "c": (None, 4, 9000),
    }


def test_groups_keep_vms_apart_now_and_later(world: Any, api: TestClient) -> None:
    rule = {"name": "db"}
    first = created(world, api, name="db", count=2, policy="pack", groups=[rule])
    assert len(set(first.values())) == 2
    later = created(world, api, name="db-later", policy="pack", groups=[rule])
    assert set(later.values()).isdisjoint(first.values())
    answer = api.post("/v1/vms", json=BODY | {"name": "fourth", "groups": [rule]})
    assert code(answer) == (409, "placement.no_capacity")
    assert answer.json()["details"]["reasons"] == {"anti-affinity": 3}
    assert answer.json()["details"]["changes"][0]["sentence"] == "give up the rule of group db"
    assert api.get("/v1/vms/db-1").json()["groups"] == [{"name": "db", "apart": True, "level": "host", "hard": True}]


def test_a_group_together_stays_on_one_host(world: Any, api: TestClient) -> None:
    rule = {"name": "pair", "apart": False}
    hosts = created(world, api, name="pair", count=2, policy="spread", groups=[rule])
    assert len(set(hosts.values())) == 1


def test_a_group_can_not_be_defined_in_two_ways(world: Any, api: TestClient) -> None:
    created(world, api, name="one", groups=[{"name": "db"}])
    answer = api.post("/v1/vms", json=BODY | {"name": "two", "groups": [{"name": "db", "apart": False}]})
    assert code(answer) == (409, "group.mismatch")
    twice = [{"name": "db"}, {"name": "db", "hard": False}]
    assert code(api.post("/v1/vms", json=BODY | {"name": "two", "groups": twice})) == (422, "request.invalid")


def test_hosts_are_chosen_by_labels_and_region(world: Any, api: TestClient) -> None:
    with world.database.write() as conn:
        conn.execute(update(tables.host).where(tables.host.c.name == "h2").values(labels={"disk": "ssd"}))
        conn.execute(update(tables.host).where(tables.host.c.name == "h3").values(labels={"disk": "hdd"}))
    assert created(world, api, name="a", host_labels=["disk=ssd"]) == {"a": "h2"}
    assert set(created(world, api, name="b", count=2, avoid_labels=["disk"]).values()) == {"h1"}
    assert created(world, api, name="c", host_labels=["disk"], avoid_labels=["disk=ssd"], region="r1") == {"c": "h3"}
    assert code(api.post("/v1/vms", json=BODY | {"region": "nowhere"})) == (404, "datacentre.not_found")


def test_n_plus_one_keeps_room_for_the_loss_of_a_host(world: Any, api: TestClient) -> None:
    """Three hosts of two such VMs each: four can restart after the loss of any, a fifth could not."""
    required = {"n_plus_one": {"mode": "required"}}
    assert max(Counter(created(world, api, name="a", count=4, **required).values()).values()) <= 2
    answer = api.post("/v1/vms", json=BODY | {"name": "fifth"} | required)
    assert code(answer) == (409, "placement.no_capacity")
    assert answer.json()["details"]["reasons"].get("n-plus-one", 0) >= 1
    view = planned(api, name="fifth", n_plus_one={"mode": "warn"})
    assert view["executable"]
    assert view["exposed"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"flavor": None}, "flavor or a size"),
        ({"size": {"vcpus": 2, "memory_mib": 64, "disk_mib": 1}}, "flavor and a size"),
        ({"items": [{"name": "a"}], "count": 2}, "either items"),
        ({"items": [{"name": "a"}, {"name": "a"}]}, "twice"),
        ({"flavor": None, "items": [{"name": "a", "flavor": "half"}, {"name": "b"}]}, "item b"),
        ({"host_labels": ["=x"]}, "host_labels"),
        ({"groups": [{"name": "g", "level": "floor"}]}, "level"),
        ({"n_plus_one": {"mode": "perhaps"}}, "mode"),
    ],
)
def test_what_contradicts_itself_is_refused(api: TestClient, body: dict[str, Any], words: str) -> None:
    answer = api.post("/v1/plans", json={key: value for key, value in (BODY | body).items() if value is not None})
    assert code(answer) == (422, "request.invalid")
    assert words in answer.text


def test_two_who_begin_a_group_at_once_begin_one_group(
    world: Any, api: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hard one and a soft one, on different hosts and without waiting for each other's turn. Each writes its members
    late enough for the other to have looked for some."""
    original, looked = creation.insert_groups, threading.Barrier(2)

    def late(conn: Connection, members: Any) -> None:
        with suppress(threading.BrokenBarrierError):
            looked.wait(0.5)
        original(conn, members)

    monkeypatch.setattr(creation, "insert_groups", late)
    bodies = [
        BODY
        | {"name": f"on-{host}", "host": host, "groups": [{"name": "db", "hard": hard}]}
        | {"mode": "best-effort", "at_least": 1}
        for host, hard in (("h1", True), ("h2", False))
    ]
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda body: api.post("/v1/vms", json=body), bodies))
    ends = sorted((answer.status_code, answer.json().get("code")) for answer in answers)
    assert ends == [(202, None), (409, "group.mismatch")]


def test_groups_go_with_their_vms(world: Any, api: TestClient) -> None:
    created(world, api, name="one", groups=[{"name": "db"}])
    world.ended(api.delete("/v1/vms/one").json()["operation_id"])
    with world.database.read() as conn:
        assert conn.execute(select(tables.vm_group)).all() == []
    created(world, api, name="two", groups=[{"name": "db", "apart": False}])


def test_a_group_of_the_record_counts_after_a_restart(world: Any, api: TestClient) -> None:
    """The fleet read anew knows the groups: here, of a VM that another process made."""
    first = created(world, api, name="one", groups=[{"name": "db"}])
    with world.database.read() as conn:
        vm_id = conn.execute(select(tables.vm.c.id).where(tables.vm.c.name == "one")).scalar_one()
        assert conn.execute(select(tables.vm_group.c.vm_id)).scalars().all() == [vm_id]
    fresh = world.replica("two")
    places = {place.vm: place.host for place in fresh.show_plan(_asked(groups=({"name": "db"},)), "operator").placed}
    assert set(places.values()).isdisjoint(first.values())


def _asked(**more: Any) -> Any:
    from ppec_contract.api_vms import VmsCreate

    return VmsCreate.model_validate(BODY | {"name": "two", "count": 2} | more)
