# SPDX-License-Identifier: Apache-2.0
"""`ppec operation …`, and how the other commands wait for one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ppec_orchestrator.cli.exposure import say_exposed
from ppec_orchestrator.cli.resources import Limit, Resource, at_default, made_columns, show_items
from ppec_orchestrator.cli.session import Session, session_of

if TYPE_CHECKING:
    from datetime import datetime

    from ppec_contract.api_operations import OperationItem, OperationStep, OperationView

State = Literal["queued", "running", "succeeded", "partial", "failed", "cancelled"]
# Operations are kept for long; a list of all of them is seldom what is wanted.
_SHOWN = 50
Id = Annotated[str, typer.Argument(help="The operation's id.")]


def _time(moment: datetime | None) -> str:
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S") if moment else "-"


def _seconds(start: datetime | None, end: datetime | None) -> str:
    return f"{(end - start).total_seconds():.2f}" if start and end else "-"


def _items_done(operation: OperationView) -> str:
    return f"{sum(item.state == 'succeeded' for item in operation.items)}/{len(operation.items)}"


def stages(item: OperationItem) -> str:
    """The time spent in each stage, in the order of the stages: `image 3, disk 41, define 80`."""
    from ppec_contract.agent import Stage

    return ", ".join(f"{stage} {item.stage_ms[stage]}" for stage in Stage if stage in item.stage_ms) or "-"


OPERATION = Resource(
    "operation",
    "/v1/operations",
    "OperationView",
    (
        ("operation", "operation_id"),
        ("kind", "kind"),
        ("state", "state"),
        ("VMs>", _items_done),
        ("by", "created_by"),
        ("created", lambda operation: _time(operation.created_at)),
        ("seconds>", lambda operation: _seconds(operation.started_at, operation.ended_at)),
        ("problem", lambda operation: operation.problem.detail if operation.problem else "-"),
    ),
)
_ITEMS = (
    ("VM", "name"),
    ("state", "state"),
    ("host", "host"),
    ("attempt>", "attempt"),
    ("stages, ms", stages),
    ("problem", lambda item: f"{item.problem.detail} [{item.problem.code}]" if item.problem else "-"),
)
_STEPS = (
    ("step>", "ordinal"),
    ("name", "name"),
    ("state", "state"),
    ("started", lambda step: _time(step.started_at)),
    ("seconds>", lambda step: _seconds(step.started_at, step.ended_at)),
    ("detail", "detail"),
)

app = typer.Typer(help="What has been asked for, and how it goes.", no_args_is_help=True)


@app.command("list")
def list_operations(
    context: typer.Context,
    state: Annotated[State | None, typer.Option(help="Only those in this state.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only of this kind, e.g. vm.create.")] = None,
    limit: Limit = _SHOWN,
) -> None:
    """List operations, the newest first."""
    show_items(context, OPERATION, {"state": state, "kind": kind}, limit)


@app.command("show")
def show(context: typer.Context, operation_id: Id) -> None:
    """Show an operation: its VMs and its steps."""
    from ppec_contract.api_operations import OperationView
    from ppec_orchestrator.cli.follow import operation_path

    session = session_of(context)
    show_operation(session, session.client.get(operation_path(operation_id), OperationView))


def show_operation(session: Session, view: OperationView) -> None:
    from ppec_orchestrator.cli.output import fields, table

    output = session.output
    if output.as_json:
        output.json(view)
        return
    hidden = {"items", "steps", "problem", "retune", "exposed"} | at_default(view, ("plan_id", "approved_by"))
    output.results.print(fields(view.model_dump(mode="json", exclude=hidden)))
    _print_table(session, "VMs", table(view.items, made_columns(_ITEMS)), bool(view.items))
    steps: tuple[OperationStep, ...] = view.steps
    _print_table(session, "steps", table(steps, made_columns(_STEPS)), bool(steps))
    if view.retune is not None and view.retune.plan is not None:
        from ppec_orchestrator.cli.retune import print_plan

        output.results.print("\nplan")
        print_plan(output, view.retune.plan)
    say_exposed(output, view.exposed)
    if view.problem:
        output.error(view.problem.error())


def _print_table(session: Session, title: str, shown: object, filled: bool) -> None:
    if filled:
        session.output.results.print(f"\n{title}")
        session.output.results.print(shown)


@app.command("watch")
def watch(context: typer.Context, operation_id: Id) -> None:
    """Follow an operation to its end. The exit code says how it ended."""
    wait_for(session_of(context), operation_id)


@app.command("cancel")
def cancel(context: typer.Context, operation_id: Id) -> None:
    """Cancel an operation: what it has done is undone."""
    from ppec_contract.api_operations import OperationView
    from ppec_orchestrator.cli.follow import operation_path

    session = session_of(context)
    view = session.client.post(f"{operation_path(operation_id)}/cancel", None, OperationView)
    if session.output.as_json:
        session.output.json(view)
    else:
        session.output.say(f"operation {view.operation_id}: {view.state}, cancel requested")


def accepted(session: Session, view: OperationView, *, wait: bool) -> None:
    """The end of every command that starts an operation: says its id, or waits for its end. In JSON it is all there."""
    if not session.output.as_json:
        say_exposed(session.output, view.exposed)
    if wait:
        wait_for(session, view.operation_id)
    elif session.output.as_json:
        session.output.json(view)
    else:
        session.output.say(f"operation {view.operation_id}: {view.state}; follow it with: ppec operation watch <id>")
        session.output.results.print(view.operation_id, soft_wrap=True)


def wait_for(session: Session, operation_id: str) -> None:
    """Shows progress to the end, then the result; exits by the error table unless all went well."""
    from ppec_orchestrator.cli import result
    from ppec_orchestrator.cli.follow import follow
    from ppec_orchestrator.cli.progress import watch as show_progress

    try:
        ended = show_progress(follow(session.client, operation_id), session.output)
    except KeyboardInterrupt:
        session.output.say(f"the operation goes on; follow it with: ppec operation watch {operation_id}")
        raise
    result.show(session, ended)
    code = result.exit_code_of(ended)
    if code:
        raise typer.Exit(code)
