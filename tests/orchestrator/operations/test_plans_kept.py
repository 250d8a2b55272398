# SPDX-License-Identifier: Apache-2.0
"""Plans that are looked at again, and listed; and how many are kept. On the whole API."""

from __future__ import annotations

import base64
import hashlib
import json
from datetime import timedelta
from typing import Any

import pytest
from people import SECRET, People, operations
from plan_requests import BODY, code
from sqlalchemy import update
from structlog.testing import capture_logs

from ppec_orchestrator.store import plans, tables
from ppec_orchestrator.store.clock import utc_now
from ppec_orchestrator.store.paging import mark_of


def test_a_plan_is_shown_again_as_it_was(people: People) -> None:
    plan = people.plan(name="web", count=5, mode="best-effort", groups=[{"name": "g"}], labels={"tier": "web"})
    for client in (people.maker, people.checker):
        found = client.get(f"/v1/plans/{plan['plan_id']}").json()
        assert found["plan"] == plan
    request = {name: found["request"][name] for name in ("image", "flavor", "name", "count", "mode", "labels")}
    assert request == BODY | {"name": "web", "count": 5, "mode": "best-effort", "labels": {"tier": "web"}}
    assert (found["state"], found["approved_by"], found["created_by"]) == ("waiting", None, "maker")
    assert (found["vms"], found["placed"], found["first_vm"]) == (5, len(plan["placed"]), plan["placed"][0]["vm"])
    assert 0 < found["placed"] < 5
    assert found["expires_at"] == plan["expires_at"]


def test_user_data_is_told_by_its_length_and_sum_and_is_part_of_the_hash(world: Any, people: People) -> None:
    with capture_logs() as logs:
        plan = people.plan(name="web", user_data=SECRET)
        path = f"/v1/plans/{plan['plan_id']}"
        answers = [
            people.checker.get(path), people.checker.get("/v1/plans"), people.maker.post(f"{path}/approve"),
            people.checker.post(f"{path}/approve"), people.third.post(f"{path}/execute"),
            people.maker.post(f"{path}/execute"),
        ]  # fmt: skip
        answers.append(people.maker.get(answers[-1].headers["location"]))
        world.ended(answers[-1].json()["operation_id"])
    assert [answer.status_code for answer in answers] == [200, 200, 403, 200, 403, 202, 200]
    request = answers[0].json()["request"]
    assert (request["user_data"], request["user_data_bytes"]) == ("", len(SECRET))
    assert request["user_data_sha256"] == hashlib.sha256(SECRET.encode()).hexdigest()
    assert "hunter2" not in "".join(answer.text for answer in answers)
    assert "hunter2" not in str(logs)


def test_the_hash_is_of_the_user_data_as_well(people: People) -> None:
    ids = {people.plan(name="web", user_data=text)["plan_id"] for text in ("", SECRET, SECRET + " ")}
    assert len(ids) == 3


def test_plans_are_listed_the_newest_first_in_pages_and_by_maker_and_state(people: People) -> None:
    mine = [people.plan(name=f"a-{number}") for number in range(3)]
    others = people.plan(people.third, name="b")
    people.approve(mine[1])
    ids = [plan["plan_id"] for plan in (others, *reversed(mine))]
    assert people.listed() == ids
    assert people.listed(created_by="third") == [others["plan_id"]]
    assert people.listed(state="approved") == [mine[1]["plan_id"]]
    assert people.listed(state="waiting", created_by="maker") == [mine[2]["plan_id"], mine[0]["plan_id"]]
    first = people.checker.get("/v1/plans?limit=3").json()
    # What comes or goes meanwhile makes nothing else be skipped.
    assert people.execute(mine[0]).status_code == 202
    people.plan(name="c")
    rest = people.checker.get("/v1/plans", params={"limit": 3, "cursor": first["next_cursor"]}).json()
    assert [one["plan_id"] for one in first["items"]] == ids[:3]
    assert rest == {"items": [], "next_cursor": None}
    wrong = people.checker.get("/v1/plans", params={"state": "approved", "cursor": first["next_cursor"]})
    assert code(wrong) == (422, "request.invalid")


