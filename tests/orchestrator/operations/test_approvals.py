# SPDX-License-Identifier: Apache-2.0
"""Plans that are approved by somebody else than their maker, and executed as they are. On the whole API."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from people import SECRET, People, disturb, operations, vms
from plan_requests import BODY, code
from sqlalchemy import insert, select, update
from structlog.testing import capture_logs

from ppec_orchestrator.approvals import ApprovalPolicy
from ppec_orchestrator.store import tables
from ppec_orchestrator.store.clock import utc_now


def test_an_approved_plan_is_executed_by_its_maker_exactly_as_shown(world: Any, people: People) -> None:
    plan = people.plan(name="web", count=3)
    approved = people.approve(plan)
    assert (approved["state"], approved["approved_by"]) == ("approved", "checker")
    assert approved["plan"] == plan | {"expires_at": approved["expires_at"]}
    for client in (people.checker, people.third, people.clients["admin"]):
        assert code(people.execute(plan, client)) == (403, "auth.forbidden")
    answer = people.execute(plan)
    assert answer.status_code == 202, answer.text
    assert world.ended(answer.json()["operation_id"]).state == "succeeded"
    assert vms(people) == {place["vm"]: (place["host"], place["cells"]) for place in plan["placed"]}
    told = people.maker.get(answer.headers["location"]).json()
    assert {(one["plan_id"], one["approved_by"]) for one in (answer.json(), told)} == {(plan["plan_id"], "checker")}


def test_what_no_plan_was_made_for_has_none(world: Any, people: People) -> None:
    made = people.maker.post("/v1/vms", json=BODY | {"name": "web"}).json()
    executed = people.execute(people.plan(name="db")).json()
    assert (made["plan_id"], made["approved_by"]) == (None, None)
    assert executed["plan_id"] is not None
    assert executed["approved_by"] is None


def test_the_maker_can_not_approve_whatever_the_role(people: People) -> None:
    for name in ("maker", "admin"):
        plan = people.plan(people.clients[name], name=name)
        answer = people.clients[name].post(f"/v1/plans/{plan['plan_id']}/approve")
        assert code(answer) == (403, "approval.by_maker")
        assert people.state(plan) == ("waiting", None)


def test_approving_again_changes_nothing_and_one_approver_is_enough(world: Any, people: People) -> None:
    plan = people.plan(name="web")
    first = people.approve(plan)
    world.ahead = timedelta(minutes=5)
    assert people.approve(plan) == first
    answer = people.third.post(f"/v1/plans/{plan['plan_id']}/approve")
    assert code(answer) == (409, "approval.given")
    assert answer.json()["details"] == {"approved_by": "checker"}
    assert people.checker.get(f"/v1/plans/{plan['plan_id']}").json() == first


def test_an_approval_gives_a_whole_lifetime_and_no_more(world: Any, people: People) -> None:
    plans_made = [people.plan(name=name, host=host) for name, host in (("a", "h1"), ("b", "h2"))]
    world.ahead = timedelta(minutes=14)
    for plan in plans_made:
        approved = people.approve(plan)
        at, until = (datetime.fromisoformat(approved[name]) for name in ("approved_at", "expires_at"))
        assert until - at == timedelta(minutes=15)
    world.ahead = timedelta(minutes=28)
    assert people.execute(plans_made[0]).status_code == 202
    # Planned again it is the same plan, and its time goes on as it went.
    again = people.plan(name="b", host="h2")
    assert (again["plan_id"], again["expires_at"]) == (plans_made[1]["plan_id"], approved["expires_at"])
    world.ahead = timedelta(minutes=30)
    assert code(people.execute(plans_made[1])) == (404, "plan.not_found")


def test_audit_lines_say_who_approved_and_which_plan_was_executed(people: People) -> None:
    with capture_logs() as logs:
        plan = people.plan(name="web")
        people.maker.post(f"/v1/plans/{plan['plan_id']}/approve")
        people.approve(plan)
        answer = people.execute(plan).json()
    lines = [line for line in logs if line["event"] == "audit" and line["action"] != "create_plan"]
    told = [[line.get(name) for name in ("caller", "action", "subject", "outcome", "code")] for line in lines]
    assert told == [
        ["maker", "approve_plan", plan["plan_id"], "refused", "approval.by_maker"],
        ["checker", "approve_plan", plan["plan_id"], "done", None],
        ["maker", "execute_plan", "web", "done", None],
    ]
    executed = {name: lines[-1][name] for name in ("plan", "approved_by", "operation")}
    assert executed == {"plan": plan["plan_id"], "approved_by": "checker", "operation": answer["operation_id"]}


# --- when the fleet has moved on -------------------------------------------------------------------------------------


def _host(**values: Any) -> Callable[[Any], None]:
    def change(world: Any) -> None:
        with world.database.write() as conn:
            conn.execute(update(tables.host).where(tables.host.c.name == "h2").values(**values))

    return change


def _fewer_cores(world: Any) -> None:
    with world.database.write() as conn:
        conn.execute(update(tables.host_cell).where(tables.host_cell.c.host_id == 2).values(cores=1))
        conn.execute(update(tables.host).where(tables.host.c.name == "h2").values(disk_mib=400_000))


def _another_image(world: Any) -> None:
    with world.database.write() as conn:
        conn.execute(update(tables.image).values(sha256="c" * 64))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_host(generation=99), "h2 changed"),
        (_host(draining=True), "h2 is draining"),
        (_host(last_seen_at=utc_now() - timedelta(days=2)), "h2 is silent"),
        (_host(name="other"), "h2 is gone"),
        (_fewer_cores, "h2 has the room no more"),
        (_another_image, "image debian is another one"),
    ],
)
def test_what_could_not_be_executed_is_not_approved(
    world: Any, people: People, change: Callable[[Any], None], why: str
) -> None:
    plan = people.plan(name="web", host="h2")
    change(world)
    answers = [people.checker.post(f"/v1/plans/{plan['plan_id']}/approve"), people.execute(plan)]
    assert [code(answer) for answer in answers] == [(409, "plan.outdated")] * 2
    assert [why in answer.json()["detail"] for answer in answers] == [True, True]
    assert people.state(plan) == ("waiting", None)
    assert vms(people) == {}


def test_a_group_that_stands_elsewhere_by_now_is_not_approved(world: Any, people: People) -> None:
    with world.database.write() as conn:
        conn.execute(insert(tables.rack).values(id=2, name="rack2", cluster_id=1))
        conn.execute(update(tables.host).where(tables.host.c.name == "h2").values(rack_id=2))
    rule = {"name": "pair", "apart": False, "level": "rack"}
    first, second = (people.plan(name=f"on-{host}", host=host, groups=[rule]) for host in ("h1", "h2"))
    assert people.execute(first).status_code == 202
    answer = people.checker.post(f"/v1/plans/{second['plan_id']}/approve")
    assert code(answer) == (409, "plan.outdated")
    assert "group pair stands elsewhere by now" in answer.json()["detail"]


def test_a_name_that_is_taken_by_now_is_not_approved(world: Any, people: People) -> None:
    plan = people.plan(name="web", host="h1")
    assert people.third.post("/v1/vms", json=BODY | {"name": "web", "host": "h2"}).status_code == 202
    assert code(people.checker.post(f"/v1/plans/{plan['plan_id']}/approve")) == (409, "vm.exists")


def test_a_plan_is_outdated_once_the_fleet_has_moved_on_after_its_approval(world: Any, people: People) -> None:
    plan = people.plan(name="web", count=2)
    people.approve(plan)
    disturb(people, world, plan)
    assert code(people.execute(plan)) == (409, "plan.outdated")
    assert list(vms(people)) == ["between"]
    # An approval is of this plan; another one needs its own.
    again = people.plan(name="web", count=2)
    assert people.state(again) == ("waiting", None)


def test_approving_uses_nothing_up(world: Any, people: People) -> None:
    plan, other = people.plan(name="web"), people.plan(name="other")
    people.approve(plan)
    people.approve(other)
    with world.database.read() as conn:
        assert set(conn.execute(select(tables.host.c.generation)).scalars()) == {0}
    assert operations(world) == 0
    assert people.execute(plan).status_code == 202


# --- at once, and after a restart ------------------------------------------------------------------------------------


def test_two_executes_at_once_make_one_operation(world: Any, people: People) -> None:
    for number in range(3):
        plan = people.plan(name=f"web-{number}", flavor="small")
        people.approve(plan)
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _, one=plan: people.execute(one), range(4)))
        assert sorted(answer.status_code for answer in answers) == [202, 404, 404, 404]
        world.ended(next(one for one in answers if one.status_code == 202).json()["operation_id"])
        assert operations(world) == number + 1


def test_of_two_who_approve_at_once_one_has(people: People) -> None:
    for number in range(4):
        plan = people.plan(name=f"web-{number}")
        path = f"/v1/plans/{plan['plan_id']}/approve"
        with ThreadPoolExecutor(4) as pool:
            callers = [people.checker, people.third, people.checker, people.third]
            answers = list(pool.map(lambda client, at=path: client.post(at), callers))
        given = {answer.json()["approved_by"] for answer in answers if answer.status_code == 200}
        refused = [code(answer) for answer in answers if answer.status_code != 200]
        assert refused == [(409, "approval.given")] * 2
        assert given == {people.state(plan)[1]}


def test_an_approval_and_an_execution_at_once_both_end_well(world: Any, people: People) -> None:
    for number in range(4):
        plan = people.plan(name=f"web-{number}", flavor="small")
        with ThreadPoolExecutor(2) as pool:
            executing = pool.submit(people.execute, plan)
            approving = pool.submit(people.checker.post, f"/v1/plans/{plan['plan_id']}/approve")
        answer, approval = executing.result(), approving.result()
        assert answer.status_code == 202, answer.text
        assert (approval.status_code, approval.json().get("code")) in {(200, None), (404, "plan.not_found")}
        world.ended(answer.json()["operation_id"])


def test_approvals_outlive_the_process(world: Any, people: People, tmp_path: Path) -> None:
    """Nothing of them is in memory: this one's engine and database are gone when the next one starts."""
    plan = people.plan(name="web")
    approved = people.approve(plan)
    people.close()
    world.bury(world.replicas[0])
    world.approvals = ApprovalPolicy(vms_from=1)
    later = People(world, tmp_path / "later", "two")
    assert later.checker.get(f"/v1/plans/{plan['plan_id']}").json() == approved
    answer = later.execute(plan)
    assert (answer.status_code, answer.json()["approved_by"]) == (202, "checker")
    assert world.ended(answer.json()["operation_id"]).state == "succeeded"
    later.close()


