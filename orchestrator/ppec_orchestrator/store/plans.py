# SPDX-License-Identifier: Apache-2.0
"""Plans that were shown and not carried out: kept under their hash until they are executed or expire."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, delete, insert, select

from ppec_contract.errors import PpecError
from ppec_orchestrator.store.tables import host, plan

# Kept in all; the oldest make room.
MOST_PLANS = 1000


@dataclass(frozen=True, slots=True)
class StoredPlan:
    """`asked` is the request as it came, `input` what it meant, `places` what the planner answered (all as JSON);
    `generations` are those of the hosts that it stands on, by id."""

    plan_id: str
    created_by: str
    created_at: datetime
    expires_at: datetime
    asked: Mapping[str, Any]
    input: Mapping[str, Any]
    places: Mapping[str, Any]
    generations: Mapping[int, int]


def keep(conn: Connection, one: StoredPlan) -> None:
    """The same plan made again is kept anew."""
    conn.execute(delete(plan).where(plan.c.id == one.plan_id))
    conn.execute(delete(plan).where(plan.c.expires_at <= one.created_at))
    surplus = select(plan.c.id).order_by(plan.c.created_at.desc(), plan.c.id).offset(MOST_PLANS - 1)
    conn.execute(delete(plan).where(plan.c.id.in_(conn.execute(surplus).scalars().all())))
    conn.execute(
        insert(plan).values(
            id=one.plan_id,
            created_by=one.created_by,
            created_at=one.created_at,
            expires_at=one.expires_at,
            asked=dict(one.asked),
            input=dict(one.input),
            places=dict(one.places),
            generations={str(host_id): generation for host_id, generation in one.generations.items()},
        )
    )


def load(conn: Connection, plan_id: str, now: datetime) -> StoredPlan:
    """Raises `plan.not_found`, also of one that has expired."""
    row = conn.execute(select(plan).where(plan.c.id == plan_id)).first()
    if row is None or row.expires_at <= now:
        raise PpecError(
            "plan.not_found",
            f"there is no plan {plan_id}"
            if row is None
            else f"plan {plan_id} expired at {row.expires_at:%Y-%m-%d %H:%M:%S} UTC",
            hint="Plan again.",
            subject=f"plan {plan_id}",
        )
    generations = {int(host_id): generation for host_id, generation in row.generations.items()}
    return StoredPlan(
        row.id, row.created_by, row.created_at, row.expires_at, row.asked, row.input, row.places, generations
    )


def use(conn: Connection, one: StoredPlan) -> None:
    """It is being carried out, and can't be again. Raises `plan.outdated` if a host it stands on has changed since, and
    `plan.not_found` if it was used meanwhile; its hosts are locked until the transaction ends."""
    ids = sorted(one.generations)
    rows = conn.execute(
        select(host.c.id, host.c.name, host.c.generation)
        .where(host.c.id.in_(ids))
        .order_by(host.c.id)
        .with_for_update()
    ).all()
    moved = [row.name for row in rows if row.generation != one.generations[row.id]]
    if moved or len(rows) != len(ids):
        shown = ", ".join(moved[:5]) + (" …" if len(moved) > 5 else "")
        raise PpecError(
            "plan.outdated",
            f"the fleet has moved on since plan {one.plan_id} was made"
            + (f": {shown} changed" if moved else ": hosts it stands on are gone"),
            hint="Plan again.",
            subject=f"plan {one.plan_id}",
            details={"hosts": moved[:20], "count": len(moved)},
        )
    if conn.execute(delete(plan).where(plan.c.id == one.plan_id)).rowcount != 1:
        raise PpecError(
            "plan.not_found", f"plan {one.plan_id} was used just now", hint="Plan again.", subject=f"plan {one.plan_id}"
        )
