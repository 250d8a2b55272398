# SPDX-License-Identifier: Apache-2.0
"""`ppec plans …` and `ppec approve`: plans that were shown and have neither expired nor been executed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ppec_orchestrator.cli.resources import Limit, Resource, show_items
from ppec_orchestrator.cli.session import Session, session_of

if TYPE_CHECKING:
    from datetime import datetime

    from ppec_contract.api_plans import PlanDetails, PlanSummary

_HASH_DIGITS = 64
State = Literal["waiting", "approved"]
Hash = Annotated[str, typer.Argument(metavar="HASH", help="The plan's hash; its first 8 digits or more will do.")]


def _approval(plan: PlanSummary) -> str:
    """Whether there is one, and whose; else whether it can't be executed without."""
    if plan.approved_by is not None:
        return f"given by {plan.approved_by}"
    return "needed" if plan.needs_approval else "not needed"


def _time(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


PLAN = Resource(
    "plan",
    "/v1/plans",
    "PlanSummary",
    (
        ("plan", "plan_id"),
        ("state", "state"),
        ("by", "created_by"),
        ("until", lambda plan: _time(plan.expires_at)),
        ("VMs>", lambda plan: f"{plan.placed}/{plan.vms}"),
        ("first", "first_vm"),
        ("image", "image"),
        ("approval", _approval),
    ),
)

app = typer.Typer(help="Plans that were shown, to be executed or approved.", no_args_is_help=True)


@app.command("list")
def list_plans(
    context: typer.Context,
    created_by: Annotated[str | None, typer.Option(help="Only those that this caller has made.")] = None,
    state: Annotated[State | None, typer.Option(help="Only those in this state.")] = None,
    limit: Limit = None,
) -> None:
    """List plans that have neither expired nor been executed, the newest first. Whether their hosts have changed since
    is seen only when one is approved or executed."""
    show_items(context, PLAN, {"created_by": created_by, "state": state}, limit)


@app.command("show")
def show(context: typer.Context, plan: Hash) -> None:
    """Show a plan as it was shown to who made it, and what was asked for."""
    session = session_of(context)
    view = _found(session, plan)
    if session.output.as_json:
        session.output.json(view)
    else:
        _show(session, view)


def approve(
    context: typer.Context,
    plan: Hash,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing.")] = False,
) -> None:
    """Approve somebody else's plan, so that they may execute just this: shows it and asks first."""
    from ppec_contract.api_plans import PlanDetails
    from ppec_contract.errors import PpecError

    session = session_of(context)
    if session.output.as_json and not yes:
        raise PpecError(
            "request.invalid", "with --output json nobody can be asked", hint="Give --yes as well.", subject="approve"
        )
    if yes and len(plan) < _HASH_DIGITS:
        raise PpecError(
            "request.invalid", "with --yes nobody sees which plan a shortened hash is", hint="Give the whole hash.",
            subject="approve",
        )  # fmt: skip
    # By its whole hash: just what was shown, whatever begins alike by now.
    whole = plan
    if not session.output.as_json:
        found = _found(session, plan)
        whole = found.plan_id
        _show(session, found)
    if not yes:
        typer.confirm("Approve this plan?", abort=True, err=True)
    view = session.client.post(f"{PLAN.url(whole)}/approve", None, PlanDetails)
    if session.output.as_json:
        session.output.json(view)
        return
    session.output.say(
        f"approved; until {_time(view.expires_at)}, if its hosts stand still, {view.created_by} can do: "
        f"ppec execute {view.plan_id}"
    )


def _found(session: Session, plan: str) -> PlanDetails:
    from ppec_contract.api_plans import PlanDetails

    return session.client.get(PLAN.url(plan), PlanDetails)


def _show(session: Session, view: PlanDetails) -> None:
    from ppec_orchestrator.cli.explain import show_places
    from ppec_orchestrator.cli.output import fields

    results = session.output.results
    about = {"plan": view.plan_id, "made by": view.created_by, "made": _time(view.created_at)}
    about |= {"until": _time(view.expires_at), "state": view.state.value, "approval": _approval(view)}
    if view.approved_at is not None:
        about["approval"] += f", {_time(view.approved_at)}"
    if view.needs_approval:
        about["approval"] += f", and nobody has given it: ppec approve {view.plan_id}, by others than {view.created_by}"
    results.print(fields(about))
    results.print("\nasked for")
    results.print(fields(view.request.model_dump(mode="json", exclude_defaults=True)))
    results.print("\nplan")
    show_places(session.output, view.plan)
