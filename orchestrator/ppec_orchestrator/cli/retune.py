# SPDX-License-Identifier: Apache-2.0
"""`ppec host retune`: the request, and its plan as tables."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ppec_contract.api_hosts import HostRetune
from ppec_contract.api_operations import OperationView
from ppec_contract.errors import PpecError
from ppec_contract.retune import CellRoom, RetuneMove, RetunePlan
from ppec_contract.validation import parse
from ppec_orchestrator.cli.output import Column, table

if TYPE_CHECKING:
    from ppec_orchestrator.cli.output import Output
    from ppec_orchestrator.cli.session import Session


def cells_of(text: str | None) -> tuple[int, ...] | None:
    """`0,2` as numbers. Raises `request.invalid`."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise PpecError("request.invalid", f"cells: {text[:40]!r} are no cells", hint="Give numbers: 0,2.")
    return tuple(map(int, parts))


def retune(
    session: Session, url: str, want: Mapping[str, Any], bounds: Mapping[str, Any], *, plan_only: bool, wait: bool
) -> None:
    """Asks for it; with `plan_only` shows the plan and nothing else."""
    from ppec_orchestrator.cli.operations import accepted

    given = {"want": _given(want), "bounds": _given(bounds), "plan_only": plan_only}
    body = parse(HostRetune, given, subject="host retune")
    view = session.client.post(f"{url}/retune", body, OperationView, idempotency_key=str(uuid.uuid4()))
    if not plan_only:
        accepted(session, view, wait=wait)
        return
    _show_plan(session, _planned(session, view))


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _planned(session: Session, asked: OperationView) -> RetunePlan:
    """The plan of an operation that makes no more than that. Raises the operation's problem."""
    from ppec_orchestrator.cli.follow import follow

    view = asked
    for view in follow(session.client, asked.operation_id):
        if view.state.ended and view.problem is not None:
            raise view.problem.error()
    if view.retune is None or view.retune.plan is None:
        raise PpecError("internal.error", f"operation {view.operation_id} ended {view.state} without a plan")
    return view.retune.plan


def _show_plan(session: Session, plan: RetunePlan) -> None:
    if session.output.as_json:
        session.output.json(plan)
    else:
        print_plan(session.output, plan)


def print_plan(output: Output, plan: RetunePlan) -> None:
    """The cells before and after, then the moves."""
    after = {room.cell: room for room in plan.after}
    cells: list[Column[CellRoom]] = [
        Column("cell", lambda room: room.cell, right=True),
        Column("cores free", lambda room: room.cores, right=True),
        Column("then", lambda room: after[room.cell].cores if room.cell in after else "-", right=True),
        Column("memory free MiB", lambda room: room.memory_mib, right=True),
        Column("then", lambda room: after[room.cell].memory_mib if room.cell in after else "-", right=True),
        Column("opened", lambda room: "yes" if room.cell in plan.opened else "-"),
    ]
    moves: list[Column[RetuneMove]] = [
        Column("VM", lambda move: move.name),
        Column("from cell", lambda move: move.before.cell, right=True),
        Column("to cell", lambda move: move.after.cell, right=True),
        Column("MiB", lambda move: move.memory_mib, right=True),
    ]
    output.results.print(table(plan.before, cells))
    if plan.moves:
        output.results.print("")
        output.results.print(table(plan.moves, moves))
    cheaper = "" if plan.cheapest else "; the search for fewer was cut short"
    output.say(f"{len(plan.moves)} moves, {plan.moved_mib} MiB to copy{cheaper}" if plan.moves else "It fits already.")
