# SPDX-License-Identifier: Apache-2.0
"""Plans that are shown and then executed as they are; and what a request can say of where its VMs go. On the whole
API."""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import delete, insert, select, update
from starlette.testclient import TestClient
from storage_given import give_storage, storage_used

from ppec_contract.api_placement import VmSize
from ppec_contract.api_vms import VmsCreate
from ppec_contract.vm import NumaPolicy
from ppec_orchestrator.api.app import create_app
from ppec_orchestrator.api.services import make_services, utc_now
from ppec_orchestrator.operations.advising import ADVISING, IN_REQUESTS
from ppec_orchestrator.placement.changes import RULES
from ppec_orchestrator.settings import Settings
from ppec_orchestrator.store import tables
from ppec_orchestrator.store.tokens import Role, create_token

BODY = {"flavor": "half", "image": "debian"}


@pytest.fixture
def api(world: Any, tmp_path: Path) -> Iterator[TestClient]:
    services = dataclasses.replace(
        make_services(Settings(state_dir=tmp_path / "state"), world.database), operations=world.replica()
    )
    with world.database.write() as conn:
        token = create_token(conn, "operator", Role.OPERATOR, now=utc_now())
        other = create_token(conn, "other", Role.OPERATOR, now=utc_now())
        admin = create_token(conn, "admin", Role.ADMIN, now=utc_now())
    client = TestClient(
        create_app(services), headers={"Authorization": f"Bearer {token}"}, raise_server_exceptions=False
    )
    client.other = {"Authorization": f"Bearer {other}"}  # type: ignore[attr-defined]
    client.admin = {"Authorization": f"Bearer {admin}"}  # type: ignore[attr-defined]
    yield client
    client.close()


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


# --- plans -----------------------------------------------------------------------------------------------------------


def test_a_plan_changes_nothing_and_is_executed_as_it_was_shown(world: Any, api: TestClient) -> None:
    view = planned(api, name="web", count=3)
    assert view["executable"]
    assert api.get("/v1/vms").json()["items"] == []
    answer = api.post(f"/v1/plans/{view['plan_id']}/execute")
    assert answer.status_code == 202, answer.text
    assert world.ended(answer.json()["operation_id"]).state == "succeeded"
    shown = {place["vm"]: (place["host"], place["cells"]) for place in view["placed"]}
    stand = {vm["name"]: (vm["host"], vm["cells"]) for vm in api.get("/v1/vms").json()["items"]}
    assert stand == shown
    assert code(api.post(f"/v1/plans/{view['plan_id']}/execute")) == (404, "plan.not_found")


def test_a_plan_says_over_how_many_hosts_a_place_won(api: TestClient) -> None:
    (place,) = planned(api, name="web")["placed"]
    assert place["candidates"] == 3
    assert not place["searched"]


def test_the_same_request_on_the_same_fleet_has_the_same_hash(world: Any, api: TestClient) -> None:
    first = planned(api, name="web")["plan_id"]
    assert planned(api, name="web")["plan_id"] == first
    assert planned(api, name="other")["plan_id"] != first
    created(world, api, name="between")
    assert planned(api, name="web")["plan_id"] != first


def test_what_a_plan_would_leave_exposed_is_part_of_its_hash(world: Any, api: TestClient) -> None:
    """Though no host that it stands on has changed: who approves it has seen that."""
    asked = {"name": "web", "host": "h1", "n_plus_one": {"mode": "warn"}}
    safe = planned(api, **asked)
    assert not safe["exposed"]
    for host in ("h2", "h3"):
        created(world, api, name=f"full-{host}", count=2, host=host)
    exposed = planned(api, **asked)
    assert exposed["exposed"]
    assert exposed["placed"][0]["host"] == "h1"
    assert exposed["plan_id"] != safe["plan_id"]


