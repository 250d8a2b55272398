# SPDX-License-Identifier: Apache-2.0
"""`vm.cleanup`: what a create left on a host that could not be reached, tried again until the host answers.

    keep      do: by the transaction that enqueues:   undo: free them; who cancels a clean-up says that the
              the leftovers' addresses stay taken           host is gone for good
    cleanup   do: delete on the host, then free       undo: none, on purpose: what is gone was never to be there
              the addresses

A host that is no longer registered has nothing of ours to clean: then only the addresses are freed.
"""

from __future__ import annotations

from sqlalchemy import Connection

from ppec_contract.api_operations import ItemState
from ppec_orchestrator.operations.context import Context, cancelled
from ppec_orchestrator.operations.hosts import Call, by_ids, carry
from ppec_orchestrator.operations.leftovers import CLEANUP_STEPS, Leftover
from ppec_orchestrator.operations.steps import Kind, NoUndo, PostponedError, Step, StepEnd, done_on_accept
from ppec_orchestrator.operations.verdicts import by_items
from ppec_orchestrator.store import ipdb
from ppec_orchestrator.store import operations as store
from ppec_orchestrator.store.operations import CLEANUP, ItemChange

# A host may be away for months: without a bound the power outgrows what a float holds, and the clean-up fails.
_MOST_DOUBLINGS = 16


def _left(context: Context) -> list[Leftover]:
    return [Leftover(i.vm_id, i.name, i.host) for i in context.items() if i.host and i.state is not ItemState.SUCCEEDED]


def clean(context: Context) -> StepEnd:
    left = _left(context)
    call = Call("DeleteVms", {o.vm_id: o.host for o in left}, {o.vm_id: o.name for o in left}, by_ids())
    outcomes = carry(context, call)
    failed = [o for o in outcomes if o.problem is not None and o.problem.code != "host.not_found"]
    if failed:
        tried = context.journal.counters.get("retries", 0)
        context.journal.count(retries=1)
        doubled = 2 ** min(tried, _MOST_DOUBLINGS)
        delay_s = min(context.limits.cleanup_retry_s * doubled, context.limits.cleanup_retry_longest_s)
        why = failed[0].problem.detail if failed[0].problem else ""
        raise PostponedError(delay_s, f"{len(failed)} VMs left on {failed[0].host}: {why}")

    def writes(conn: Connection) -> None:
        ipdb.release(conn, [one.holder for one in left], now=context.ports.now)
        changes = [ItemChange(one.vm_id, ItemState.SUCCEEDED) for one in left]
        store.change_items(conn, context.operation_id, changes)

    return StepEnd(writes)


def undo_keep(context: Context) -> StepEnd:
    left = _left(context)
    reason = context.reason or cancelled(context.operation_id).problem()

    def writes(conn: Connection) -> None:
        ipdb.release(conn, [one.holder for one in left], now=context.ports.now)
        changes = [ItemChange(one.vm_id, ItemState.FAILED, reason) for one in left]
        store.change_items(conn, context.operation_id, changes)

    return StepEnd(writes)


KIND = Kind(
    CLEANUP,
    (
        Step(CLEANUP_STEPS[0], done_on_accept, undo_keep),
        Step(CLEANUP_STEPS[1], clean, NoUndo("what is gone was never to be there")),
    ),
    by_items,
    undo_for_ever=True,
)
