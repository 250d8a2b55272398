# SPDX-License-Identifier: Apache-2.0
"""Plans that were shown and not carried out: kept under their hash, and approved, until they are executed or expire."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, delete, select, update
from sqlalchemy.dialects import postgresql, sqlite

from ppec_contract.errors import PpecError
from ppec_orchestrator.placement.request import Spare
from ppec_orchestrator.store.tables import host, image, plan

# Kept of one maker and not approved; the oldest make room. Whoever plans a lot takes nobody else's plans away.
MOST_PLANS = 200
# Of a whole hash; and of those that begin alike so many are told.
HASH_DIGITS = 64
_MOST_TOLD = 5


@dataclass(frozen=True, slots=True)
class StoredPlan:
    """`asked` is the request as it came, `input` what it meant, `places` what the planner answered, `shown` the view of
    that (all as JSON); `generations` are those of the hosts that it stands on, by id."""

    plan_id: str
    created_by: str
    created_at: datetime
    expires_at: datetime
    asked: Mapping[str, Any]
    input: Mapping[str, Any]
    places: Mapping[str, Any]
    generations: Mapping[int, int]
    shown: Mapping[str, Any] | None = None
    approved_by: str | None = None
    approved_at: datetime | None = None


def keep(conn: Connection, one: StoredPlan) -> StoredPlan:
    """What is kept under its hash from now on. The same plan made again is kept anew, also when it is just being made
    twice; once approved it stays as it is, and an approval is not made longer so. Places at least one VM: others can't
    be executed."""
    conn.execute(delete(plan).where(plan.c.expires_at <= one.created_at))
    _make_room(conn, one)
    placed, refused = len(one.places["placed"]), len(one.places["refused"])
    row = {
        "created_by": one.created_by,
        "created_at": one.created_at,
        "expires_at": one.expires_at,
        "asked": dict(one.asked),
        "input": dict(one.input),
        "places": dict(one.places),
        "generations": {str(host_id): generation for host_id, generation in one.generations.items()},
        "shown": one.shown,
        "image": one.asked["image"],
        "first_vm": one.places["placed"][0]["name"],
        "vms": placed + refused,
        "placed": placed,
    }
    insert = sqlite.insert if conn.dialect.name == "sqlite" else postgresql.insert
    upsert = insert(plan).values(id=one.plan_id, **row)
    anew = upsert.on_conflict_do_update(index_elements=[plan.c.id], set_=row, where=plan.c.approved_by.is_(None))
    if conn.execute(anew.returning(plan.c.id)).first() is None:
        return load(conn, one.plan_id, one.created_at)
    return one


def _make_room(conn: Connection, one: StoredPlan) -> None:
    waiting = plan.c.approved_by.is_(None)
    others = (plan.c.created_by == one.created_by, plan.c.id != one.plan_id, waiting)
    surplus = select(plan.c.id).where(*others).order_by(plan.c.created_at.desc(), plan.c.id).offset(MOST_PLANS - 1)
    # Any of them may just be approved.
    conn.execute(delete(plan).where(plan.c.id.in_(conn.execute(surplus).scalars().all()), waiting))


def whole_id(conn: Connection, begins: str, now: datetime) -> str:
    """Of the one plan whose hash begins so; what is whole stays as it is, whether or not there is such a plan. Raises
    `plan.not_found` and `plan.ambiguous`: those that have expired don't count."""
    if len(begins) == HASH_DIGITS:
        return begins
    alive = select(plan.c.id).where(plan.c.id.startswith(begins, autoescape=True), plan.c.expires_at > now)
    found = conn.execute(alive.order_by(plan.c.id).limit(_MOST_TOLD + 1)).scalars().all()
    if len(found) == 1:
        return str(found[0])
    if not found:
        raise PpecError(
            "plan.not_found",
            f"there is no plan whose hash begins with {begins}",
            hint="`ppec plans list` shows the plans there are.",
            subject=f"plan {begins}",
        )
    told = ", ".join(found[:_MOST_TOLD]) + (" and others" if len(found) > _MOST_TOLD else "")
    raise PpecError(
        "plan.ambiguous",
        f"the hashes of several plans begin with {begins}: {told}",
        hint="Give more digits of it.",
        subject=f"plan {begins}",
        details={"plans": found[:_MOST_TOLD]},
    )


