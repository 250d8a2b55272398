# SPDX-License-Identifier: Apache-2.0
"""Files of fleets with one thing changed, thousands of them: what can't be is refused with its place, and what is read
can be planned on."""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ppec_contract.api_placement import Policy
from ppec_contract.errors import PpecError
from ppec_orchestrator.fleets.advice import advice_on
from ppec_orchestrator.fleets.file import FleetFile
from ppec_orchestrator.fleets.generator import Recipe, generate
from ppec_orchestrator.fleets.reading import read_fleet
from ppec_orchestrator.fleets.snapshot import written
from ppec_orchestrator.placement.checker import check
from ppec_orchestrator.placement.planner import plan
from ppec_orchestrator.placement.request import PlanRequest, Spare, SpareRule

from .test_bench_cluster import CLUSTER as BENCH
from .test_ganeti import CLUSTER as GANETI

GOLDEN = json.loads((Path(__file__).parent / "golden" / "fleet.json").read_text())
# Of each file, beside one of each kind at each field.
MORE = 150
Path_ = tuple[str | int, ...]
Mutation = tuple[str, Callable[[Any], Any]]
# A value of another type, or beyond all bounds.
WRONG_TYPE: list[tuple[str, Any]] = [
    ("list", [[]]), ("object", {"x": 1}), ("half", 1.5), ("NaN", float("nan")), ("infinity", float("inf")),
    ("huge", 10**30), ("text of a number", "4"), ("true", True), ("long", "x" * 300), ("null", None),
]  # fmt: skip


def made_up() -> dict[str, Any]:
    file = generate(Recipe(3, 2, seed=3, requests=4, varied=True))
    document: dict[str, Any] = json.loads("".join(written(file.fleet, file.requests, file.names)))
    for host in document["hosts"]:
        host["vms"] = host["vms"][:2]
    return document


DOCUMENTS = {"snapshot": GOLDEN, "made-up": made_up(), "bench": BENCH}


