# SPDX-License-Identifier: Apache-2.0
"""Who owns an operation: claimed under a lease that is renewed, and a fence that every write carries.

Every claim raises the fence. Every later write of an operation starts with `guard`, whose one UPDATE carries owner and
fence: a writer that lost its lease to another changes nothing. That UPDATE also holds the row, so a claim by another
waits for the write under way and sees its outcome.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, and_, bindparam, func, literal, or_, select, text, update

from ppec_contract.api_operations import ItemState, OperationState
from ppec_contract.errors import PpecError, Problem
from ppec_orchestrator.store.operations import OPEN
from ppec_orchestrator.store.tables import UtcTime, operation, operation_item, step

# Any number, the same in every replica: claims follow one another, so that the limit on running ones holds.
_CLAIM_LOCK = 0x7070656F


@dataclass(frozen=True, slots=True)
class Claimant:
    """Who claims, the kinds of operation it knows how to carry out, and the operations it has under way.

    Those it does not claim, though their lease may have ended: when a whole process stood still for a moment, it wakes
    with its work going on, and renews.
    """

    owner: str
    kinds: Collection[str]
    under_way: Collection[str] = ()


@dataclass(frozen=True, slots=True)
class Claim:
    """An operation owned by this process until the lease ends. `problem` set means it is being undone."""

    operation_id: str
    kind: str
    owner: str
    fence: int
    created_by: str
    input: Mapping[str, Any]
    counters: Mapping[str, int]
    cancel_requested: bool
    problem: Problem | None


@dataclass(frozen=True, slots=True)
class Lease:
    """Of an operation that its owner still has: is it to be cancelled, and could its lease be `renewed`?"""

    cancel: bool
    renewed: bool


def claimable(conn: Connection, claimant: Claimant, *, now: datetime, max_running: int) -> bool:
    """Whether a claim may find something; asked in a read transaction so that looking commits nothing, and holds up
    nobody who is about to write."""
    if _running(conn, now) >= max_running:
        return False
    return conn.execute(select(operation.c.id).where(_due(now, claimant)).limit(1)).first() is not None


# Made once: the engine asks it whenever anything was accepted.
_RUNNING = (
    select(func.count())
    .select_from(operation)
    .where(
        operation.c.state == OperationState.RUNNING.value,
        operation.c.lease_until >= bindparam("now", type_=operation.c.lease_until.type),
    )
)


def _running(conn: Connection, now: datetime) -> int:
    """Operations with a living owner."""
    return int(conn.execute(_RUNNING, {"now": now}).scalar_one())


def unknown_kinds(conn: Connection, kinds: Collection[str]) -> frozenset[str]:
    """The kinds of open operations that are none of these: a newer replica's, and left to it."""
    open_ones = select(operation.c.kind).where(operation.c.state.in_(OPEN), operation.c.kind.not_in(list(kinds)))
    return frozenset(conn.execute(open_ones.distinct()).scalars())


def _due(now: datetime, claimant: Claimant) -> Any:
    queued = and_(
        operation.c.state == OperationState.QUEUED.value,
        or_(operation.c.lease_until.is_(None), operation.c.lease_until <= now, operation.c.cancel_requested.is_(True)),
    )
    abandoned = and_(
        operation.c.state == OperationState.RUNNING.value,
        operation.c.lease_until < now,
        operation.c.id.not_in(list(claimant.under_way)),
    )
    return and_(operation.c.kind.in_(list(claimant.kinds)), or_(queued, abandoned))