def test_a_soft_group_that_is_broken_is_part_of_a_plan_s_hash(world: Any, api: TestClient) -> None:
    asked = {"name": "web", "host": "h1", "groups": [{"name": "soft", "hard": False, "level": "rack"}]}
    kept = planned(api, **asked)
    assert kept["placed"][0]["broken_groups"] == 0
    created(world, api, name="beside", host="h2", groups=asked["groups"])
    broken = planned(api, **asked)
    assert broken["placed"][0]["broken_groups"] == 1
    assert broken["plan_id"] != kept["plan_id"]


def test_no_plan_is_shown_for_a_name_that_is_taken(world: Any, api: TestClient) -> None:
    created(world, api, name="web")
    assert code(api.post("/v1/plans", json=BODY | {"name": "web"})) == (409, "vm.exists")


def test_a_group_told_otherwise_is_refused_as_such_whether_there_is_room_or_not(world: Any, api: TestClient) -> None:
    created(world, api, name="web", groups=[{"name": "db", "apart": False}])
    for path, rule in (("plans", {"name": "db"}), ("vms", {"name": "db"}), ("vms", {"name": "db", "level": "rack"})):
        answer = api.post(f"/v1/{path}", json=BODY | {"name": "other", "count": 99, "groups": [rule]})
        assert code(answer) == (409, "group.mismatch")


def test_every_kind_of_refused_vm_is_told_what_would_help_it(api: TestClient) -> None:
    def item(name: str, vcpus: int, memory_mib: int) -> dict[str, Any]:
        return {"name": name, "size": {"vcpus": vcpus, "memory_mib": memory_mib, "disk_mib": 8192}}

    wide = [item(f"wide-{number}", 200, 1024) for number in range(4)]
    others = [item(f"other-{number}", 2, 1024 * (1000 + number)) for number in range(12)]
    asked = {"image": "debian", "items": [*wide, *others], "mode": "best-effort"}
    refused = api.post("/v1/plans", json=asked).json()["refused"]
    assert [bool(one["changes"]) for one in refused] == [True] * 13 + [False] * 3
    assert [one["advised"] for one in refused] == [True] * 13 + [False] * 3
    assert len({str(one["changes"]) for one in refused[:4]}) == 1


def test_what_a_best_effort_refuses_is_told_what_a_plan_tells(api: TestClient) -> None:
    """In the answer and for good; each kind is tried once, and kinds past the tenth are not."""
    small = {"vcpus": 2, "memory_mib": 1024, "disk_mib": 8192}
    wide = [{"name": f"wide-{number}", "size": small | {"vcpus": 200}} for number in range(4)]
    large = [
        {"name": f"large-{number}", "size": small | {"memory_mib": 1024 * (1000 + number)}} for number in range(12)
    ]
    items = [{"name": "made", "size": small}, *wide, *large]
    asked = {"image": "debian", "items": items, "mode": "best-effort"}
    shown = {one["vm"]: one["changes"] for one in api.post("/v1/plans", json=asked).json()["refused"]}
    before = ADVISING.tried
    answer = api.post("/v1/vms", json=asked)
    assert answer.status_code == 202, answer.text
    assert ADVISING.tried - before == 10
    kept = api.get(f"/v1/operations/{answer.json()['operation_id']}").json()
    for view in (answer.json(), kept):
        told = {item["name"]: item["problem"] for item in view["items"] if item["state"] == "refused"}
        assert {name: problem["details"].get("changes", []) for name, problem in told.items()} == shown
        cheapest = {name: f"Cheapest change: {found[0]['sentence']}." for name, found in shown.items() if found}
        assert len(cheapest) == 13
        assert all(sentence in told[name]["hint"] for name, sentence in cheapest.items())
        assert [item["name"] for item in view["items"] if item["state"] != "refused"] == ["made"]


