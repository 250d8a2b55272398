# SPDX-License-Identifier: Apache-2.0
"""`ppec plans` and `ppec approve`: how a plan is shown to who may approve it, and when it is approved."""

from __future__ import annotations

import io
import sys
from datetime import UTC, datetime
from typing import Any

import pytest

from ppec_contract.api_placement import GroupRule, PlacedView, PlanView
from ppec_contract.api_plans import PlanDetails, PlanState, RequestShown

HASH = "f0" * 32
AT = datetime(2026, 11, 20, 10, 30, tzinfo=UTC)


@pytest.fixture
def kept(orchestrator: Any) -> PlanDetails:
    placed = tuple(PlacedView(vm=f"web-{n}", host=f"h{n}", cells=(0,), candidates=3, score=1.5) for n in (1, 2))
    shown = PlanView(
        plan_id=HASH, created_by="alice", created_at=AT, expires_at=AT, executable=True, hosts=3, placed=placed,
        refused=(), needs_approval=True,
    )  # fmt: skip
    request = RequestShown(
        image="tiny", flavor="small", name="web", count=2, groups=(GroupRule(name="g"),), user_data_bytes=31,
        user_data_sha256="a" * 64,
    )  # fmt: skip
    made = PlanDetails(
        plan_id=HASH, created_by="alice", created_at=AT, expires_at=AT, state=PlanState.WAITING, image="tiny",
        needs_approval=True, first_vm="web-1", vms=2, placed=2, request=request, plan=shown,
    )  # fmt: skip
    orchestrator.kept = made
    return made


def asked(orchestrator: Any) -> list[tuple[str, str]]:
    return [(request.method, request.path) for request in orchestrator.requests]


def lines_of(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line.strip()]


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Any:
    def answer(text: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))

    return answer


def test_plans_are_listed_by_maker_and_state(orchestrator: Any, ppec: Any, kept: PlanDetails) -> None:
    ran = ppec("plans", "list", "--created-by", "alice", "--state", "waiting")
    assert ran.code == 0, ran.err
    assert orchestrator.requests[0].query | {"limit": ""} == {"created_by": "alice", "state": "waiting", "limit": ""}
    row = [HASH, "waiting", "alice", "2026-11-20", "10:30:00", "UTC", "2/2", "web-1", "tiny", "needed"]
    assert row in lines_of(ran.out)
    (one,) = ppec("plans", "list", "--output", "json").json
    assert (one["plan_id"], one["approved_by"]) == (HASH, None)


def test_a_plan_is_shown_with_what_was_asked_for(orchestrator: Any, ppec: Any, kept: PlanDetails) -> None:
    ran = ppec("plans", "show", HASH)
    assert ran.code == 0, ran.err
    shown = lines_of(ran.out)
    for line in (
        ["made", "by", "alice"],
        ["state", "waiting"],
        ["count", "2"],
        ["groups", "name", "g"],
        ["user", "data", "bytes", "31"],
        ["user", "data", "sha256", "a" * 64],
        ["web-2", "h2", "0", "3", "1.5", "lowest", "score"],
    ):
        assert line in shown
    assert ["approval", "needed,"] in [line[:2] for line in shown]
    assert f"ppec approve {HASH}, by others than alice" in " ".join(ran.out.split())
    assert PlanDetails.model_validate_json(ppec("plans", "show", HASH, "-o", "json").out) == kept


def test_a_plan_is_shown_and_approved_after_a_yes(orchestrator: Any, ppec: Any, kept: PlanDetails, says: Any) -> None:
    says("y\n")
    ran = ppec("approve", HASH)
    assert ran.code == 0, ran.err
    assert asked(orchestrator) == [("GET", f"/v1/plans/{HASH}"), ("POST", f"/v1/plans/{HASH}/approve")]
    assert ["count", "2"] in lines_of(ran.out)
    assert "Approve this plan?" in ran.err
    assert f"alice can do: ppec execute {HASH}" in ran.err
    assert orchestrator.kept.state is PlanState.APPROVED