# --- what needs an approval ------------------------------------------------------------------------------------------

FOUR = [
    {"name": "web", "count": 4},
    {"names": ["a", "b", "c", "d"]},
    {"items": [{"name": name} for name in "abcd"]},
    {"name": "web", "count": 6, "mode": "best-effort", "at_least": 1},
]


@pytest.mark.parametrize("asked", FOUR)
def test_a_large_request_needs_an_approved_plan_however_it_is_put(
    world: Any, strict: People, asked: dict[str, Any]
) -> None:
    refused = strict.maker.post("/v1/vms", json=BODY | asked)
    assert code(refused) == (403, "approval.required")
    assert "ppec explain" in refused.json()["hint"]
    plan = strict.plan(**asked)
    assert plan["needs_approval"]
    answer = strict.execute(plan)
    assert code(answer) == (403, "approval.required")
    assert f"ppec approve {plan['plan_id']}" in answer.json()["hint"]
    assert operations(world) == 0
    strict.approve(plan)
    assert strict.plan(**asked)["needs_approval"] is False
    # The approval is of the plan, not of the request.
    assert code(strict.maker.post("/v1/vms", json=BODY | asked)) == (403, "approval.required")
    answer = strict.execute(plan)
    assert answer.status_code == 202, answer.text
    assert world.ended(answer.json()["operation_id"]).state == "succeeded"
    assert vms(strict) == {place["vm"]: (place["host"], place["cells"]) for place in plan["placed"]}


