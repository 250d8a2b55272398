# SPDX-License-Identifier: Apache-2.0
"""`vm.start` and `vm.stop`: one run for all hosts, each VM's new state recorded as its host answers.

accept    do: by the accepting transaction        undo: VMs not dealt with are told why
start     do: one run                             undo: none, on purpose: what runs was meant to run, and pulling
or stop                                           the plug of a guest for another one's sake does harm
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Connection

from ppec_contract.api import ItemState
from ppec_contract.run import PlanAction
from ppec_orchestrator.operations.context import Context, cancelled
from ppec_orchestrator.operations.hosts import Call, Outcome, by_ids, carry
from ppec_orchestrator.operations.steps import Kind, NoUndo, Step, StepEnd, done_on_accept
from ppec_orchestrator.operations.verdicts import by_items
from ppec_orchestrator.operations.wanted import StopInput
from ppec_orchestrator.store import operations as store
from ppec_orchestrator.store.observations import record_observed
from ppec_orchestrator.store.operations import ItemChange

START_NAME = "vm.start"
STOP_NAME = "vm.stop"
_WHY_NO_UNDO = "a guest is not switched for the sake of another one"


def _on_hosts(context: Context, action: PlanAction, more: dict[str, Any], patience_s: float = 0.0) -> StepEnd:
    items = [item for item in context.items() if item.state is ItemState.RUNNING]
    targets = {item.vm_id: item.host for item in items if item.host is not None}

    def record(conn: Connection, outcomes: Sequence[Outcome]) -> None:
        answers = [outcome.result for outcome in outcomes if outcome.problem is None and outcome.result]
        record_observed(conn, answers, context.ports.now())
        store.change_items(conn, context.operation_id, [_change(outcome) for outcome in outcomes])

    if targets:
        carry(context, Call(action, targets, {i.vm_id: i.name for i in items}, by_ids(**more), record, patience_s))
    return StepEnd()


def _change(outcome: Outcome) -> ItemChange:
    return ItemChange(
        outcome.vm_id,
        ItemState.FAILED if outcome.problem else ItemState.SUCCEEDED,
        outcome.problem,
        stage_ms={stage.value: ms for stage, ms in outcome.result.stage_ms.items()} if outcome.result else None,
    )


def start_on_hosts(context: Context) -> StepEnd:
    return _on_hosts(context, "StartVms", {})


def stop_on_hosts(context: Context) -> StepEnd:
    asked = StopInput.model_validate(context.claimed.input)
    return _on_hosts(context, "StopVms", asked.model_dump(), patience_s=asked.timeout_s)


def undo_accept(context: Context) -> StepEnd:
    problem = context.reason or cancelled(context.operation_id).problem()
    unfinished = [i for i in context.items() if i.state in (ItemState.PENDING, ItemState.RUNNING)]
    changes = [ItemChange(item.vm_id, ItemState.FAILED, item.problem or problem) for item in unfinished]
    return StepEnd(lambda conn: store.change_items(conn, context.operation_id, changes))


def _kind(name: str, step: str, do: Callable[[Context], StepEnd]) -> Kind:
    return Kind(name, (Step("accept", done_on_accept, undo_accept), Step(step, do, NoUndo(_WHY_NO_UNDO))), by_items)


START = _kind(START_NAME, "start", start_on_hosts)
STOP = _kind(STOP_NAME, "stop", stop_on_hosts)
