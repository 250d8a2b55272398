# SPDX-License-Identifier: Apache-2.0
"""`vm.resize`: a VM gets another size on the host where it is.

accept    do: by the accepting transaction, which takes     undo: the room goes back, unless a host was asked: then it
          the room for both sizes                                 is kept until the host says what the VM has
resize    do: one run; the record becomes what the host     undo: none, on purpose: a guest is not switched again
          says that the VM has and will have

A refusal changes nothing and gives the room back at once. A failure that says what the VM is now, which is what a host
does that has taken a resize back, settles it as well. Any other may have come after the deed: both sizes' room stays,
until the host's next report, or its next answer about the VM, says what it has (`store/sizes.py`). A host reports anew
after each answer, also after one that was lost; that this one is not asked again is because it was, several times: by
the module, and by a run that is repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import Connection

from ppec_contract.agent import VmSize
from ppec_contract.api_operations import ItemState
from ppec_orchestrator.operations.context import Context, cancelled
from ppec_orchestrator.operations.hosts import Call, Outcome, carry
from ppec_orchestrator.operations.outcomes import may_have_left_something
from ppec_orchestrator.operations.steps import Kind, NoUndo, Step, StepEnd, done_on_accept
from ppec_orchestrator.operations.verdicts import by_items
from ppec_orchestrator.operations.wanted import ResizeInput
from ppec_orchestrator.store import operations as store
from ppec_orchestrator.store import sizes
from ppec_orchestrator.store.observations import record_observed
from ppec_orchestrator.store.operations import RESIZE_STEP, ItemChange

NAME = store.RESIZE
# With these, too, a host says that it has changed nothing.
_REFUSED = frozenset({"vm.wrong_state", "vm.not_found"})


def resize_on_host(context: Context) -> StepEnd:
    asked = ResizeInput.model_validate(context.claimed.input)
    items = [item for item in context.items() if item.state is ItemState.RUNNING]
    targets = {item.vm_id: item.host for item in items if item.host is not None}

    def sizes_of(ids: Sequence[UUID]) -> list[dict[str, object]]:
        return [VmSize(vm_id=vm_id, **asked.size.model_dump()).model_dump(mode="json") for vm_id in ids]

    def record(conn: Connection, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            _record(conn, context, asked, outcome)

    if targets:
        carry(
            context,
            Call(
                "ResizeVms",
                targets,
                {item.vm_id: item.name for item in items},
                lambda conn, hosts: {
                    host: {"sizes": sizes_of(ids), "timeout_s": asked.timeout_s} for host, ids in hosts.items()
                },
                record,
                asked.timeout_s,
            ),
        )
    return StepEnd()


def _record(conn: Connection, context: Context, asked: ResizeInput, outcome: Outcome) -> None:
    result = outcome.result
    if outcome.problem is not None:
        if outcome.problem.code in _REFUSED or not may_have_left_something(outcome.problem):
            sizes.take_back(conn, outcome.vm_id, asked.held)
        elif result is not None and result.vm is not None and result.vm.vm_id == outcome.vm_id:
            record_observed(conn, [result], context.ports.now())
    elif result is not None and result.vm is not None:
        # A later report knows no other size, as nobody else changes it meanwhile: whether it came first is no matter.
        sizes.follow(conn, {outcome.vm_id: result.vm})
        record_observed(conn, [result], context.ports.now())
        if result.resized is not None:
            told = {str(outcome.vm_id): result.resized.model_dump(mode="json")}
            store.keep_data(conn, context.operation_id, RESIZE_STEP, told)
    stage_ms = {stage.value: ms for stage, ms in result.stage_ms.items()} if result else None
    state = ItemState.FAILED if outcome.problem else ItemState.SUCCEEDED
    store.change_items(
        conn, context.operation_id, [ItemChange(outcome.vm_id, state, outcome.problem, stage_ms=stage_ms)]
    )


def undo_accept(context: Context) -> StepEnd:
    asked = ResizeInput.model_validate(context.claimed.input)
    problem = context.reason or cancelled(context.operation_id).problem()
    was_asked = context.journal.counters.get("runs", 0) > 0
    unfinished = [i for i in context.items() if i.state in (ItemState.PENDING, ItemState.RUNNING)]

    def writes(conn: Connection) -> None:
        for item in unfinished:
            if not was_asked:
                sizes.take_back(conn, item.vm_id, asked.held)
        changes = [ItemChange(item.vm_id, ItemState.FAILED, item.problem or problem) for item in unfinished]
        store.change_items(conn, context.operation_id, changes)

    return StepEnd(writes)


KIND = Kind(
    NAME,
    (
        Step("accept", done_on_accept, undo_accept),
        Step(RESIZE_STEP, resize_on_host, NoUndo("a guest is not switched again for what came after")),
    ),
    by_items,
)