def test_a_list_says_what_needs_an_approval_and_has_none(strict: People) -> None:
    def told() -> dict[str, bool]:
        items = strict.checker.get("/v1/plans").json()["items"]
        return {one["first_vm"].partition("-")[0]: one["needs_approval"] for one in items}

    large = strict.plan(name="large", count=7, mode="best-effort")
    small = strict.plan(name="small", count=3)
    assert told() == {"large": True, "small": False}
    for plan in (large, small):
        found = strict.checker.get(f"/v1/plans/{plan['plan_id']}").json()
        assert found["needs_approval"] == found["plan"]["needs_approval"] == plan["needs_approval"]
    assert strict.approve(large)["needs_approval"] is False
    assert told() == {"large": False, "small": False}


def test_what_finds_no_place_counts_as_well(strict: People) -> None:
    """A best effort that places three of four today may have been asked for to place four."""
    plan = strict.plan(name="web", count=4, mode="best-effort", groups=[{"name": "g"}])
    assert (len(plan["placed"]), plan["needs_approval"]) == (3, True)
    assert code(strict.execute(plan)) == (403, "approval.required")


def test_an_approved_plan_says_so_whoever_asks_and_however(world: Any, strict: People) -> None:
    asked = {"name": "web", "count": 4}
    plan = strict.plan(**asked)
    path = f"/v1/plans/{plan['plan_id']}"
    assert strict.checker.get(path).json()["plan"] == plan
    world.ahead = timedelta(minutes=5)
    approved = strict.approve(plan)
    assert approved["expires_at"] > plan["expires_at"]
    now = plan | {"expires_at": approved["expires_at"], "needs_approval": False}
    answers = [approved["plan"], strict.checker.get(path).json()["plan"], strict.plan(**asked)]
    assert answers == [now] * 3


