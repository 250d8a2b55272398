# SPDX-License-Identifier: Apache-2.0
"""Answers that were kept: what holds is found to hold, and whatever is changed in one is found."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ppec_contract.api_placement import ExposedView, MoveView, PlacedView, PlanView, Policy, RefusedView
from ppec_contract.api_vms import BatchMode
from ppec_contract.errors import PpecError
from ppec_orchestrator.fleets.offline import Options, Recipe, Verdict, generated, plan_on, verified

Answer = dict[str, Any]
SPARE = Options(Policy.SPREAD, spare="required", evidence=True, most_advised=0)
WAYS = {
    "balanced": Options(evidence=True),
    "pack": Options(Policy.PACK, most_moves=4, evidence=True),
    "all": Options(mode=BatchMode.ALL_OR_NOTHING, spare="warn:rack", evidence=True),
    "required": SPARE,
}


def made(folder: Path, seed: int, fill: float = 0.3) -> Path:
    path = folder / "fleet.json"
    path.write_text("".join(generated(Recipe(hosts=8, clusters=2, seed=seed, fill=fill, requests=60, varied=True))))
    return path


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("fleets"), seed=3)


@pytest.fixture(scope="module")
def answers(fleet: Path) -> dict[str, Answer]:
    return {
        name: plan_on(fleet, None, options).answer.model_dump(mode="json", exclude_none=True)
        for name, options in WAYS.items()
    }


def verdict(fleet: Path, answer: Answer, options: Options, folder: Path, requests: Path | None = None) -> Verdict:
    path = folder / "answer.json"
    path.write_text(json.dumps(answer))
    return verified(fleet, requests, path, options)


@pytest.mark.parametrize("way", WAYS)
def test_an_answer_holds_to_what_it_was_given_to(
    fleet: Path, answers: dict[str, Answer], tmp_path: Path, way: str
) -> None:
    answer = answers[way]
    assert answer["placed"]
    assert answer["refused"]
    found = verdict(fleet, answer, WAYS[way], tmp_path)
    assert (found.faults, found.placed, found.refused) == ((), len(answer["placed"]), len(answer["refused"]))
    if "evacuations" in answer:
        held = [each for each in answer["evacuations"] if not each["without_place"]]
        assert found.domains_checked == len(held)


def changed(answer: Answer, change: Callable[[Answer], object]) -> Answer:
    other = copy.deepcopy(answer)
    change(other)
    assert other != answer
    return other


def elsewhere(answer: Answer) -> None:
    first = answer["placed"][0]
    first["host"] = next(each["host"] for each in answer["placed"] if each["host"] != first["host"])


def restarts(answer: Answer) -> list[dict[str, Any]]:
    """Of the first domain that has any."""
    found: list[dict[str, Any]] = next(each["restarts"] for each in answer["evacuations"] if each["restarts"])
    return found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (elsewhere, "is said to be"),
        (lambda answer: answer["placed"][0].update(host="nowhere"), "does not fit cells"),
        (lambda answer: answer["placed"][0].update(cells=[]), "does not fit cells ()"),
        (lambda answer: answer["placed"][0].update(cells=[77]), "does not fit cells (77,)"),
        (lambda answer: answer["placed"][0]["evidence"].update(score=0.5), "score is said to be 0.5"),
        (lambda answer: answer["placed"][0]["evidence"].update(candidates=99), "candidates is said to be 99"),
        (lambda answer: answer["placed"][0]["evidence"].update(step=answer["refused"][0]["step"]), "in one step"),
        (lambda answer: answer["placed"].append(answer["placed"][0]), "does not answer each VM"),
        (lambda answer: answer["placed"][0].update(vm="web"), "'web' is no VM that is asked for"),
        (lambda answer: answer["placed"].pop(), "is asked for, and nothing is said of it"),
        (lambda answer: answer["refused"][0].update(reasons={"luck": 8}), "'luck' is no reason to refuse a VM for"),
        (lambda answer: answer.update(executable=False), "it is said to be not executable, and is"),
        (lambda answer: answer.update(moves=[
            {"vm": "v", "host": "h", "cells_before": [0], "cells_after": [1]}
        ]), "the moves that it lists"),
        (lambda answer: answer["placed"][0]["evidence"].update(moves=[
            {"vm": "v", "host": "h", "cells_before": [0], "cells_after": [1]}
        ]), "'v' is moved, and there is no such VM"),
        (lambda answer: answer["evacuations"].clear(), "and where they would restart is said of 0"),
        (lambda answer: answer["evacuations"].append(answer["evacuations"][0]), "would restart is said twice"),
        (lambda answer: restarts(answer).pop(), "and where they would restart is said of"),
        (lambda answer: restarts(answer).append(restarts(answer)[0]), "would restart is said twice"),
        (lambda answer: restarts(answer)[0].update(vm="web"), "'web' would restart were"),
        (lambda answer: restarts(answer)[0].update(host="nowhere"), "of nowhere when"),
        (lambda answer: restarts(answer)[0].update(cells=[]), "can't restart in cells ()"),
        (lambda answer: answer["exposed"].append(
            {"domain": "h", "vm": "v", "without_place": 1}
        ), "a domain is named as exposed whose VMs would restart"),
    ],
)  # fmt: skip
def test_what_is_changed_in_an_answer_is_found(
    fleet: Path, answers: dict[str, Answer], tmp_path: Path, change: Callable[[Answer], object], said: str
) -> None:
    found = verdict(fleet, changed(answers["required"], change), SPARE, tmp_path)
    assert any(said in fault for fault in found.faults), found.faults


def test_reasons_of_another_count_are_found(fleet: Path, answers: dict[str, Answer], tmp_path: Path) -> None:
    answer = changed(answers["required"], lambda answer: answer["refused"][0].update(reasons={"cores": 1}))
    (fault,) = verdict(fleet, answer, SPARE, tmp_path).faults
    assert fault.startswith(answer["refused"][0]["vm"])


def test_moves_of_an_answer_are_played_through(tmp_path: Path) -> None:
    fleet, options = made(tmp_path, seed=37, fill=0.7), WAYS["pack"]
    answer = plan_on(fleet, None, options).answer.model_dump(mode="json", exclude_none=True)
    (move,) = answer["moves"]
    assert verdict(fleet, answer, options, tmp_path).faults == ()
    assert verdict(fleet, as_the_api(answer), options, tmp_path).faults == ()
    (opened,) = [each for each in answer["placed"] if "moves" in each["evidence"]]
    opened["evidence"]["moves"] = [move | {"cells_before": [9]}]
    faults = verdict(fleet, answer, options, tmp_path).faults
    assert any(f"{move['vm']} can't move to cells" in fault for fault in faults)
    assert "the moves that it lists are not those that open its VMs' cells" in faults


def test_an_answer_holds_to_no_other_fleet(answers: dict[str, Answer], tmp_path: Path) -> None:
    other = made(tmp_path, seed=4)
    assert verdict(other, answers["balanced"], WAYS["balanced"], tmp_path).faults


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda answer: answer["placed"][1].pop("evidence"), "placed[1]: it comes without its evidence"),
        (lambda answer: answer["refused"][0].pop("step"), "refused[0]: it comes without its evidence"),
        (lambda answer: answer.pop("executable"), "executable: Field required"),
        (lambda answer: answer.update(colour="blue"), "colour: "),
    ],
)
def test_what_is_no_answer_with_its_evidence_is_refused(
    fleet: Path, answers: dict[str, Answer], tmp_path: Path, change: Callable[[Answer], object], said: str
) -> None:
    with pytest.raises(PpecError) as refused:
        verdict(fleet, changed(answers["balanced"], change), WAYS["balanced"], tmp_path)
    assert refused.value.code == "fleet.unreadable"
    assert said in refused.value.message
    assert "--evidence" in (refused.value.hint or "")


def test_n_plus_one_has_to_be_asked_for_as_it_was(fleet: Path, answers: dict[str, Answer], tmp_path: Path) -> None:
    for way, options in (("required", WAYS["balanced"]), ("balanced", SPARE)):
        with pytest.raises(PpecError, match=r"the answer (was made with N|says nothing of where)"):
            verdict(fleet, answers[way], options, tmp_path)


# --- answers of the API ----------------------------------------------------------------------------------------------


def as_the_api(answer: Answer) -> Answer:
    """The same plan as its view."""
    placed = tuple(
        PlacedView(
            vm=each["vm"],
            host=each["host"],
            cells=each["cells"],
            broken_groups=each["evidence"]["broken"],
            moves=tuple(
                MoveView(**{key: value for key, value in move.items() if key != "host"})
                for move in each["evidence"].get("moves", ())
            ),
            **{key: each["evidence"][key] for key in ("candidates", "score", "searched", "step", "epoch")},
        )
        for each in answer["placed"]
    )
    refused = tuple(
        RefusedView(**{key: each[key] for key in ("vm", "reasons", "step")}, sentence="") for each in answer["refused"]
    )
    view = PlanView(
        plan_id="f0" * 32,
        created_by="alice",
        created_at="2026-11-20T10:30:00Z",
        expires_at="2026-11-20T10:45:00Z",
        executable=answer["executable"],
        placed=placed,
        refused=refused,
        exposed=tuple(ExposedView(**each) for each in answer.get("exposed", ())),
        hosts=8,
        evacuations=answer.get("evacuations"),
    )
    return view.model_dump(mode="json")


@pytest.mark.parametrize("way", WAYS)
def test_an_answer_of_the_api_is_the_same_answer(
    fleet: Path, answers: dict[str, Answer], tmp_path: Path, way: str
) -> None:
    answer = as_the_api(answers[way])
    assert verdict(fleet, answer, WAYS[way], tmp_path).faults == ()
    answer["placed"][0]["score"] = 0.5
    assert "score is said to be 0.5" in verdict(fleet, answer, WAYS[way], tmp_path).faults[0]


def test_an_answer_that_carries_its_requests_is_of_those(
    fleet: Path, answers: dict[str, Answer], tmp_path: Path
) -> None:
    document = json.loads(fleet.read_text())
    own = {
        "schema": "ppec-requests/1",
        "profiles": document["profiles"],
        "groups": document["groups"],
        "batch": document.pop("requests")["batch"],
    }
    bare = tmp_path / "bare.json"
    bare.write_text(json.dumps(document))
    answer = as_the_api(answers["balanced"]) | {"requests": own}
    assert verdict(bare, answer, WAYS["balanced"], tmp_path).faults == ()
    own["batch"][0]["name"] = "another"
    assert "'another' is asked for" in "".join(verdict(bare, answer, WAYS["balanced"], tmp_path).faults)
