# SPDX-License-Identifier: Apache-2.0
"""Plans that are shown and then executed as they are. On the whole API."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from plan_requests import BODY, code, created, planned
from sqlalchemy import delete, insert, select, update
from starlette.testclient import TestClient
from storage_given import give_storage, storage_used

from ppec_orchestrator.operations import creation
from ppec_orchestrator.store import tables
from ppec_orchestrator.store.clock import utc_now
from ppec_orchestrator.store.faults import TransactionLostError


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


N_PLUS_ONE = {"n_plus_one": {"mode": "required"}}


def test_a_plan_with_n_plus_one_counts_on_the_hosts_that_drain_since(world: Any, api: TestClient) -> None:
    """VMs of a lost host could not restart there any more."""
    view = planned(api, name="web", **N_PLUS_ONE)
    away = next(name for name in ("h1", "h2") if name != view["placed"][0]["host"])
    assert api.patch(f"/v1/hosts/{away}", json={"draining": True}, headers=api.admin).status_code == 200  # type: ignore[attr-defined]
    answer = api.post(f"/v1/plans/{view['plan_id']}/execute")
    assert code(answer) == (409, "plan.outdated")
    assert answer.json()["details"]["hosts"] == [away]


@pytest.mark.parametrize(("lost", "status"), [(2, 202), (3, 503)])
def test_an_execution_that_loses_against_another_transaction_is_run_again(
    api: TestClient, monkeypatch: pytest.MonkeyPatch, lost: int, status: int
) -> None:
    original, begun = creation.still_stands, []

    def losing(*of_plan: Any) -> None:
        begun.append(1)
        if len(begun) <= lost:
            raise TransactionLostError
        original(*of_plan)

    monkeypatch.setattr(creation, "still_stands", losing)
    view = planned(api, name="web")
    assert api.post(f"/v1/plans/{view['plan_id']}/execute").status_code == status
    assert len(begun) == 3


@pytest.mark.parametrize("already", [True, False])
def test_a_plan_with_n_plus_one_counts_on_the_hosts_that_fall_silent(
    world: Any, api: TestClient, *, already: bool
) -> None:
    """One that was silent when the plan was made isn't counted on."""
    # A host is silent after an hour.
    ends = utc_now() - timedelta(seconds=3600 if already else 3540)
    with world.database.write() as conn:
        conn.execute(update(tables.host).where(tables.host.c.name == "h3").values(last_seen_at=ends))
    view = planned(api, name="web", host="h1", **N_PLUS_ONE)
    world.ahead = timedelta(seconds=120)
    answer = api.post(f"/v1/plans/{view['plan_id']}/execute")
    if already:
        assert answer.status_code == 202
    else:
        assert code(answer) == (409, "plan.outdated")
        assert "h3 is silent" in answer.json()["detail"]


def test_a_plan_counts_on_the_labels_of_its_hosts(world: Any, api: TestClient) -> None:
    def label(value: str | None) -> None:
        answer = api.patch("/v1/hosts/h2/labels", json={"labels": {"licensed": value}}, headers=api.admin)  # type: ignore[attr-defined]
        assert answer.status_code == 200, answer.text

    label("yes")
    view = planned(api, name="web", host_labels=["licensed=yes"])
    label(None)
    answer = api.post(f"/v1/plans/{view['plan_id']}/execute")
    assert code(answer) == (409, "plan.outdated")
    assert answer.json()["details"]["hosts"] == ["h2"]


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
    """Whatever the generation says."""
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


def test_a_reserved_address_is_had_by_its_vm_however_it_is_named(api: TestClient) -> None:
    hold = {"kind": "reserved", "first": "10.7.0.50", "reserved_for": "db"}
    assert api.post("/v1/prefixes/1/holds", json=hold, headers=api.admin).status_code == 201  # type: ignore[attr-defined]
    networks = [{"address": "10.7.0.50"}]
    for named in ({"name": "db"}, {"names": ["db"]}, {"items": [{"name": "db"}]}):
        assert planned(api, networks=networks, **named)["executable"]
    answer = api.post("/v1/plans", json=BODY | {"networks": networks, "items": [{"name": "web"}]})
    assert code(answer) == (409, "address.reserved")


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