def test_what_would_help_is_tried_once_for_all_that_ask_the_same(api: TestClient) -> None:
    """And on one thread: of 10,000 hosts 64 at once took 1.6 GiB, and ended no sooner."""

    def asked(*vcpus: int) -> int:
        """How many times something was tried."""
        before = ADVISING.tried
        sizes = [{"vcpus": each, "memory_mib": 1024, "disk_mib": 8192} for each in vcpus]
        bodies = [{"image": "debian", "size": size} for size in sizes]
        with ThreadPoolExecutor(4) as pool:
            shown = [pool.submit(api.post, "/v1/plans", json=body) for body in bodies]
            refused = [pool.submit(api.post, "/v1/vms", json=body) for body in bodies]
        assert all(answer.result().json()["refused"][0]["changes"] for answer in shown)
        assert all(answer.result().json()["details"]["changes"] for answer in refused)
        return ADVISING.tried - before

    assert asked(200, 200, 200, 200) == 1
    assert asked(202, 204, 206, 208) == 4
    assert asked(200, 202, 204, 206, 208) == 0
    assert sum(thread.name.startswith("advice") for thread in threading.enumerate()) == 1


def test_what_would_help_is_tried_anew_once_the_fleet_has_changed(world: Any, api: TestClient) -> None:
    """Of that fleet it is exact: what was freed, or taken, meanwhile counts."""
    wide = {"name": "wide", "flavor": None, "size": {"vcpus": 200, "memory_mib": 1024, "disk_mib": 8192}}
    before = ADVISING.tried
    assert planned(api, **wide)["refused"] == planned(api, **wide)["refused"]
    assert ADVISING.tried == before + 1
    created(world, api, name="between")
    planned(api, **wide)
    assert ADVISING.tried == before + 2


def test_what_helps_where_a_prefix_asked_for_ran_out(world: Any, api: TestClient) -> None:
    with world.database.write() as conn:
        conn.execute(update(tables.address).values(vm_id=UUID(int=1)))
    (refused,) = planned(api, name="web", networks=[{"prefix": "10.7.0.0/24"}])["refused"]
    assert refused["reasons"] == {"addresses": 3}
    sentences = {change["kind"]: change["sentence"] for change in refused["changes"]}
    prefix_id = api.get("/v1/prefixes").json()["items"][0]["prefix_id"]
    assert sentences["add-addresses"] == f"free or add one address in prefix {prefix_id}"


def test_a_plan_is_refused_once_its_host_has_changed(world: Any, api: TestClient) -> None:
    view = planned(api, name="web")
    host = view["placed"][0]["host"]
    created(world, api, name="between", host=host)
    answer = api.post(f"/v1/plans/{view['plan_id']}/execute")
    assert code(answer) == (409, "plan.outdated")
    assert answer.json()["details"]["hosts"] == [host]
    assert [vm["name"] for vm in api.get("/v1/vms").json()["items"]] == ["between"]


def test_a_change_elsewhere_leaves_a_plan_standing(world: Any, api: TestClient) -> None:
    view = planned(api, name="web")
    away = next(name for name in ("h1", "h2") if name != view["placed"][0]["host"])
    created(world, api, name="between", host=away)
    assert api.post(f"/v1/plans/{view['plan_id']}/execute").status_code == 202


def test_a_plan_with_groups_stands_on_the_hosts_its_rules_look_at(world: Any, api: TestClient) -> None:
    """A VM of the group that came to another host of the rack meanwhile would be beside it."""
    rule = {"name": "db", "level": "rack"}
    view = planned(api, name="web", groups=[rule])
    away = next(name for name in ("h1", "h2") if name != view["placed"][0]["host"])
    created(world, api, name="between", host=away, groups=[rule])
    assert code(api.post(f"/v1/plans/{view['plan_id']}/execute")) == (409, "plan.outdated")


def test_a_plan_expires(world: Any, api: TestClient) -> None:
    view = planned(api, name="web")
    with world.database.write() as conn:
        conn.execute(update(tables.plan).values(expires_at=utc_now() - timedelta(seconds=1)))
    assert code(api.post(f"/v1/plans/{view['plan_id']}/execute")) == (404, "plan.not_found")


