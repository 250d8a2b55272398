# SPDX-License-Identifier: Apache-2.0
"""A plan of the API with its evidence, verified on the exported fleet by who has nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from plan_requests import BODY, created
from sqlalchemy import select
from starlette.testclient import TestClient

from ppec_contract.api_vms import BatchMode
from ppec_orchestrator.fleets.offline import Options, Verdict, verified
from ppec_orchestrator.store import tables


def with_evidence(api: TestClient, **body: Any) -> dict[str, Any]:
    answer = api.post("/v1/plans?evidence=true", json=BODY | body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def verdict(api: TestClient, view: dict[str, Any], options: Options, folder: Path) -> Verdict:
    (folder / "answer.json").write_text(json.dumps(view))
    return verified(api.get("/v1/fleet").content, None, folder / "answer.json", options)


def test_a_plan_of_items_holds_and_so_does_that_one_s_address_is_taken(
    world: Any, api: TestClient, tmp_path: Path
) -> None:
    created(world, api, name="standing", networks=[{"address": "10.7.0.50"}])
    numbers = {"a": "10.7.0.50", "b": "10.7.0.60"}
    items = [{"name": name, "networks": [{"address": number}]} for name, number in numbers.items()]
    view = with_evidence(api, items=[*items, {"name": "c", "host": "h3"}], mode="best-effort")
    assert [one["vm"] for one in view["refused"]] == ["a"]
    assert verdict(api, view, Options(), tmp_path).faults == ()


@pytest.mark.parametrize(
    ("asked", "options"),
    [
        ({"count": 3}, Options(mode=BatchMode.ALL_OR_NOTHING)),
        ({"count": 99, "mode": "best-effort"}, Options()),
        ({"count": 99, "mode": "most-vcpus"}, Options(mode=BatchMode.MOST_VCPUS)),
        ({"host": "h1", "n_plus_one": {"mode": "warn"}}, Options(spare="warn")),
        ({"count": 9, "mode": "best-effort", "n_plus_one": {"mode": "required"}}, Options(spare="required")),
        (
            {
                "count": 2,
                "mode": "best-effort",
                "groups": [{"name": "db"}, {"name": "soft", "apart": False, "hard": False}],
            },
            Options(),
        ),
        ({"networks": [{"prefix": "10.7.0.0/24"}]}, Options()),
        ({"networks": [{"address": "10.7.0.50"}]}, Options()),
    ],
)
def test_a_plan_holds_on_the_exported_fleet(
    world: Any, api: TestClient, tmp_path: Path, asked: dict[str, Any], options: Options
) -> None:
    created(world, api, name="standing", count=2, groups=[{"name": "db"}])
    hold = {"kind": "reserved", "first": "10.7.0.50", "reserved_for": "web"}
    assert api.post("/v1/prefixes/1/holds", json=hold, headers=api.admin).status_code == 201  # type: ignore[attr-defined]
    view = with_evidence(api, name="web", **asked)
    found = verdict(api, view, options, tmp_path)
    assert found.faults == ()
    assert (found.placed, found.refused) == (len(view["placed"]), len(view["refused"]))
    assert found.placed > 0 or options.spare == "required"
    assert [each["step"] for each in view["refused"]] == sorted({each["step"] for each in view["refused"]})
    view["placed" if view["placed"] else "refused"][0]["step"] += 100
    view["requests"]["batch"][0]["name"] = "another"
    assert verdict(api, view, options, tmp_path).faults


def test_evidence_is_told_once_and_changes_nothing_of_the_plan(world: Any, api: TestClient) -> None:
    created(world, api, name="standing", count=2)
    asked = {"name": "web", "host": "h1", "n_plus_one": {"mode": "warn"}}
    view = with_evidence(api, **asked)
    assert {each["vm"] for loss in view["evacuations"] for each in loss["restarts"]} >= {"web", "standing-1"}
    assert [each["name"] for each in view["requests"]["batch"]] == ["web"]
    plain = api.post("/v1/plans", json=BODY | asked).json()
    assert (plain["plan_id"], plain["requests"], plain["evacuations"]) == (view["plan_id"], None, None)
    again = with_evidence(api, **asked)
    assert again["evacuations"] == view["evacuations"]
    kept = api.get(f"/v1/plans/{view['plan_id']}").json()["plan"]
    assert (kept["requests"], kept["evacuations"]) == (None, None)
    with world.database.read() as conn:
        (shown,) = conn.execute(select(tables.plan.c.shown)).scalars()
    assert not {"requests", "evacuations"} & shown.keys()
