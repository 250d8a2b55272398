# SPDX-License-Identifier: Apache-2.0
"""What is told of VMs that find no place, whoever asks and however, and what would help them. On the whole API."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID

import pytest
from plan_requests import BODY, code, created, planned
from sqlalchemy import update
from starlette.testclient import TestClient
from storage_given import give_storage

from ppec_contract.api_catalogue import ClusterUpdate
from ppec_contract.api_placement import VmSize
from ppec_contract.api_vms import VmsCreate
from ppec_contract.vm import NumaPolicy
from ppec_orchestrator.dispatch.simulated import Fault
from ppec_orchestrator.operations.advising import ADVISING, IN_REQUESTS
from ppec_orchestrator.placement.change_views import OF_SIZES
from ppec_orchestrator.placement.rules import RULES
from ppec_orchestrator.store import tables


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


def test_what_a_plan_refused_is_refused_by_its_operation(api: TestClient) -> None:
    asked = {"name": "web", "count": 8, "mode": "best-effort"}
    view = planned(api, **asked)
    assert (len(view["placed"]), len(view["refused"])) == (6, 2)
    items = api.post(f"/v1/plans/{view['plan_id']}/execute").json()["items"]
    states = Counter((item["state"], (item["problem"] or {}).get("code")) for item in items)
    assert states == {("pending", None): 6, ("refused", "placement.no_capacity"): 2}


def test_what_an_executed_plan_refuses_is_told_what_was_shown(world: Any, api: TestClient) -> None:
    """In the answer and for good, without another trial: it is what whoever approved the plan has seen."""
    small = {"vcpus": 2, "memory_mib": 1024, "disk_mib": 8192}
    kinds = [{"name": f"wide-{vcpus}", "size": small | {"vcpus": vcpus}} for vcpus in (20, 200, 202)]
    view = planned(api, flavor=None, items=[{"name": "made", "size": small}, *kinds], mode="best-effort")
    shown = {one["vm"]: (one["reasons"], one["changes"]) for one in view["refused"]}
    assert len(shown) == 3
    assert all(reasons and changes for reasons, changes in shown.values())
    before = ADVISING.tried
    answer = api.post(f"/v1/plans/{view['plan_id']}/execute").json()
    kept = api.get(f"/v1/operations/{answer['operation_id']}").json()
    for told in (answer, kept):
        problems = {item["name"]: item["problem"] for item in told["items"] if item["state"] == "refused"}
        found = {name: (one["details"]["reasons"], one["details"].get("changes")) for name, one in problems.items()}
        assert found == shown
        for name, (_, changes) in shown.items():
            assert f"Cheapest change: {changes[0]['sentence']}." in problems[name]["hint"]
    assert ADVISING.tried == before
    assert world.ended(answer["operation_id"]).items[0].state == "succeeded"


def test_a_plan_of_which_nothing_was_kept_to_show_is_executed_without_advice(world: Any, api: TestClient) -> None:
    """An older replica's."""
    view = planned(api, name="web", count=8, mode="best-effort")
    with world.database.write() as conn:
        conn.execute(update(tables.plan).values(shown=None))
    items = api.post(f"/v1/plans/{view['plan_id']}/execute").json()["items"]
    refused = [item["problem"]["details"] for item in items if item["state"] == "refused"]
    assert [(bool(one["reasons"]), "changes" in one) for one in refused] == [(True, False)] * 2


def test_a_vm_that_its_host_failed_and_no_other_can_take_is_told_what_would_help(world: Any, api: TestClient) -> None:
    fault = Fault.of("hypervisor.failed")
    world.fleet.faults = lambda action, host, vm: fault if (action, host) == ("CreateVms", "h1") else None
    answer = api.post("/v1/vms", json=BODY | {"name": "web", "count": 6, "mode": "best-effort"})
    ended = world.ended(answer.json()["operation_id"])
    failed = [item.problem for item in ended.items if item.state == "failed"]
    assert len(failed) == 2
    for problem in failed:
        assert problem.code == "hypervisor.failed"
        assert problem.details["elsewhere"] == {"failed-before": 1, "cores": 2}
        changes = problem.details["changes"]
        assert changes[0]["details"] == {"rules": ["failed"]}
        assert f"Cheapest change: {changes[0]['sentence']}." in problem.hint
    world.assert_consistent()


def test_where_no_advice_is_to_be_had_what_was_made_stays(
    world: Any, api: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> object:
        raise ZeroDivisionError

    monkeypatch.setattr("ppec_orchestrator.operations.kinds.create.changes_by_vm", fails)
    fault = Fault.of("hypervisor.failed")
    world.fleet.faults = lambda action, host, vm: fault if (action, host) == ("CreateVms", "h1") else None
    answer = api.post("/v1/vms", json=BODY | {"name": "web", "count": 6, "mode": "best-effort"})
    ended = world.ended(answer.json()["operation_id"])
    assert sorted(item.state for item in ended.items) == ["failed"] * 2 + ["succeeded"] * 4
    assert not any("changes" in item.problem.details for item in ended.items if item.problem)
    world.assert_consistent()


def test_a_batch_undone_for_a_vm_that_no_other_host_can_take_says_what_turned_it_away(
    world: Any, api: TestClient
) -> None:
    fault = Fault.of("hypervisor.failed")
    world.fleet.faults = lambda action, host, vm: fault if (action, host) == ("CreateVms", "h1") else None
    ended = world.ended(api.post("/v1/vms", json=BODY | {"name": "web", "count": 6}).json()["operation_id"])
    assert (ended.state, ended.problem.code) == ("failed", "hypervisor.failed")
    assert ended.problem.details["elsewhere"] == {"failed-before": 1, "cores": 2}
    assert "no other host can take it" in ended.problem.detail
    world.assert_empty()


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


def test_requests_and_clusters_have_the_words_that_advice_calls_their_rules_by() -> None:
    words = {IN_REQUESTS.get(rule, OF_SIZES.get(rule, rule)) for rule in RULES} - {"failed"}
    fields = (
        {f"numa.{name}" for name in NumaPolicy.model_fields} | set(VmsCreate.model_fields) | set(VmSize.model_fields)
    )
    fields |= {f"cluster.{name}" for name in ClusterUpdate.model_fields}
    assert words <= fields
    assert set(IN_REQUESTS.values()) <= fields


def test_whom_to_refuse_is_left_to_the_planner(api: TestClient) -> None:
    """The first alone would leave no memory for the others, which have more vCPUs; a best effort keeps to the order."""
    lean = [{"name": f"lean-{number}", "size": {"vcpus": 2, "memory_mib": 2048, "disk_mib": 8192}} for number in (1, 2)]
    items = [{"name": "fat", "size": {"vcpus": 2, "memory_mib": 15360, "disk_mib": 8192}}, *lean]
    asked = {"image": "debian", "items": items, "host": "h1"}
    places = {
        mode: [one["vm"] for one in api.post("/v1/plans", json=asked | {"mode": mode}).json()["placed"]]
        for mode in ("best-effort", "most-vcpus")
    }
    assert places == {"best-effort": ["fat"], "most-vcpus": ["lean-1", "lean-2"]}
    too_few = api.post("/v1/vms", json=asked | {"mode": "most-vcpus", "at_least": 3})
    assert (too_few.status_code, too_few.json()["code"]) == (409, "placement.no_capacity")
    answer = api.post("/v1/vms", json=asked | {"mode": "most-vcpus", "at_least": 2})
    assert answer.status_code == 202, answer.text
    states = {item["name"]: item["state"] for item in answer.json()["items"]}
    assert states == {"fat": "refused", "lean-1": "pending", "lean-2": "pending"}
