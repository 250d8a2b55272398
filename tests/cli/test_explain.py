# SPDX-License-Identifier: Apache-2.0
"""`ppec explain` and `ppec execute`: what they ask for, and how a plan is shown."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from ppec_contract.api_placement import (
    ChangeView,
    ExposedView,
    LossView,
    PlacedView,
    PlanView,
    RefusedView,
    RestartView,
)

HASH = "f0" * 32
AT = datetime(2026, 11, 20, 10, 30, tzinfo=UTC)
CHANGE = ChangeView(kind="give-up", sentence="look in every rack", details={"rules": ["rack"]})


def plan(**changes: Any) -> PlanView:
    return PlanView(
        **{
            "plan_id": HASH, "created_by": "alice", "created_at": AT, "expires_at": AT, "executable": True, "hosts": 3,
            "placed": (PlacedView(vm="web-1", host="h2", cells=(0, 1), candidates=3, score=1.5),), "refused": (),
        }
        | changes
    )  # fmt: skip


def asked(orchestrator: Any) -> dict[str, Any]:
    (request,) = orchestrator.requests
    assert (request.method, request.path) == ("POST", "/v1/plans")
    found: dict[str, Any] = request.json
    return found


def test_a_plan_is_shown_with_what_it_won_over_and_how_to_execute_it(orchestrator: Any, ppec: Any) -> None:
    orchestrator.plan = plan()
    ran = ppec("explain", "--flavor", "small", "--image", "tiny", "--name", "web", "--count", "1")
    assert ran.code == 0, ran.err
    (row,) = [line.split() for line in ran.out.splitlines() if line.startswith("web-1")]
    assert row == ["web-1", "h2", "0,1", "3", "1.5", "lowest", "score"]
    assert f"ppec execute {HASH}" in ran.err


def test_a_plan_that_needs_an_approval_says_who_can_do_what(orchestrator: Any, ppec: Any) -> None:
    orchestrator.plan = plan(needs_approval=True)
    ran = ppec("explain", "--flavor", "small", "--image", "tiny")
    assert [line for line in ran.err.splitlines() if HASH in line] == [
        f"first somebody else has to approve it: ppec approve {HASH}",
        f"until 10:30:00 UTC, if these hosts stand still: ppec execute {HASH}",
    ]


def test_why_not_comes_with_what_would_help(orchestrator: Any, ppec: Any) -> None:
    refused = RefusedView(
        vm="web", reasons={"cores": 3}, sentence="3 hosts: 3 without enough free cores", changes=(CHANGE,)
    )
    exposed = (ExposedView(domain="h1", vm="db", without_place=2),)
    orchestrator.plan = plan(placed=(), refused=(refused,), exposed=exposed, executable=False)
    ran = ppec("explain", "--flavor", "small", "--image", "tiny")
    assert ran.code == 0, ran.err
    assert "web finds no place: 3 hosts: 3 without enough free cores" in ran.err
    assert "would fit: look in every rack" in ran.err
    assert "h1 is exposed: its loss leaves 2 VMs without a place, db first" in ran.err
    assert "ppec execute" not in ran.err


def test_the_loss_that_leaves_one_vm_is_told_of_one(orchestrator: Any, ppec: Any) -> None:
    orchestrator.plan = plan(exposed=(ExposedView(domain="h1", vm="db", without_place=1),))
    ran = ppec("explain", "--flavor", "small", "--image", "tiny")
    assert "h1 is exposed: its loss leaves 1 VM without a place, db first" in ran.err


@pytest.mark.parametrize(
    ("names", "options", "said"),
    [
        (["b"], (), "the batch needs all of its 2, and 1 finds no place."),
        (["b", "c"], (), "the batch needs all of its 3, and 2 find no place."),
        (["b", "c"], ("--at-least", "2"), "the batch needs at least 2 of its 3, and 2 find no place."),
    ],
)
def test_a_batch_that_would_not_be_made_says_so(
    orchestrator: Any, ppec: Any, names: list[str], options: tuple[str, ...], said: str
) -> None:
    refused = tuple(RefusedView(vm=name, reasons={"cores": 3}, sentence="3 hosts") for name in names)
    orchestrator.plan = plan(refused=refused, executable=False)
    command = ("explain", "--flavor", "small", "--image", "tiny", "--count", "3", *options)
    assert f"None of these VMs would be made: {said}" in ppec(*command).err
    orchestrator.plan = plan(refused=refused)
    assert "None of these" not in ppec(*command).err
    orchestrator.plan = plan(placed=(), refused=refused, executable=False)
    assert "None of these" not in ppec(*command).err


@pytest.mark.parametrize("command", ["vm create", "explain"])
@pytest.mark.parametrize(
    ("options", "numa"),
    [
        (
            ("--smt", "isolate", "--huge-pages", "2M", "--multi-cell"),
            {"smt": "isolate", "huge_page_kib": 2048, "multi_cell": True},
        ),
        (("--cpus", "shared", "--huge-pages", "1G"), {"cpus": "shared", "huge_page_kib": 1048576}),
    ],
)
def test_a_size_says_how_it_sits_on_its_host(
    orchestrator: Any, ppec: Any, command: str, options: tuple[str, ...], numa: dict[str, Any]
) -> None:
    orchestrator.plan = plan()
    size = {"vcpus": 4, "memory_mib": 2048, "disk_mib": 9}
    given = ("--vcpus", "4", "--memory-mib", "2048", "--disk-mib", "9")
    ran = ppec(*command.split(), "--image", "tiny", *given, *options)
    assert ran.code == 0, ran.err
    assert orchestrator.requests[0].json["size"] == size | {"numa": numa}


@pytest.mark.parametrize("command", ["vm create", "explain"])
@pytest.mark.parametrize(
    ("size", "said"),
    [
        (("--nvme-drives", "1"), "--nvme-drives and --flavor small: the first is of an explicit size"),
        (("--vcpus", "2", "--disk-mib", "9"), "--vcpus, --disk-mib and --flavor small: the first are of an explicit"),
        (("--nvme-drives", "0"), "--nvme-drives and --flavor small: the first is of an explicit size"),
        (("--cpus", "shared"), "--cpus and --flavor small: the first is of an explicit size"),
        (("--multi-cell", "--smt", "isolate", "--huge-pages", "1G"), "--smt, --huge-pages, --multi-cell and --flavor"),
    ],
)
def test_options_of_a_size_do_not_go_with_a_flavor(
    orchestrator: Any, ppec: Any, command: str, size: tuple[str, ...], said: str
) -> None:
    ran = ppec(*command.split(), "--image", "tiny", "--flavor", "small", *size)
    assert ran.code != 0
    assert said in " ".join(ran.err.split())
    assert "Field required" not in ran.err
    assert orchestrator.requests == []


def test_vms_refused_alike_are_told_in_one_line(orchestrator: Any, ppec: Any) -> None:
    def refused(vm: str, cores: int) -> RefusedView:
        sentence = f"{cores} hosts: {cores} without enough free cores"
        return RefusedView(vm=vm, reasons={"cores": cores}, sentence=sentence, changes=(CHANGE,))

    several = (refused("web-1", 3), refused("web-2", 3), refused("web-3", 3), refused("db", 2))
    orchestrator.plan = plan(placed=(), refused=several, executable=False)
    ran = ppec("explain", "--flavor", "small", "--image", "tiny")
    assert [line for line in ran.err.splitlines() if line] == [
        "web-1 and 2 more find no place: 3 hosts: 3 without enough free cores",
        "  would fit: look in every rack",
        "db finds no place: 2 hosts: 2 without enough free cores",
        "  would fit: look in every rack",
    ]


def test_json_is_the_plan_as_it_came(orchestrator: Any, ppec: Any) -> None:
    orchestrator.plan = plan()
    ran = ppec("explain", "--flavor", "small", "--image", "tiny", "--output", "json")
    assert PlanView.model_validate_json(ran.out) == orchestrator.plan


def test_evidence_is_asked_for_by_the_query(orchestrator: Any, ppec: Any) -> None:
    loss = LossView(domain="h1", cluster="c", restarts=(RestartView(vm="db", host="h2", cells=(0,)),), without_place=())
    orchestrator.plan = plan(requests={"schema": "ppec-requests/1", "batch": []}, evacuations=(loss,))
    ran = ppec("explain", "--flavor", "small", "--image", "tiny", "--evidence", "-o", "json")
    assert PlanView.model_validate_json(ran.out) == orchestrator.plan
    (request,) = orchestrator.requests
    assert (request.path, request.query) == ("/v1/plans", {"evidence": "true"})


def test_every_wish_reaches_the_request(orchestrator: Any, ppec: Any, tmp_path: Path) -> None:
    orchestrator.plan = plan()
    own = {"rack": "r1", "host": "h1", "networks": [{"address": "10.1.0.9"}, {"prefix": "fd00::/64"}]}
    items = [{"name": "a", "priority": 5} | own, {"name": "b", "flavor": "large"}]
    (tmp_path / "items").write_text(json.dumps(items))
    ran = ppec(
        "explain", "--image", "tiny", "--items", str(tmp_path / "items"), "--vcpus", "4", "--memory-mib", "1024",
        "--disk-mib", "2048", "--region", "south", "--host-label", "disk=ssd", "--avoid-label", "old", "--apart",
        "db:rack", "--apart", "web:soft", "--together", "near:datacentre:soft", "--n-plus-one", "required:rack",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert asked(orchestrator) == {
        "image": "tiny",
        "mode": "all-or-nothing",
        "policy": "balanced",
        "size": {"vcpus": 4, "memory_mib": 1024, "disk_mib": 2048},
        "items": items,
        "region": "south",
        "host_labels": ["disk=ssd"],
        "avoid_labels": ["old"],
        "groups": [
            {"name": "db", "apart": True, "level": "rack"},
            {"name": "web", "apart": True, "hard": False},
            {"name": "near", "apart": False, "level": "datacentre", "hard": False},
        ],
        "n_plus_one": {"mode": "required", "level": "rack"},
    }


@pytest.mark.parametrize(
    "wrong", [("--apart", "db:floor"), ("--n-plus-one", "perhaps"), ("--vcpus", "4"), ("--items", "/nowhere")]
)
def test_what_is_wrong_is_told_without_asking(orchestrator: Any, ppec: Any, wrong: tuple[str, str]) -> None:
    ran = ppec("explain", "--image", "tiny", "--name", "web", *wrong)
    assert ran.code != 0
    assert "request.invalid" in ran.err or "invalid" in ran.err
    assert orchestrator.requests == []


def test_a_plan_is_executed_by_its_hash(orchestrator: Any, ppec: Any) -> None:
    ran = ppec("execute", HASH)
    assert (ran.code, ran.out) == (0, "op-1\n")
    (request,) = orchestrator.requests
    assert (request.method, request.path) == ("POST", f"/v1/plans/{HASH}/execute")
