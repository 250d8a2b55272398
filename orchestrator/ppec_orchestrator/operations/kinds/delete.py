# SPDX-License-Identifier: Apache-2.0
"""`vm.delete`: VMs off their hosts, then out of the record.

    mark      do: by the accepting transaction        undo: the VMs still there are active (or failed) again
    delete    do: one run for all hosts; what is      undo: none, on purpose: a deleted disk can't be brought back
              gone is released host by host

A VM that holds nothing anywhere (a failed create) is only a row, and goes without a run. With the end, however it was
reached, the policy may have the hosts retuned that lost VMs (`retune_policy.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection

from ppec_contract.api_operations import ItemState
from ppec_contract.api_vms import VmRecord
from ppec_orchestrator.operations.context import Context, cancelled
from ppec_orchestrator.operations.hosts import Call, Outcome, by_ids, carry
from ppec_orchestrator.operations.retune_policy import after_deletes
from ppec_orchestrator.operations.steps import Kind, NoUndo, Step, StepEnd, done_on_accept
from ppec_orchestrator.operations.verdicts import by_items
from ppec_orchestrator.store import operations as store
from ppec_orchestrator.store import vms
from ppec_orchestrator.store.operations import Item, ItemChange
from ppec_orchestrator.store.reservations import release

NAME = "vm.delete"


def delete_on_hosts(context: Context) -> StepEnd:
    items = [item for item in context.items() if item.state is ItemState.RUNNING and item.problem is None]
    nowhere = [item for item in items if item.host is None]
    somewhere = {item.vm_id: item.host for item in items if item.host is not None}

    def record(conn: Connection, outcomes: Sequence[Outcome]) -> None:
        gone = [outcome.vm_id for outcome in outcomes if outcome.problem is None]
        release(conn, gone, now=context.ports.now)
        vms.forget(conn, gone)
        store.change_items(conn, context.operation_id, [_change(outcome) for outcome in outcomes])

    if somewhere:
        carry(context, Call("DeleteVms", somewhere, {i.vm_id: i.name for i in items}, by_ids(), record))

    def writes(conn: Connection) -> None:
        ids = [item.vm_id for item in nowhere]
        release(conn, ids, now=context.ports.now)
        vms.forget(conn, ids)
        store.change_items(conn, context.operation_id, [ItemChange(i, ItemState.SUCCEEDED) for i in ids])
        _restore(conn, store.items_of(conn, context.operation_id))

    return StepEnd(writes)


def _change(outcome: Outcome) -> ItemChange:
    return ItemChange(
        outcome.vm_id,
        ItemState.FAILED if outcome.problem else ItemState.SUCCEEDED,
        outcome.problem,
        stage_ms={stage.value: ms for stage, ms in outcome.result.stage_ms.items()} if outcome.result else None,
    )


def _restore(conn: Connection, items: Sequence[Item]) -> None:
    """A VM that could not be deleted is what it was before: its delete may be asked for again."""
    left = [item for item in items if item.state is not ItemState.SUCCEEDED]
    vms.set_record(conn, [item.vm_id for item in left if item.host is not None], VmRecord.ACTIVE)
    vms.set_record(conn, [item.vm_id for item in left if item.host is None], VmRecord.FAILED)


def undo_mark(context: Context) -> StepEnd:
    items = context.items()
    problem = context.reason or cancelled(context.operation_id).problem()

    def writes(conn: Connection) -> None:
        _restore(conn, items)
        unfinished = [item for item in items if item.state in (ItemState.PENDING, ItemState.RUNNING)]
        changes = [ItemChange(item.vm_id, ItemState.FAILED, item.problem or problem) for item in unfinished]
        store.change_items(conn, context.operation_id, changes)

    return StepEnd(writes)


KIND = Kind(
    NAME,
    (
        Step("mark", done_on_accept, undo_mark),
        Step("delete", delete_on_hosts, NoUndo("a deleted disk can't be brought back")),
    ),
    by_items,
    at_end=after_deletes,
)
