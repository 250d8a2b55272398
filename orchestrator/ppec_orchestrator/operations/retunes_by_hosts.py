# SPDX-License-Identifier: Apache-2.0
"""A host is asked how it would open its cells, and carries out what it answered."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError
from sqlalchemy import Connection

from ppec_contract.agent import PlanRetune, PlanRetuneReply
from ppec_contract.errors import PpecError
from ppec_contract.retune import RetuneBounds, RetunePlan, RetuneWant
from ppec_orchestrator.operations.context import Context
from ppec_orchestrator.operations.hosts import Call, Outcome, Record, ask, carry
from ppec_orchestrator.operations.steps import StepFailedError
from ppec_orchestrator.store.observations import record_observed

# What a host copies from cell to cell at least, for how long it is waited for.
_COPIED_MIB_PER_S = 200


def planned(context: Context, host: str, want: RetuneWant, bounds: RetuneBounds, *, adopts: bool = True) -> RetunePlan:
    """Raises StepFailedError with the host's problem, or for an answer that is not what was asked for, and what `carry`
    raises."""
    question = PlanRetune(want=want, bounds=bounds).model_dump(mode="json")
    reply = ask(context, "PlanRetune", host, question, adopts=adopts)
    try:
        plan = PlanRetuneReply.model_validate(reply).plan
    except ValidationError as error:
        raise _unusable(host, f"something else than a plan ({error.error_count()} faults)") from error
    if len(plan.moves) > bounds.moves or plan.moved_mib > bounds.memory_mib:
        raise _unusable(
            host,
            f"a plan of {len(plan.moves)} moves and {plan.moved_mib} MiB, which is more than {bounds.moves} moves and "
            f"{bounds.memory_mib} MiB",
        )
    if want.cells and not set(plan.opened) <= set(want.cells):
        raise _unusable(host, f"a plan that opens cells {plan.opened}, wanted {want.cells}")
    return plan


def _unusable(host: str, answer: str) -> StepFailedError:
    error = PpecError(
        "internal.error",
        f"host {host} answered with {answer}",
        hint="Compare its agent's version with the orchestrator's.",
        subject=f"host {host}",
    )
    return StepFailedError(error.problem())


def carried_out(context: Context, host: str, plan: RetunePlan, record: Record | None = None) -> list[Outcome]:
    """The outcome for each VM that the plan moves; `record` writes more of it than where the VMs are then."""

    def writes(conn: Connection, outcomes: Sequence[Outcome]) -> None:
        answers = [o.result for o in outcomes if o.result and o.result.vm and o.result.vm.vm_id == o.vm_id]
        record_observed(conn, answers, context.ports.now())
        if record is not None:
            record(conn, outcomes)

    call = Call(
        "RetuneHost",
        {move.vm_id: host for move in plan.moves},
        {move.vm_id: move.name for move in plan.moves},
        lambda conn, hosts: {host: {"plan": plan.model_dump(mode="json")}},
        writes,
        patience_s=plan.moved_mib / _COPIED_MIB_PER_S,
    )
    return carry(context, call)
