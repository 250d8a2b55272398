# SPDX-License-Identifier: Apache-2.0
"""`host.retune`: running VMs change their NUMA cells within one host, by a plan that the host makes.

accept    do: by the accepting transaction        undo: VMs not dealt with are told why
plan      do: the host is asked; its plan and     undo: none, on purpose: nothing was changed
          the VMs it moves are kept
retune    do: one run carries out that plan       undo: none, on purpose: the host takes back by itself what it
                                                  can't carry out, and a VM is as well in one cell as in another

The record follows what the host says of each VM, of those that failed as well, in the transaction that has the results:
a retune that broke off may have left some where it had moved them. Where no answer came, the host's next report says it
(`store/seats.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection

from ppec_contract.api_operations import ItemState
from ppec_contract.errors import PpecError
from ppec_contract.retune import RetunePlan
from ppec_orchestrator.operations.context import Context
from ppec_orchestrator.operations.hosts import Outcome
from ppec_orchestrator.operations.kinds.power import undo_accept
from ppec_orchestrator.operations.retune_policy import nobody_asked
from ppec_orchestrator.operations.retunes_by_hosts import carried_out, planned
from ppec_orchestrator.operations.steps import Kind, NoUndo, Step, StepEnd, done_on_accept
from ppec_orchestrator.operations.verdicts import by_items
from ppec_orchestrator.operations.wanted import RetuneInput
from ppec_orchestrator.store import operations as store
from ppec_orchestrator.store.operations import PLAN_STEP, RETUNE, RETUNE_STEPS, ItemChange, NewItem

_DETAIL_CHARS = 500


def plan(context: Context) -> StepEnd:
    kept = _kept(context)
    if kept is not None:
        return StepEnd(detail=_summary(kept))
    asked = RetuneInput.model_validate(context.claimed.input)
    try:
        made = planned(context, asked.host, asked.want, asked.bounds)
    except PpecError as error:
        if error.code != "retune.not_possible" or not _nobody_asked(context):
            raise
        return StepEnd(detail=error.message[:_DETAIL_CHARS])
    names = {move.vm_id: move.name for move in made.moves}
    items = [NewItem(vm_id, name, asked.host, ItemState.RUNNING) for vm_id, name in names.items()]

    def writes(conn: Connection) -> None:
        store.keep_data(conn, context.operation_id, PLAN_STEP, {"plan": made.model_dump(mode="json")})
        if not asked.plan_only:
            store.add_items(conn, context.operation_id, items)

    # Here and not with the step's end: it may be refused.
    context.journal.commit(writes)
    return StepEnd(detail=_summary(made))


def _kept(context: Context) -> RetunePlan | None:
    with context.ports.database.read() as conn:
        data = store.data_of(conn, context.operation_id, PLAN_STEP)
    return RetunePlan.model_validate(data["plan"]) if data else None


def _nobody_asked(context: Context) -> bool:
    """What the policy tries need not be possible: then that is how it is, and no failure."""
    with context.ports.database.read() as conn:
        return nobody_asked(conn, context.operation_id)


def _summary(made: RetunePlan) -> str:
    opened = ", ".join(map(str, made.opened)) or "none"
    return f"{len(made.moves)} moves, {made.moved_mib} MiB, opens cells {opened}"


def retune(context: Context) -> StepEnd:
    asked = RetuneInput.model_validate(context.claimed.input)
    if asked.plan_only:
        return StepEnd(detail="only the plan was wanted")
    made = _kept(context)
    if made is None or not made.moves:
        return StepEnd(detail="nothing has to move")

    def record(conn: Connection, outcomes: Sequence[Outcome]) -> None:
        store.change_items(conn, context.operation_id, [_change(outcome) for outcome in outcomes])

    if any(item.state is ItemState.RUNNING for item in context.items()):
        carried_out(context, asked.host, made, record)
    return StepEnd()


def _change(outcome: Outcome) -> ItemChange:
    return ItemChange(
        outcome.vm_id,
        ItemState.FAILED if outcome.problem else ItemState.SUCCEEDED,
        outcome.problem,
        stage_ms={stage.value: ms for stage, ms in outcome.result.stage_ms.items()} if outcome.result else None,
    )


KIND = Kind(
    RETUNE,
    (
        Step(RETUNE_STEPS[0], done_on_accept, undo_accept),
        Step(PLAN_STEP, plan, NoUndo("nothing was changed")),
        Step(
            RETUNE_STEPS[2], retune, NoUndo("the host takes back what it can't carry out; any cell is as good to a VM")
        ),
    ),
    by_items,
)