def values(value: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """All inside a document, by path."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inside:
        yield (*path, key), part
        yield from values(part, (*path, key))


def alike(value: Any, other: Any) -> bool:
    """Do readers take one where they take the other? Weights are numbers of any kind."""
    numbers = (int, float)
    if type(value) in numbers and type(other) in numbers:
        return value == other
    return type(value) is type(other)


def mutations(value: Any) -> Iterator[Mutation]:
    """Each makes another value of one. What they are called says whether any of them may be read."""
    for name, wrong in WRONG_TYPE:
        # Texts may be what they want, up to their length.
        if not alike(value, wrong) or name == "long":
            yield f"wrong: {name}", lambda _, wrong=wrong: copy.deepcopy(wrong)
    if isinstance(value, dict):
        yield "wrong: unknown field", lambda old: old | {"zzz": 1}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        yield "wrong: a row twice", lambda old: [*old, copy.deepcopy(old[0])]
    if type(value) is int:
        yield "wrong: negative", lambda old: -old - 1
        yield "one more", lambda old: old + 1
        yield "nothing", lambda old: 0
        yield "much", lambda old: 2**37
    if type(value) is bool:
        yield "the other", lambda old: not old
    if type(value) is str:
        yield "another name", lambda old: "nowhere"
        yield "no name", lambda old: ""
    if isinstance(value, list | dict):
        yield "empty", lambda old: type(old)()


def put(document: Any, path: Path_, change: Callable[[Any], Any]) -> Any:
    made = copy.deepcopy(document)
    inside = made
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = change(inside[path[-1]])
    return made


def field(path: Path_) -> str:
    return ".".join("[]" if isinstance(key, int) else key for key in path)


def chosen(document: Any, dice: random.Random) -> list[tuple[Path_, Mutation]]:
    """One of each kind at each field, wherever there are several; and some more."""
    everything = [(path, mutation) for path, value in values(document) for mutation in mutations(value)]
    dice.shuffle(everything)
    first = {(field(path), mutation[0]): (path, mutation) for path, mutation in everything}
    return [*first.values(), *everything[:MORE]]


def read(data: bytes) -> FleetFile | str:
    """The fleet, or where it is refused; anything else is raised."""
    try:
        return read_fleet(data, "mutated")
    except PpecError as refused:
        if refused.code == "fleet.unreadable":
            return "schema"
        return str(refused.details["where"])


def plan_on(file: FleetFile) -> None:
    """In the simplest way and in one with everything; the checker agrees."""
    spared = SpareRule(Spare.REQUIRED, witnessed=True)
    for request in (
        PlanRequest(file.requests, spare=SpareRule(witnessed=True)),
        PlanRequest(file.requests, Policy.PACK, all_or_nothing=True, spare=spared, most_moves=2),
    ):
        made = plan(file.fleet, request)
        assert check(file.fleet, request, made) == []
        advice_on(file.fleet, request, made, file.called, most=2)


# What is read though its value is "wrong" everywhere else: any number is a seed or a priority, of no place may be said
# so, pairs and names that are sets may come twice, a number is a weight.
READ = {
    "seed": {"negative", "huge"},
    "flavours.[].weight": {"half", "huge"},
    "requests.batch.[].priority": {"negative"},
    "profiles.[].where.rack": {"null"},
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_what_is_wrong_anywhere_is_refused_with_its_place(name: str) -> None:
    document, counts = DOCUMENTS[name], Counter[str]()
    for path, (kind, change) in chosen(document, random.Random(name)):
        found = read(json.dumps(put(document, path, change)).encode())
        wrong = kind.startswith("wrong: ") and kind.removeprefix("wrong: ") not in READ.get(field(path), ())
        if isinstance(found, str):
            counts["refused"] += 1
            assert found, (field(path), kind)
        else:
            counts["read"] += 1
            assert not wrong, (field(path), kind)
            plan_on(found)
    assert counts["refused"] > 400
    assert counts["read"] > 30


# What has to be there, and is not.
REFERENCES = {
    "snapshot": [
        "hosts.[].vms.[].profile", "hosts.[].vms.[].groups.[]", "requests.batch.[].profile",
        "requests.batch.[].groups.[]", "profiles.[].where.rack", "hosts.[].architecture", "profiles.[].architecture",
    ],
    "made-up": ["hosts.[].vms.[].profile", "hosts.[].vms.[].groups.[]", "requests.batch.[].profile"],
    "bench": [
        "hosts.[].group", "vms.[].host", "requests.one.flavour", "requests.batch.[].flavour", "storage",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", DOCUMENTS)
def test_references_to_nothing_are_refused(name: str) -> None:
    tried: Counter[str] = Counter()
    for path, value in values(DOCUMENTS[name]):
        if field(path) in REFERENCES[name] and isinstance(value, str):
            tried[field(path)] += 1
            found = read(json.dumps(put(DOCUMENTS[name], path, lambda _: "nowhere")).encode())
            assert isinstance(found, str), field(path)
    assert set(tried) == set(REFERENCES[name])


# --- lines of text ---------------------------------------------------------------------------------------------------

GARBAGE = (
    "",
    "-1",
    "x",
    "1.5",
    "nan",
    "inf",
    "9" * 40,
    "?",
    "x" * 300,
    "a\x00",
    "é",
    "２",
    " 5",
    "1e3",
    "137438953472",
)
# Of a section (before each empty line), the columns that are numbers or words of Ganeti's.
STRICT = {"nodes": (1, 2, 3, 4, 5, 6, 7, 8), "instances": (1, 2, 3, 4, 6, 8)}


def test_ganetis_lines_with_garbage_are_refused_with_their_line() -> None:
    lines, counts = GANETI.split("\n"), Counter[str]()
    sections = ["groups", "nodes", "instances", "tags", "policies", "rest"]
    section = 0
    for number, line in enumerate(lines):
        section += not line
        for column, old in enumerate(line.split("|")):
            for text in GARBAGE:
                fields = line.split("|")
                fields[column] = text
                changed = [*lines[:number], "|".join(fields), *lines[number + 1 :]]
                found = read("\n".join(changed).encode())
                if isinstance(found, str):
                    counts["refused"] += 1
                    # What a line is missing may be told where it is missed.
                    assert found.startswith("line "), found
                else:
                    counts["read"] += 1
                    strict = column in STRICT.get(sections[section], ()) and not line.startswith("#")
                    # A node that gave no answer is known by this mark, whatever else is said of it.
                    assert not strict or text in (old, "?", "137438953472") or "?" in line, (line, column, text)
    assert counts["refused"] > 500
    assert counts["read"] > 100