def test_a_plan_is_executed_by_who_made_it_alone(api: TestClient) -> None:
    view = planned(api, name="web", user_data="#cloud-config\npassword: hunter2\n")
    assert "hunter2" not in str(view)
    answer = api.post(f"/v1/plans/{view['plan_id']}/execute", headers=api.other)  # type: ignore[attr-defined]
    assert code(answer) == (403, "auth.forbidden")


def test_executing_twice_under_one_key_makes_one_operation(world: Any, api: TestClient) -> None:
    view = planned(api, name="web")
    key = {"Idempotency-Key": "once"}
    path = f"/v1/plans/{view['plan_id']}/execute"
    first, second = (api.post(path, headers=key).json()["operation_id"] for _ in range(2))
    assert first == second


@pytest.mark.parametrize("level", ["host", "rack"])
def test_two_plans_that_begin_a_group_begin_it_in_one_place(world: Any, api: TestClient, level: str) -> None:
    rack = {"id": 2, "name": "rack2", "cluster_id": 1}
    with world.database.write() as conn:
        conn.execute(insert(tables.rack), rack)
        conn.execute(update(tables.host).where(tables.host.c.name == "h2").values(rack_id=2))
    rule = {"name": "pair", "apart": False, "level": level}
    views = [planned(api, name=f"on-{host}", host=host, groups=[rule]) for host in ("h1", "h2")]
    first, second = (api.post(f"/v1/plans/{view['plan_id']}/execute") for view in views)
    assert first.status_code == 202, first.text
    assert code(second) == (409, "plan.outdated")
    assert "group pair stands elsewhere by now" in second.json()["detail"]


def outdated(api: TestClient, view: dict[str, Any], why: str) -> None:
    answer = api.post(f"/v1/plans/{view['plan_id']}/execute")
    assert code(answer) == (409, "plan.outdated")
    assert why in answer.json()["detail"]
    assert api.get("/v1/vms").json()["items"] == []


def replace_image(world: Any, **more: Any) -> None:
    """Another image takes the row, and on SQLite the id, of the one that is deleted."""
    kept = {"format": "raw", "architecture": "x86_64", "size_bytes": 1, "virtual_size_mib": 1}
    with world.database.write() as conn:
        conn.execute(delete(tables.image))
        conn.execute(insert(tables.image).values(**kept | {"name": "other", "sha256": "b" * 64} | more))


def test_a_plan_does_not_take_another_image_for_its_own(world: Any, api: TestClient) -> None:
    view = planned(api, name="web")
    replace_image(world)
    outdated(api, view, "image debian is gone")


def test_a_plan_is_of_an_images_content(world: Any, api: TestClient) -> None:
    view = planned(api, name="web")
    with world.database.write() as conn:
        conn.execute(update(tables.image).values(sha256="c" * 64))
    outdated(api, view, "image debian is another one")


def test_whoever_makes_vms_of_the_image_holds_up_no_plan(world: Any, api: TestClient) -> None:
    if world.database.dialect == "sqlite":
        pytest.skip("has one writer, whom everybody waits for")
    view = planned(api, name="web")
    with ThreadPoolExecutor(1) as pool, world.database.write() as conn:
        # As the row of a new VM locks it.
        conn.execute(select(tables.image.c.id).with_for_update(read=True, key_share=True)).all()
        answer = pool.submit(api.post, f"/v1/plans/{view['plan_id']}/execute").result(timeout=60)
    assert answer.status_code == 202, answer.text


def test_a_plan_does_not_take_another_host_for_its_own(world: Any, api: TestClient) -> None:
    view = planned(api, name="web", host="h3")
    with world.database.write() as conn:
        conn.execute(update(tables.host).where(tables.host.c.name == "h3").values(name="other"))
    outdated(api, view, "h3 is gone")


@pytest.mark.parametrize(
    ("values", "why"),
    [({"draining": True}, "h2 is draining"), ({"last_seen_at": utc_now() - timedelta(days=2)}, "h2 is silent")],
)
def test_a_plan_is_refused_where_nothing_is_placed_any_more(
    world: Any, api: TestClient, values: dict[str, Any], why: str
) -> None:
    view = planned(api, name="web", host="h2")
    with world.database.write() as conn:
        conn.execute(update(tables.host).where(tables.host.c.name == "h2").values(**values))
    outdated(api, view, why)