def claim(conn: Connection, claimant: Claimant, *, now: datetime, lease_s: float, max_running: int) -> Claim | None:
    """The next due operation of a kind known, now owned; its first open step and its pending items are running.

    None when nothing is due or `max_running` operations have a living owner. Cancelled ones come first, then by
    priority and age.
    """
    if conn.dialect.name == "postgresql":
        conn.execute(text("SELECT pg_advisory_xact_lock(:key)").bindparams(key=_CLAIM_LOCK))
    if _running(conn, now) >= max_running:
        return None
    row = conn.execute(
        select(operation)
        .where(_due(now, claimant))
        .order_by(operation.c.cancel_requested.desc(), operation.c.priority.desc(), operation.c.created_at)
        .limit(1)
        .with_for_update(skip_locked=True)
    ).first()
    if row is None:
        return None
    conn.execute(
        update(operation)
        .where(operation.c.id == row.id)
        .values(
            state=OperationState.RUNNING.value,
            owner=claimant.owner,
            fence=operation.c.fence + 1,
            lease_until=now + timedelta(seconds=lease_s),
            started_at=row.started_at or now,
            counters=counted(row.counters, commits=1),
        )
    )
    if row.problem is None and not row.cancel_requested:
        _begin(conn, row.id, now)
    return Claim(
        operation_id=row.id,
        kind=row.kind,
        owner=claimant.owner,
        fence=row.fence + 1,
        created_by=row.created_by,
        input=row.input,
        counters=counted(row.counters, commits=1),
        cancel_requested=row.cancel_requested,
        problem=Problem.model_validate(row.problem) if row.problem else None,
    )


def _begin(conn: Connection, operation_id: str, now: datetime) -> None:
    first = (
        select(func.min(step.c.ordinal))
        .where(step.c.operation_id == operation_id, step.c.state.in_(("pending", "running")))
        .scalar_subquery()
    )
    conn.execute(
        update(step)
        .where(step.c.operation_id == operation_id, step.c.ordinal == first)
        .values(state="running", started_at=func.coalesce(step.c.started_at, literal(now, UtcTime())))
    )
    conn.execute(
        update(operation_item)
        .where(operation_item.c.operation_id == operation_id, operation_item.c.state == ItemState.PENDING.value)
        .values(state=ItemState.RUNNING.value)
    )


def renew(conn: Connection, operation_ids: Collection[str], *, owner: str, until: datetime) -> dict[str, Lease]:
    """Prolongs these leases of `owner`; returns those it still has. One whose row another transaction holds is left as
    it is: waiting for it would put all the others at risk."""
    mine = and_(
        operation.c.id.in_(list(operation_ids)),
        operation.c.owner == owner,
        operation.c.state == OperationState.RUNNING.value,
    )
    free = select(operation.c.id).where(mine).with_for_update(key_share=True, skip_locked=True)
    conn.execute(update(operation).where(operation.c.id.in_(free)).values(lease_until=until))
    rows = conn.execute(select(operation.c.id, operation.c.cancel_requested, operation.c.lease_until).where(mine))
    return {row.id: Lease(row.cancel_requested, renewed=row.lease_until >= until) for row in rows}


def give_up(conn: Connection, *, owner_prefix: str, now: datetime) -> int:
    """Ends the leases of a process that is stopping or known to be dead, so that its work is taken over at once."""
    ended = conn.execute(
        update(operation)
        .where(
            operation.c.state == OperationState.RUNNING.value,
            operation.c.owner.startswith(owner_prefix, autoescape=True),
        )
        .values(lease_until=now - timedelta(seconds=1))
    )
    return ended.rowcount


def counted(counters: Mapping[str, int], **more: int) -> dict[str, int]:
    return {**counters, **{name: counters.get(name, 0) + n for name, n in more.items()}}


def guard(conn: Connection, claimed: Claim, counters: Mapping[str, int]) -> None:
    """First statement of every check-point. Raises `operation.fenced` when the operation belongs to another by now."""
    held = conn.execute(
        update(operation)
        .where(
            operation.c.id == claimed.operation_id,
            operation.c.owner == claimed.owner,
            operation.c.fence == claimed.fence,
            operation.c.state == OperationState.RUNNING.value,
        )
        .values(counters=dict(counters))
    )
    if held.rowcount != 1:
        raise PpecError(
            "operation.fenced",
            f"operation {claimed.operation_id} was taken over from {claimed.owner} (fence {claimed.fence})",
            hint="Nothing is to be done: the new owner carries on.",
            subject=f"operation {claimed.operation_id}",
        )
