# SPDX-License-Identifier: Apache-2.0
"""`ppec host retune`: what it asks for, and how it shows a plan."""

from __future__ import annotations

from typing import Any

import pytest

from ppec_contract.api_operations import RetuneView
from ppec_contract.errors import PpecError
from ppec_contract.retune import CellRoom, RetuneMove, RetunePlan, RetuneSeat
from ppec_contract.vm import VcpuPin
from ppec_orchestrator.cli.sizes import mib


def planned(make: Any, *names: str) -> Any:
    """An operation that has made a plan: these VMs go from cell 0 to cell 1."""

    def seat(cell: int) -> RetuneSeat:
        return RetuneSeat(cell=cell, pins=(VcpuPin(vcpu=0, pcpu=cell), VcpuPin(vcpu=1, pcpu=cell + 2)))

    def rooms(first: int, second: int) -> tuple[CellRoom, ...]:
        return (CellRoom(cell=0, cores=first, memory_mib=1024), CellRoom(cell=1, cores=second, memory_mib=9))

    moves = tuple(
        RetuneMove(vm_id=make.vm_id(number), name=name, before=seat(0), after=seat(1), memory_mib=512)
        for number, name in enumerate(names)
    )
    plan = RetunePlan(opened=(0,), moves=moves, before=rooms(3, 7), after=rooms(8, 2))
    return make.operation("succeeded", retune=RetuneView(host="h1", plan_only=True, plan=plan))


def test_plan_is_shown_before_and_after_with_its_moves(orchestrator: Any, ppec: Any, make: Any) -> None:
    orchestrator.current = planned(make, "web", "db")
    ran = ppec("host", "retune", "h1", "--vcpus", "8", "--memory", "4G", "--cells", "0,2", "--plan")
    assert ran.code == 0, ran.err
    asked = {"want": {"vcpus": 8, "memory_mib": 4096, "cells": [0, 2]}, "bounds": {}, "plan_only": True}
    posted = [request for request in orchestrator.requests if request.method == "POST"]
    assert [(request.path, request.json) for request in posted] == [("/v1/hosts/h1/retune", asked)]
    rows = [line.split() for line in ran.out.splitlines() if line.strip()]
    assert [row for row in rows if row[0] in "01"] == [
        ["0", "3", "8", "1024", "1024", "yes"],
        ["1", "7", "2", "9", "9", "-"],
    ]
    assert [row for row in rows if row[0] in ("web", "db")] == [
        ["web", "0", "1", "512"],
        ["db", "0", "1", "512"],
    ]
    assert "2 moves, 1024 MiB to copy" in ran.err
    as_json = ppec("host", "retune", "h1", "--plan", "--output", "json")
    assert RetunePlan.model_validate(as_json.json) == orchestrator.current.retune.plan
    assert as_json.err == ""


def test_nothing_has_to_move(orchestrator: Any, ppec: Any, make: Any) -> None:
    orchestrator.current = planned(make)
    assert "It fits already." in ppec("host", "retune", "h1", "--plan").err


def test_plan_that_is_not_possible_is_an_error(orchestrator: Any, ppec: Any, make: Any) -> None:
    problem = PpecError("retune.not_possible", "it would take 9 moves", hint="Raise the bounds.").problem()
    orchestrator.current = make.operation("failed", problem=problem, retune=RetuneView(host="h1"))
    ran = ppec("host", "retune", "h1", "--plan")
    assert (ran.code, ran.out) == (6, "")
    assert "it would take 9 moves [retune.not_possible]" in ran.err


def test_retune_is_asked_for_within_bounds(orchestrator: Any, ppec: Any, make: Any) -> None:
    ran = ppec("host", "retune", "h1", "--max-moves", "3", "--max-memory", "1T")
    assert (ran.code, ran.out) == (0, "op-1\n")
    asked = {"want": {}, "bounds": {"moves": 3, "memory_mib": 1024 * 1024}, "plan_only": False}
    assert orchestrator.requests[-1].json == asked
    orchestrator.current = planned(make, "web")
    shown = ppec("operation", "show", "op-1")
    assert "web" in shown.out
    assert "plan_only" not in shown.out


@pytest.mark.parametrize("wrong", [("--cells", "0,x"), ("--memory", "8 apples"), ("--max-moves", "-1")])
def test_mistakes_are_not_sent(orchestrator: Any, ppec: Any, wrong: tuple[str, str]) -> None:
    assert ppec("host", "retune", "h1", *wrong).code == 2
    assert orchestrator.requests == []


@pytest.mark.parametrize(
    ("text", "size"),
    [("512", 512), ("512M", 512), ("8g", 8192), ("8GiB", 8192), ("1T", 1024**2), (" 2 G ", 2048), (None, None)],
)
def test_sizes(text: str | None, size: int | None) -> None:
    assert mib(text, "memory") == size


@pytest.mark.parametrize("text", ["", "-1", "1.5G", "G", "8K", "1e3", "\u0663"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(PpecError, match="is no size"):
        mib(text, "memory")