def test_a_plan_whose_room_is_gone_is_outdated(world: Any, api: TestClient) -> None:
    """The host reports fewer cores: nothing was allocated, so its generation stands."""
    view = planned(api, name="web", host="h2")
    with world.database.write() as conn:
        conn.execute(update(tables.host_cell).where(tables.host_cell.c.host_id == 2).values(cores=1))
        conn.execute(update(tables.host).where(tables.host.c.name == "h2").values(disk_mib=400_000))
    outdated(api, view, "h2 has the room no more")


def test_one_plan_made_by_several_at_once_is_one_plan(api: TestClient) -> None:
    with ThreadPoolExecutor(4) as pool:
        for _ in range(6):
            answers = list(pool.map(lambda _: api.post("/v1/plans", json=BODY | {"name": "web"}), range(4)))
            assert {answer.status_code for answer in answers} == {200}, [answer.text for answer in answers]
            assert len({answer.json()["plan_id"] for answer in answers}) == 1


def test_what_a_plan_refused_is_refused_by_its_operation(api: TestClient) -> None:
    asked = {"name": "web", "count": 8, "mode": "best-effort"}
    view = planned(api, **asked)
    assert (len(view["placed"]), len(view["refused"])) == (6, 2)
    items = api.post(f"/v1/plans/{view['plan_id']}/execute").json()["items"]
    states = Counter((item["state"], (item["problem"] or {}).get("code")) for item in items)
    assert states == {("pending", None): 6, ("refused", "placement.no_capacity"): 2}


def test_a_reserved_address_is_had_by_its_vm_however_it_is_named(api: TestClient) -> None:
    hold = {"kind": "reserved", "first": "10.7.0.50", "reserved_for": "db"}
    assert api.post("/v1/prefixes/1/holds", json=hold, headers=api.admin).status_code == 201  # type: ignore[attr-defined]
    networks = [{"address": "10.7.0.50"}]
    for named in ({"name": "db"}, {"names": ["db"]}, {"items": [{"name": "db"}]}):
        assert planned(api, networks=networks, **named)["executable"]
    answer = api.post("/v1/plans", json=BODY | {"networks": networks, "items": [{"name": "web"}]})
    assert code(answer) == (409, "address.reserved")


def test_what_finds_no_place_is_told_with_the_cheapest_change(api: TestClient) -> None:
    view = planned(api, name="web", size={"vcpus": 20, "memory_mib": 1024, "disk_mib": 2048}, flavor=None)
    (refused,) = view["refused"]
    assert refused["reasons"] == {"vm-larger-than-cell": 3}
    assert (refused["changes"][0]["kind"], refused["changes"][0]["sentence"]) == (
        "other-size",
        "ask for 16 vCPUs, 1024 MiB and a disk of 2048 MiB",
    )
    assert not view["executable"]
    assert code(api.post(f"/v1/plans/{view['plan_id']}/execute")) == (404, "plan.not_found")


def test_a_refused_create_tells_it_too(api: TestClient) -> None:
    answer = api.post("/v1/vms", json=BODY | {"name": "web", "count": 9})
    assert code(answer) == (409, "placement.no_capacity")
    changes = answer.json()["details"]["changes"]
    assert {change["kind"] for change in changes} >= {"free-room"}
    assert changes[0]["sentence"] in answer.json()["hint"]


# --- where VMs may go ------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("rule", ["host_labels", "avoid_labels"])
def test_a_rule_to_give_up_is_called_as_it_was_asked_for(world: Any, api: TestClient, rule: str) -> None:
    with world.database.write() as conn:
        conn.execute(update(tables.host).values(labels={"disk": "ssd"}))
    asked = BODY | {"name": "a", rule: ["disk=hdd" if rule == "host_labels" else "disk"]}
    first = api.post("/v1/vms", json=asked).json()["details"]["changes"][0]
    assert (first["kind"], first["details"]["rules"]) == ("give-up", [rule])
    without = {name: value for name, value in asked.items() if name not in first["details"]["rules"]}
    assert api.post("/v1/vms", json=without).status_code == 202