def test_whether_there_is_an_approval_is_shown_and_whose(orchestrator: Any, ppec: Any, kept: PlanDetails) -> None:
    orchestrator.kept = kept.model_copy(update={"needs_approval": False})
    assert ["approval", "not", "needed"] in lines_of(ppec("plans", "show", HASH).out)
    assert lines_of(ppec("plans", "list").out)[-1][-3:] == ["tiny", "not", "needed"]
    ppec("approve", HASH, "--yes")
    given = ["given", "by", "bob"]
    assert lines_of(ppec("plans", "list").out)[-1][-3:] == given
    at = ["2026-11-20", "12:00:00", "UTC"]
    assert ["approval", "given", "by", "bob,", *at] in lines_of(ppec("plans", "show", HASH).out)


def test_a_shortened_hash_approves_the_plan_that_it_stood_for(
    orchestrator: Any, ppec: Any, says: Any, kept: PlanDetails
) -> None:
    says("y\n")
    ran = ppec("approve", HASH[:8])
    assert ran.code == 0, ran.err
    assert asked(orchestrator) == [("GET", f"/v1/plans/{HASH[:8]}"), ("POST", f"/v1/plans/{HASH}/approve")]
    shown = ppec("plans", "show", HASH[:8])
    assert HASH in shown.out


@pytest.mark.parametrize("options", [("--yes",), ("--yes", "--output", "json")])
def test_who_says_yes_beforehand_says_it_to_a_whole_hash(
    orchestrator: Any, ppec: Any, kept: PlanDetails, options: tuple[str, ...]
) -> None:
    ran = ppec("approve", HASH[:8], *options)
    assert ran.code == 2
    assert "whole hash" in ran.err
    assert asked(orchestrator) == []


@pytest.mark.parametrize("text", ["n\n", "\n", ""])
def test_without_a_yes_nothing_is_approved(
    orchestrator: Any, ppec: Any, kept: PlanDetails, says: Any, text: str
) -> None:
    says(text)
    assert ppec("approve", HASH).code == 1
    assert asked(orchestrator) == [("GET", f"/v1/plans/{HASH}")]
    assert orchestrator.kept.state is PlanState.WAITING


def test_with_yes_nothing_is_asked(orchestrator: Any, ppec: Any, kept: PlanDetails) -> None:
    ran = ppec("approve", HASH, "--yes")
    assert ran.code == 0, ran.err
    assert "Approve this plan?" not in ran.err
    assert ["web-1", "h1", "0", "3", "1.5", "lowest", "score"] in lines_of(ran.out)
    assert orchestrator.kept.approved_by == "bob"


def test_a_program_says_yes_and_gets_the_approved_plan(orchestrator: Any, ppec: Any, kept: PlanDetails) -> None:
    refused = ppec("approve", HASH, "--output", "json")
    assert (refused.code, refused.out) == (2, "")
    assert "--yes" in refused.err
    assert asked(orchestrator) == []
    ran = ppec("approve", HASH, "--yes", "--output", "json")
    assert PlanDetails.model_validate_json(ran.out) == orchestrator.kept
    assert asked(orchestrator) == [("POST", f"/v1/plans/{HASH}/approve")]


def test_what_is_not_there_is_not_approved(orchestrator: Any, ppec: Any, kept: PlanDetails) -> None:
    ran = ppec("approve", "0" * 64, "--yes")
    assert ran.code == 4
    assert "plan.not_found" in ran.err


def test_an_operation_says_which_plan_it_carries_out(orchestrator: Any, ppec: Any, make: Any) -> None:
    orchestrator.current = make.operation("running", plan_id=HASH, approved_by="bob")
    shown = lines_of(ppec("operation", "show", "op-1").out)
    assert ["plan", "id", HASH] in shown
    assert ["approved", "by", "bob"] in shown
    orchestrator.current = make.operation("running")
    assert "approved" not in ppec("operation", "show", "op-1").out
