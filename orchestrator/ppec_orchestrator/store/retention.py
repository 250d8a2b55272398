# SPDX-License-Identifier: Apache-2.0
"""What is old enough to go: ended operations, idempotency keys, certificates, enrolment tokens and plans that are
over, and the history of addresses.

What goes is chosen in read transactions and deleted in short write transactions. Nothing chosen can come to be needed
in between: what refers to an operation refers to it from the moment it is accepted, or while it is at work.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, Connection, Table, and_, delete, func, literal, or_, select, tuple_

from ppec_orchestrator.store.operations import CLEANUP, OPEN
from ppec_orchestrator.store.tables import (
    address,
    address_event,
    certificate,
    enrolment_token,
    idempotency_key,
    operation,
    operation_item,
    plan,
    vm,
)

# Rows of one write transaction: on SQLite everybody else's writes wait for it.
BATCH_ROWS = 500


@dataclass(frozen=True, slots=True)
class OldOperation:
    """An operation that has ended long ago. `rows` go with it: its items and itself."""

    operation_id: str
    created_at: datetime
    rows: int


def referred_to(conn: Connection, before: datetime) -> frozenset[str]:
    """The operations a VM's row, an open clean-up or a kept idempotency key names.

    Of the keys only those as old as the operations that may go are read: a key is as old as its operation.
    """
    of_vms = conn.execute(select(vm.c.operation_id).distinct()).scalars()
    of_keys = conn.execute(
        select(idempotency_key.c.operation_id).where(idempotency_key.c.created_at < before)
    ).scalars()
    open_ones = conn.execute(
        select(operation.c.input).where(operation.c.state.in_(OPEN), operation.c.kind == CLEANUP)
    ).scalars()
    return frozenset(of_vms) | frozenset(of_keys) | frozenset(str(one.get("after", "")) for one in open_ones)


def old_operations(conn: Connection, before: datetime, after: OldOperation | None) -> list[OldOperation]:
    """Those that ended before this time, the oldest first, from `after` on: a page of `BATCH_ROWS` at most."""
    items = select(func.count()).where(operation_item.c.operation_id == operation.c.id).scalar_subquery()
    statement = (
        select(operation.c.id, operation.c.created_at, items.label("items"))
        # Looked for by creation, which is indexed and comes before the end.
        .where(operation.c.created_at < before, operation.c.ended_at < before, operation.c.state.not_in(OPEN))
        .order_by(operation.c.created_at, operation.c.id)
        .limit(BATCH_ROWS)
    )
    if after is not None:
        later = operation.c.created_at > after.created_at
        same_time = and_(operation.c.created_at == after.created_at, operation.c.id > after.operation_id)
        statement = statement.where(or_(later, same_time))
    return [OldOperation(row.id, row.created_at, row.items + 1) for row in conn.execute(statement)]


def in_batches(old: Sequence[OldOperation], kept: Collection[str]) -> Iterator[list[str]]:
    """The ids of those that may go, as many at a time as have `BATCH_ROWS` rows together, and one at least."""
    batch: list[str] = []
    rows = 0
    for one in old:
        if one.operation_id in kept:
            continue
        if batch and rows + one.rows > BATCH_ROWS:
            yield batch
            batch, rows = [], 0
        batch.append(one.operation_id)
        rows += one.rows
    if batch:
        yield batch


def remove_operations(conn: Connection, operation_ids: Sequence[str]) -> int:
    """With their steps and items. One that is open stays, whatever was asked."""
    gone = delete(operation).where(operation.c.id.in_(operation_ids), operation.c.state.not_in(OPEN))
    return conn.execute(gone).rowcount


@dataclass(frozen=True, slots=True)
class OldRows:
    """The rows of a table that nothing refers to and that are old by this condition."""

    table: Table
    condition: ColumnElement[bool]

    def exist(self, conn: Connection) -> bool:
        """Asked in a read transaction, so that looking commits nothing."""
        return conn.execute(select(literal(1)).where(self.condition).limit(1)).first() is not None

    def remove(self, conn: Connection) -> int:
        """A batch of them."""
        columns = self.table.primary_key.columns
        chosen = select(*columns).where(self.condition).limit(BATCH_ROWS)
        return conn.execute(delete(self.table).where(tuple_(*columns).in_(chosen))).rowcount


def old_keys(before: datetime) -> OldRows:
    """Idempotency keys made before this time."""
    return OldRows(idempotency_key, idempotency_key.c.created_at < before)


def old_certificates(before: datetime) -> OldRows:
    """Certificates that were over before this time."""
    return OldRows(certificate, certificate.c.not_after < before)


def old_address_events(before: datetime) -> OldRows:
    """What befell addresses before this time, but for those that VMs have: of these it is told since when."""
    still = select(literal(1)).where(
        address.c.vm_id == address_event.c.vm_id,
        address.c.prefix_id == address_event.c.prefix_id,
        address.c.address_hex == address_event.c.address_hex,
    )
    return OldRows(address_event, and_(address_event.c.at < before, ~still.exists()))


def old_enrolment_tokens(before: datetime) -> OldRows:
    """Tokens that were used, or had expired, before this time.

    Whether one is unknown, used or expired, it is refused in the same words. That the host enrolled stays written in
    its record (`enrolled_at`), in its certificate's row and in the audit line of the enrolment.
    """
    over = or_(enrolment_token.c.used_at < before, enrolment_token.c.expires_at < before)
    return OldRows(enrolment_token, over)


def old_plans(before: datetime) -> OldRows:
    """Plans that had expired before this time. They hold what was asked, with user data, which may hold secrets."""
    return OldRows(plan, plan.c.expires_at < before)
