# SPDX-License-Identifier: Apache-2.0
"""What a failed attempt may have left on its host: removed at once, or remembered until the host can be reached.

While it is remembered the VM's old addresses stay taken, in the name of the leftover: a copy of the VM may be running
over there, and nobody else may be given its address.
"""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from sqlalchemy import Connection

from ppec_contract.api_operations import ItemState
from ppec_orchestrator.operations.context import Context
from ppec_orchestrator.operations.hosts import Call, by_ids, carry
from ppec_orchestrator.operations.outcomes import may_have_left_something
from ppec_orchestrator.store import ipdb
from ppec_orchestrator.store import operations as store
from ppec_orchestrator.store.operations import CLEANUP, Item, NewItem, NewOperation

CLEANUP_STEPS = ("keep", "cleanup")


@dataclass(frozen=True, slots=True)
class Leftover:
    """A VM that may be on a host where it is not to be."""

    vm_id: UUID
    name: str
    host: str

    @property
    def holder(self) -> UUID:
        """In whose name its addresses stay taken."""
        return uuid.uuid5(self.vm_id, self.host)


def of_items(items: Sequence[Item]) -> list[Leftover]:
    """Of the VMs that were sent to a host, those that may be there."""
    return [
        Leftover(item.vm_id, item.name, item.host)
        for item in items
        if item.host is not None
        and item.state in (ItemState.RUNNING, ItemState.SUCCEEDED)
        and (item.problem is None or may_have_left_something(item.problem))
    ]


def remove(context: Context, leftovers: Sequence[Leftover]) -> list[Leftover]:
    """Deletes them on their hosts, in one run; returns those whose host could not be brought to it."""
    if not leftovers:
        return []
    call = Call(
        "DeleteVms",
        {one.vm_id: one.host for one in leftovers},
        {one.vm_id: one.name for one in leftovers},
        by_ids(),
    )
    failed = {outcome.vm_id for outcome in carry(context, call) if outcome.problem is not None}
    return [one for one in leftovers if one.vm_id in failed]


def remember(context: Context, conn: Connection, leftovers: Sequence[Leftover]) -> None:
    """Enqueues a clean-up per host and keeps the addresses. Call it before the VMs' reservations are released."""
    now = context.ports.now()
    by_host: dict[str, list[Leftover]] = defaultdict(list)
    for one in leftovers:
        by_host[one.host].append(one)
        ipdb.keep(conn, one.vm_id, one.holder, now=now)
    for host, mine in sorted(by_host.items()):
        new = NewOperation(
            operation_id=f"op-{uuid.uuid4().hex}",
            kind=CLEANUP,
            created_by=context.claimed.created_by,
            created_at=now,
            input={"host": host, "after": context.operation_id},
            steps=CLEANUP_STEPS,
            done=1,
            items=[NewItem(one.vm_id, one.name, host) for one in mine],
            not_before=now + timedelta(seconds=context.limits.cleanup_retry_s),
        )
        store.enqueue(conn, [new])
