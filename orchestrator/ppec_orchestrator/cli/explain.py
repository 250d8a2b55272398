# SPDX-License-Identifier: Apache-2.0
"""`ppec explain` and `ppec execute`: where VMs would go and why, and why not; and a plan carried out as it was
shown."""

from __future__ import annotations

import uuid
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from ppec_orchestrator.cli import wanted
from ppec_orchestrator.cli.exposure import say_exposed
from ppec_orchestrator.cli.output import Column
from ppec_orchestrator.cli.session import session_of

if TYPE_CHECKING:
    from ppec_contract.api_placement import PlacedView, PlanView
    from ppec_contract.api_vms import VmsCreate
    from ppec_orchestrator.cli.output import Output

PATH = "/v1/plans"


@wanted.takes_a_request
def explain(
    context: typer.Context,
    body: Any,
    evidence: Annotated[
        bool,
        typer.Option("--evidence", help="Let JSON say all that it takes to verify the plan: see ppec plan --verify."),
    ] = False,
) -> None:
    """Say where VMs would go and why, and why not: takes what `ppec vm create` takes, and makes nothing."""
    from ppec_contract.api_placement import PlanView

    session = session_of(context)
    view = session.client.post(PATH, body, PlanView, query={"evidence": "true"} if evidence else None)
    if session.output.as_json:
        session.output.json(view)
    else:
        show_places(session.output, view)
        _say_what_next(session.output, view, body)


def execute(
    context: typer.Context,
    plan: Annotated[
        str, typer.Argument(help="The plan's hash, from `ppec explain`; its first 8 digits or more will do.")
    ],
    idempotency_key: Annotated[str | None, typer.Option(help="The same key never executes twice.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end, with progress.")] = False,
) -> None:
    """Carry out a plan as it was shown; refused if the fleet has moved on, or if it needs an approval and has none."""
    from ppec_contract.api_operations import OperationView
    from ppec_orchestrator.cli.operations import accepted

    session = session_of(context)
    key = idempotency_key or str(uuid.uuid4())
    answer = session.client.post(f"{PATH}/{quote(plan, safe='')}/execute", None, OperationView, idempotency_key=key)
    accepted(session, answer, wait=wait)


def show_places(output: Output, view: PlanView) -> None:
    """Where each VM would go and why, and why not."""
    if view.placed:
        output.items(view.placed, _COLUMNS)
    for placed in view.placed:
        for move in placed.moves:
            before, after = (",".join(map(str, cells)) for cells in (move.cells_before, move.cells_after))
            output.say(f"before {placed.vm}: {move.vm} moves from cell {before} to {after} of {placed.host}")
    # VMs of one kind that were refused together are told the same.
    for _, alike in groupby(view.refused, key=lambda refused: refused.model_copy(update={"vm": ""})):
        one, *others = alike
        more = f" and {len(others)} more find" if others else " finds"
        output.say(f"{one.vm}{more} no place: {one.sentence}")
        for change in one.changes:
            output.say(f"  would fit: {change.sentence}")
        if not one.advised:
            output.say("  what would help was looked for only for the first kinds of VMs refused: ask for it alone")
    say_exposed(output, view.exposed)


def none_made(placed: int, refused: int, at_least: int | None = None) -> str:
    """Of a batch that has places for some of its VMs, and is made with more of them or not at all."""
    total = placed + refused
    needed = f"all of its {total}" if at_least is None else f"at least {at_least} of its {total}"
    find = "finds" if refused == 1 else "find"
    return f"None of these VMs would be made: the batch needs {needed}, and {refused} {find} no place."


def _say_what_next(output: Output, view: PlanView, asked: VmsCreate) -> None:
    if not view.executable:
        if view.placed:
            output.say(none_made(len(view.placed), len(view.refused), asked.at_least))
        return
    if view.needs_approval:
        output.say(f"first somebody else has to approve it: ppec approve {view.plan_id}")
    output.say(f"until {view.expires_at:%H:%M:%S} UTC, if these hosts stand still: ppec execute {view.plan_id}")


_COLUMNS: tuple[Column[PlacedView], ...] = (
    Column("VM", lambda one: one.vm),
    Column("host", lambda one: one.host),
    Column("cells", lambda one: ",".join(map(str, one.cells))),
    Column("best of", lambda one: one.candidates, right=True),
    Column("score", lambda one: f"{one.score:.6g}", right=True),
    Column("why", lambda one: "part of a whole" if one.searched else "lowest score"),
)
