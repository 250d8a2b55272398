# SPDX-License-Identifier: Apache-2.0
"""`vm.start`, `vm.stop`, `vm.reboot`, `vm.reset`, `vm.pause`, `vm.resume`, `vm.freeze` and `vm.thaw`: one run for all
hosts, each VM's new state recorded as its host answers.

accept    do: by the accepting transaction        undo: VMs not dealt with are told why
the       do: one run                             undo: none, on purpose: what runs was meant to run, and pulling
action                                            the plug of a guest for another one's sake does harm;
                                                  a freeze has an end of its own
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from sqlalchemy import Connection

from ppec_contract.api_operations import ItemState
from ppec_contract.api_vms import VmAction
from ppec_contract.run import PlanAction
from ppec_orchestrator.operations.context import Context, cancelled
from ppec_orchestrator.operations.hosts import Call, Outcome, by_ids, carry
from ppec_orchestrator.operations.steps import Kind, NoUndo, Step, StepEnd, done_on_accept
from ppec_orchestrator.operations.verdicts import by_items
from ppec_orchestrator.operations.wanted import FreezeInput, GuestInput
from ppec_orchestrator.store import operations as store
from ppec_orchestrator.store.observations import record_observed
from ppec_orchestrator.store.operations import ItemChange

_WHY_NO_UNDO = "a guest is not switched for the sake of another one"
_METHODS: dict[VmAction, PlanAction] = {
    VmAction.START: "StartVms",
    VmAction.STOP: "StopVms",
    VmAction.REBOOT: "RebootVms",
    VmAction.RESET: "ResetVms",
    VmAction.PAUSE: "PauseVms",
    VmAction.RESUME: "ResumeVms",
    VmAction.FREEZE: "FreezeVms",
    VmAction.THAW: "ThawVms",
}


def _on_hosts(action: PlanAction, context: Context) -> StepEnd:
    more, patience_s = _terms(action, context.claimed.input)
    items = [item for item in context.items() if item.state is ItemState.RUNNING]
    targets = {item.vm_id: item.host for item in items if item.host is not None}

    def record(conn: Connection, outcomes: Sequence[Outcome]) -> None:
        answers = [outcome.result for outcome in outcomes if outcome.problem is None and outcome.result]
        record_observed(conn, answers, context.ports.now())
        store.change_items(conn, context.operation_id, [_change(outcome) for outcome in outcomes])

    if targets:
        carry(context, Call(action, targets, {i.vm_id: i.name for i in items}, by_ids(**more), record, patience_s))
    return StepEnd()


def _terms(action: PlanAction, kept: Any) -> tuple[dict[str, Any], float]:
    """What the method takes beside the VMs, and how long it may wait for guests."""
    if action == "FreezeVms":
        return FreezeInput.model_validate(kept).model_dump(), 0.0
    if not kept:
        return {}, 0.0
    asked = GuestInput.model_validate(kept)
    return asked.model_dump(), asked.timeout_s


def _change(outcome: Outcome) -> ItemChange:
    return ItemChange(
        outcome.vm_id,
        ItemState.FAILED if outcome.problem else ItemState.SUCCEEDED,
        outcome.problem,
        stage_ms={stage.value: ms for stage, ms in outcome.result.stage_ms.items()} if outcome.result else None,
    )


def undo_accept(context: Context) -> StepEnd:
    problem = context.reason or cancelled(context.operation_id).problem()
    unfinished = [i for i in context.items() if i.state in (ItemState.PENDING, ItemState.RUNNING)]
    changes = [ItemChange(item.vm_id, ItemState.FAILED, item.problem or problem) for item in unfinished]
    return StepEnd(lambda conn: store.change_items(conn, context.operation_id, changes))


def _kind(action: VmAction) -> Kind:
    do = partial(_on_hosts, _METHODS[action])
    steps = (Step("accept", done_on_accept, undo_accept), Step(action.value, do, NoUndo(_WHY_NO_UNDO)))
    return Kind(f"vm.{action.value}", steps, by_items)


KINDS: dict[VmAction, Kind] = {action: _kind(action) for action in _METHODS}