@pytest.mark.parametrize(("made_under", "vms_from"), [(0, 4), (4, 0)])
def test_whether_a_kept_plan_needs_an_approval_is_as_of_the_setting_now(
    world: Any, tmp_path: Path, made_under: int, vms_from: int
) -> None:
    world.approvals = ApprovalPolicy(vms_from=made_under)
    people = People(world, tmp_path / "state")
    plan = people.plan(name="web", count=4)
    people.close()
    world.bury(world.replicas[0])
    world.approvals = ApprovalPolicy(vms_from=vms_from)
    later = People(world, tmp_path / "later", "two")
    shown = later.checker.get(f"/v1/plans/{plan['plan_id']}").json()["plan"]
    assert (plan["needs_approval"], shown["needs_approval"]) == (made_under > 0, vms_from > 0)
    assert (later.execute(plan).status_code == 403) == shown["needs_approval"]
    later.close()


def test_a_small_request_needs_none(world: Any, strict: People) -> None:
    assert strict.maker.post("/v1/vms", json=BODY | {"name": "web", "count": 3, "flavor": "small"}).status_code == 202
    plan = strict.plan(name="db", count=2)
    assert not plan["needs_approval"]
    assert strict.execute(plan).status_code == 202


def test_nothing_needs_one_by_default(people: People) -> None:
    assert not people.plan(name="web", count=4)["needs_approval"]
    assert people.maker.post("/v1/vms", json=BODY | {"name": "web", "count": 4}).status_code == 202


def test_another_plan_of_the_same_request_is_not_approved(world: Any, strict: People) -> None:
    plan = strict.plan(name="web", count=4)
    strict.approve(plan)
    for changed in ({"user_data": SECRET}, {"policy": "pack"}, {"labels": {"a": "b"}}):
        other = strict.plan(name="web", count=4, **changed)
        assert other["plan_id"] != plan["plan_id"]
        assert code(strict.execute(other)) == (403, "approval.required")
    assert code(strict.execute(strict.plan(strict.third, name="web", count=4), strict.third)) == (
        403, "approval.required",
    )  # fmt: skip
    assert operations(world) == 0


def test_what_was_accepted_before_there_was_the_rule_is_answered_as_it_was(
    world: Any, people: People, tmp_path: Path
) -> None:
    key, body = {"Idempotency-Key": "once"}, BODY | {"name": "web", "count": 4, "flavor": "small"}
    created = people.maker.post("/v1/vms", json=body, headers=key).json()["operation_id"]
    world.ended(created)
    plan = people.plan(name="db", count=4, flavor="small")
    executed = people.execute(plan, key="two").json()["operation_id"]
    world.ended(executed)
    world.approvals = ApprovalPolicy(vms_from=4)
    later = People(world, tmp_path / "later", "two")
    again = later.maker.post("/v1/vms", json=body, headers=key)
    assert (again.status_code, again.json()["operation_id"]) == (202, created)
    again = later.execute(plan, key="two")
    assert (again.status_code, again.json()["operation_id"]) == (202, executed)
    other = later.maker.post("/v1/vms", json=body | {"name": "other"}, headers=key)
    assert code(other) == (409, "request.idempotency_mismatch")
    later.close()