def test_pools_and_drives_are_advised_on_in_the_words_of_requests(world: Any, api: TestClient) -> None:
    give_storage(world, "h1", "h2", "h3", pool_mib=8192, drives=2)
    size = {"vcpus": 2, "memory_mib": 1024, "disk_mib": 8192, "nvme_drives": 2}
    asked = {"image": "debian", "name": "a", "size": size, "pool": "ssd", "count": 3}
    assert set(created(world, api, flavor=None, **asked).values()) == {"h1", "h2", "h3"}
    full = api.post("/v1/vms", json=asked | {"name": "b"}).json()
    assert full["details"]["reasons"] == {"nvme": 3}
    assert "disk 8192 MiB in pool ssd, 2 NVMe drives" in full["detail"]
    only_pool = api.post("/v1/vms", json=asked | {"name": "b", "count": 1, "size": size | {"nvme_drives": 0}}).json()
    first = only_pool["details"]["changes"][0]
    assert (only_pool["details"]["reasons"], first["details"]["rules"]) == ({"disk": 3}, ["pool"])
    only_drives = {name: value for name, value in asked.items() if name != "pool"} | {"name": "b", "count": 1}
    changes = api.post("/v1/vms", json=only_drives).json()["details"]["changes"]
    (free,) = (change for change in changes if change["kind"] == "free-room")
    assert [room["cells"] for room in free["details"]["rooms"]] == [{"0": {"nvme_drives": 2}}] * 3


def test_a_plan_with_pools_and_drives_is_executed_as_it_was_shown(world: Any, api: TestClient) -> None:
    give_storage(world, "h2", pool_mib=20_000, drives=3)
    size = {"vcpus": 2, "memory_mib": 1024, "disk_mib": 8192, "nvme_drives": 1}
    asked = {"flavor": None, "size": size, "pool": "ssd", "count": 2}
    view = planned(api, name="web", **asked)
    other = planned(api, name="web", **asked | {"pool": None})
    assert [place["host"] for place in view["placed"]] == ["h2", "h2"]
    assert view["plan_id"] != other["plan_id"]
    answer = api.post(f"/v1/plans/{view['plan_id']}/execute")
    assert world.ended(answer.json()["operation_id"]).state == "succeeded"
    assert storage_used(world)["h2"] == (0, 16_384, 2)
    assert {(vm["pool"], vm["nvme_drives"]) for vm in api.get("/v1/vms?pool=ssd").json()["items"]} == {("ssd", 1)}
    # The room is gone: the other plan stands on that host as it was.
    assert code(api.post(f"/v1/plans/{other['plan_id']}/execute")) == (409, "plan.outdated")
    world.assert_consistent()


def test_requests_have_the_words_that_advice_calls_their_rules_by() -> None:
    words = {IN_REQUESTS.get(rule, rule) for rule in RULES} - {"failed"}
    fields = (
        {f"numa.{name}" for name in NumaPolicy.model_fields} | set(VmsCreate.model_fields) | set(VmSize.model_fields)
    )
    assert words <= fields
    assert set(IN_REQUESTS.values()) <= fields


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


def test_a_new_host_is_no_stranger_to_a_kept_plan(world: Any, api: TestClient) -> None:
    view = planned(api, name="web")
    with world.database.write() as conn:
        conn.execute(
            insert(tables.host).values(
                id=99, name="h9", rack_id=1, vrf_id=1, address="127.0.0.1", port=9, draining=False,
                enrolled_at=utc_now(), last_seen_at=utc_now(), disk_mib=0,
            )
        )  # fmt: skip
    assert api.post(f"/v1/plans/{view['plan_id']}/execute").status_code == 202