def load(conn: Connection, plan_id: str, now: datetime) -> StoredPlan:
    """By its whole hash. Raises `plan.not_found`, also of one that has expired."""
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
    return StoredPlan(
        row.id,
        row.created_by,
        row.created_at,
        row.expires_at,
        row.asked,
        row.input,
        row.places,
        {int(host_id): generation for host_id, generation in row.generations.items()},
        row.shown,
        row.approved_by,
        row.approved_at,
    )


def approve(conn: Connection, plan_id: str, approver: str, at: datetime, expires_at: datetime) -> bool:
    """Whether it was not approved before: later ones change nothing."""
    first = update(plan).where(plan.c.id == plan_id, plan.c.approved_by.is_(None))
    return conn.execute(first.values(approved_by=approver, approved_at=at, expires_at=expires_at)).rowcount == 1


def check(conn: Connection, one: StoredPlan, alive_since: datetime, alive_then: datetime) -> None:
    """Raises `plan.outdated` if its image or a host it stands on is not what it was; its hosts are locked until the
    transaction ends. A host is live that was heard since `alive_since`; when the plan was made, since `alive_then`."""
    _check_image(conn, one)
    ids = sorted(one.generations)
    columns = (host.c.id, host.c.name, host.c.generation, host.c.draining, host.c.last_seen_at)
    rows = conn.execute(select(*columns).where(host.c.id.in_(ids)).order_by(host.c.id).with_for_update()).all()
    # An id may be another host's by now: what was planned is known by its name.
    planned = {place["host_id"]: place["host"] for place in one.places["placed"]}
    gone = sorted({planned[host_id] for host_id in planned.keys() - {row.id for row in rows}})
    moved = dict.fromkeys(gone, "is gone")
    counted_on = _counted_on(one)
    for row in rows:
        name, draining = planned.get(row.id, row.name), row.id in planned and row.draining
        silent = row.last_seen_at is None or row.last_seen_at < alive_since
        lived = row.id in planned or (row.last_seen_at is not None and row.last_seen_at >= alive_then)
        if row.name != name:
            moved[name] = "is gone"
        elif draining:
            moved[name] = "is draining"
        elif row.generation != one.generations[row.id]:
            moved[name] = "changed"
        elif silent and lived and (row.id in planned or row.id in counted_on):
            moved[name] = "is silent"
    if moved or len(rows) != len(ids):
        raise outdated(one, moved or {"a host": "is gone"})


def _counted_on(one: StoredPlan) -> Collection[int]:
    """The ids of hosts that N+1 counts on, as far as they were live. An older orchestrator said no more than that the
    request asks for it."""
    asked = one.asked.get("n_plus_one", {}).get("mode") == Spare.REQUIRED
    counted_on: Collection[int] = one.places.get("counted_on", one.generations.keys() if asked else ())
    return counted_on


def use_up(conn: Connection, one: StoredPlan) -> None:
    """It is being carried out, and can't be again. Raises `plan.not_found` if it was used meanwhile."""
    if conn.execute(delete(plan).where(plan.c.id == one.plan_id)).rowcount != 1:
        raise PpecError(
            "plan.not_found", f"plan {one.plan_id} was used just now", hint="Plan again.", subject=f"plan {one.plan_id}"
        )


def outdated(one: StoredPlan, moved: Mapping[str, str]) -> PpecError:
    """`moved` says of each host what became of it."""
    shown = "; ".join(f"{name} {what}" for name, what in list(moved.items())[:5]) + (" …" if len(moved) > 5 else "")
    return PpecError(
        "plan.outdated",
        f"the fleet has moved on since plan {one.plan_id} was made: {shown}",
        hint="Plan again.",
        subject=f"plan {one.plan_id}",
        details={"hosts": list(moved)[:20], "count": len(moved)},
    )


def _check_image(conn: Connection, one: StoredPlan) -> None:
    wanted, name = one.places.get("image_sha256"), one.asked["image"]
    # Not to be deleted before the VMs are there; as lightly as their rows lock it, so that nobody who makes VMs waits.
    row = conn.execute(
        select(image.c.sha256)
        .where(image.c.id == one.places["image_id"], image.c.name == name)
        .with_for_update(read=True, key_share=True)
    ).first()
    if row is None or row.sha256 != wanted:
        raise PpecError(
            "plan.outdated",
            f"image {name} is gone since plan {one.plan_id} was made"
            if row is None
            else f"image {name} is another one than when plan {one.plan_id} was made",
            hint="Plan again.",
            subject=f"plan {one.plan_id}",
            details={"image": name},
        )