@pytest.mark.parametrize("path", ["/v1/plans", "/v1/operations"])
@pytest.mark.parametrize(
    "made_at", ["0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "2026-11-20T12:00:00", "yesterday", ""]
)
def test_a_made_up_time_in_a_cursor_is_refused(people: People, path: str, made_at: str) -> None:
    """With the list's mark, which anybody can work out. Some times can be written and have no UTC."""
    content = json.dumps([mark_of(path, ()), f"{made_at}/x"])
    cursor = base64.urlsafe_b64encode(content.encode()).decode().rstrip("=")
    refused = people.checker.get(path, params={"cursor": cursor})
    assert code(refused) == (422, "request.invalid")
    assert "not one that this list answered" in refused.json()["detail"]


def test_a_line_of_the_list_says_what_the_plan_is_of(people: People) -> None:
    plan = people.plan(name="web", count=2)
    people.approve(plan)
    (line,) = people.checker.get("/v1/plans").json()["items"]
    details = people.checker.get(f"/v1/plans/{plan['plan_id']}").json()
    assert line == {name: value for name, value in details.items() if name not in ("plan", "request")}
    assert (line["image"], line["vms"], line["placed"], line["approved_by"]) == ("debian", 2, 2, "checker")


def test_a_list_reads_none_of_the_documents(world: Any, people: People) -> None:
    """PostgreSQL would parse whole plans for the name of an image."""
    people.plan(name="web", count=2)
    listed = people.checker.get("/v1/plans").json()
    with world.database.write() as conn:
        conn.execute(update(tables.plan).values(asked={}, input={}, places={}, shown={}))
    assert people.checker.get("/v1/plans").json() == listed
    assert [(line["image"], line["first_vm"]) for line in listed["items"]] == [("debian", "web-1")]


def test_what_can_not_be_executed_is_not_listed(world: Any, people: People) -> None:
    old, used = people.plan(name="old"), people.plan(name="used")
    assert people.execute(used).status_code == 202
    world.ahead = timedelta(minutes=16)
    new = people.plan(name="new", host="h3")
    assert people.listed() == [new["plan_id"]]
    for gone in (old, used):
        for answer in (
            people.checker.get(f"/v1/plans/{gone['plan_id']}"),
            people.checker.post(f"/v1/plans/{gone['plan_id']}/approve"),
        ):
            assert code(answer) == (404, "plan.not_found")


def test_an_older_replicas_plan_can_be_executed_and_not_looked_at(world: Any, people: People) -> None:
    plan = people.plan(name="web")
    with world.database.write() as conn:
        conn.execute(update(tables.plan).values(shown=None, image=None, first_vm=None, vms=None, placed=None))
    path = f"/v1/plans/{plan['plan_id']}"
    assert people.listed() == []
    assert code(people.checker.get(path)) == (404, "plan.not_found")
    assert code(people.checker.post(f"{path}/approve")) == (404, "plan.not_found")
    assert people.execute(plan).status_code == 202


def test_a_viewer_sees_no_plans(people: People) -> None:
    plan = people.plan(name="web")
    viewer, path = people.clients["viewer"], f"/v1/plans/{plan['plan_id']}"
    for answer in (viewer.get("/v1/plans"), viewer.get(path), viewer.post(f"{path}/approve")):
        assert code(answer) == (403, "auth.forbidden")
    assert people.state(plan) == ("waiting", None)


def test_who_plans_a_lot_pushes_out_their_own_plans_and_none_that_is_approved(
    people: People, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "MOST_PLANS", 3)
    other = people.plan(people.third, name="other")
    approved = people.plan(name="approved")
    people.approve(approved)
    fresh = [people.plan(name=f"fresh-{number}") for number in range(5)]
    assert people.listed(created_by="third") == [other["plan_id"]]
    assert people.listed(state="approved") == [approved["plan_id"]]
    assert people.listed(state="waiting", created_by="maker") == [plan["plan_id"] for plan in reversed(fresh[2:])]
    # One that is made again takes nobody's place.
    people.plan(name="fresh-4")
    assert len(people.listed(state="waiting", created_by="maker")) == 3
    assert people.execute(approved).status_code == 202


# --- by what its hash begins with ------------------------------------------------------------------------------------


def test_a_plan_is_found_and_executed_by_what_its_hash_begins_with(world: Any, people: People) -> None:
    plan = people.plan(name="web")
    short = {"plan_id": plan["plan_id"][:8]}
    assert people.checker.get(f"/v1/plans/{short['plan_id']}").json()["plan"] == plan
    assert code(people.execute(short, people.third)) == (403, "auth.forbidden")
    with capture_logs() as logs:
        answer = people.execute(short, key="once")
    assert answer.status_code == 202, answer.text
    assert answer.json()["plan_id"] == plan["plan_id"]
    assert [line["plan"] for line in logs if line.get("action") == "execute_plan"] == [plan["plan_id"]]
    assert people.execute(short, key="once").json()["operation_id"] == answer.json()["operation_id"]
    assert code(people.execute(short)) == (404, "plan.not_found")
    world.ended(answer.json()["operation_id"])
    assert operations(world) == 1


def test_a_plan_is_approved_by_its_whole_hash_alone(people: People) -> None:
    """Another may begin alike by the time that somebody says yes."""
    plan = people.plan(name="web")
    answer = people.checker.post(f"/v1/plans/{plan['plan_id'][:63]}/approve")
    assert code(answer) == (422, "request.invalid")
    assert "wanted 64 digits" in answer.json()["detail"]
    assert people.state(plan) == ("waiting", None)


def test_what_several_hashes_begin_with_is_refused(world: Any, people: People) -> None:
    alike = ["abcdef01" + digit * 56 for digit in "0123456"]
    for number, plan_id in enumerate(alike):
        made = people.plan(name=f"web-{number}")["plan_id"]
        with world.database.write() as conn:
            conn.execute(update(tables.plan).where(tables.plan.c.id == made).values(id=plan_id))
    for answer in (people.checker.get("/v1/plans/abcdef01"), people.execute({"plan_id": "abcdef01"})):
        assert code(answer) == (422, "plan.ambiguous")
        assert answer.json()["details"]["plans"] == alike[:5]
        assert "and others" in answer.json()["detail"]
    assert operations(world) == 0
    assert people.checker.get("/v1/plans/abcdef013").json()["plan_id"] == alike[3]
    # Those that have expired are no longer in the way.
    with world.database.write() as conn:
        conn.execute(update(tables.plan).where(tables.plan.c.id != alike[6]).values(expires_at=utc_now()))
    assert people.checker.get("/v1/plans/abcdef01").json()["plan_id"] == alike[6]


@pytest.mark.parametrize(
    ("begins", "refused"),
    [
        ("00000000", (404, "plan.not_found")),
        ("0000000", (422, "request.invalid")),
        ("ABCDEF01", (422, "request.invalid")),
        ("0000000_", (422, "request.invalid")),
        ("0" * 65, (422, "request.invalid")),
    ],
)
def test_no_plan_begins_so(people: People, begins: str, refused: tuple[int, str]) -> None:
    people.plan(name="web")
    for answer in (people.checker.get(f"/v1/plans/{begins}"), people.execute({"plan_id": begins})):
        assert code(answer) == refused
        assert "begins with 00000000" in answer.text or "wanted 8 to 64 digits of 0-9 and a-f" in answer.text
