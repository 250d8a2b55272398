# SPDX-License-Identifier: Apache-2.0
"""Operations, their steps and items: enqueued, check-pointed, ended, read. Who may write to one is in `claims.py`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, bindparam, func, insert, select, update

from ppec_contract.api_operations import ItemState, OperationState
from ppec_contract.errors import PpecError, Problem
from ppec_orchestrator.store.rows import insert_rows
from ppec_orchestrator.store.tables import allocation, host, operation, operation_item, setting, step, vm

# Wakes the engines: something may be claimed. Wakes watchers: the operation named in the payload changed.
WORK = "operations.work"
CHANGED = "operations.changed"
OPEN = (OperationState.QUEUED.value, OperationState.RUNNING.value)
# The kind that removes what a failed attempt left on a host.
CLEANUP = "vm.cleanup"
# The step of a create that has, by host, which VMs wait for others to change cells.
CREATE_STEP = "create"
# The kind that moves VMs within a host, and the name of the step that has its plan.
RETUNE = "host.retune"
PLAN_STEP = "plan"
RETUNE_STEPS = ("accept", PLAN_STEP, "retune")
# The kind that gives VMs another size, and the step that has, by VM, which part of it took effect.
RESIZE = "vm.resize"
RESIZE_STEP = "resize"


@dataclass(frozen=True, slots=True)
class NewItem:
    """One VM of an operation to enqueue. `problem` goes with `refused`."""

    vm_id: UUID
    name: str
    host: str | None
    state: ItemState = ItemState.PENDING
    problem: Problem | None = None


@dataclass(frozen=True, slots=True)
class Origin:
    """The plan that an operation carries out as it was shown, if it does, and who had approved that."""

    plan_id: str | None = None
    approved_by: str | None = None


UNPLANNED = Origin()


@dataclass(frozen=True, slots=True)
class NewOperation:
    """What to enqueue. `done` of the steps are done already, by the transaction that enqueues."""

    operation_id: str
    kind: str
    created_by: str
    created_at: datetime
    input: Mapping[str, Any]
    steps: Sequence[str]
    items: Sequence[NewItem]
    done: int = 0
    priority: int = 0
    counters: Mapping[str, int] = field(default_factory=dict)
    not_before: datetime | None = None
    origin: Origin = UNPLANNED


@dataclass(frozen=True, slots=True)
class Item:
    """One VM of a claimed operation. `problem` on a running item is the outcome of its latest attempt."""

    vm_id: UUID
    name: str
    state: ItemState
    host: str | None
    attempt: int
    excluded_hosts: frozenset[str]
    problem: Problem | None


@dataclass(frozen=True, slots=True)
class StepRow:
    ordinal: int
    name: str
    state: str


def enqueue(conn: Connection, new: Sequence[NewOperation]) -> None:
    """Within the transaction that makes what the operations work on."""
    conn.execute(
        insert(operation),
        [
            {
                "id": one.operation_id,
                "kind": one.kind,
                "state": OperationState.QUEUED.value,
                "priority": one.priority,
                "created_by": one.created_by,
                "created_at": one.created_at,
                "input": dict(one.input),
                "counters": dict(one.counters),
                # Of a queued operation: not to be claimed before.
                "lease_until": one.not_before,
                "plan_id": one.origin.plan_id,
                "approved_by": one.origin.approved_by,
            }
            for one in new
        ],
    )
    insert_rows(conn, step, [_new_step(one, ordinal, name) for one in new for ordinal, name in enumerate(one.steps)])
    items = [_new_item(one.operation_id, at, item) for one in new for at, item in enumerate(one.items)]
    insert_rows(conn, operation_item, items)


def _new_step(new: NewOperation, ordinal: int, name: str) -> dict[str, Any]:
    done = ordinal < new.done
    return {
        "operation_id": new.operation_id,
        "ordinal": ordinal,
        "name": name,
        "state": "done" if done else "pending",
        "started_at": new.created_at if done else None,
        "ended_at": new.created_at if done else None,
        "data": {},
        "detail": "",
    }


def _new_item(operation_id: str, position: int, item: NewItem) -> dict[str, Any]:
    return {
        "operation_id": operation_id,
        "vm_id": item.vm_id,
        "position": position,
        "name": item.name,
        "state": item.state.value,
        "host": item.host,
        "attempt": 1,
        "excluded_hosts": [],
        "stage_ms": {},
        "problem": item.problem.model_dump(mode="json") if item.problem else None,
    }


# --- check-points ----------------------------------------------------------------------------------------------------


def set_step(conn: Connection, operation_id: str, ordinal: int, state: str, now: datetime, *, detail: str = "") -> None:
    values: dict[str, Any] = {"state": state}
    if state == "running":
        values["started_at"] = now
    else:
        values["ended_at"] = now
    if detail:
        values["detail"] = detail
    conn.execute(update(step).where(step.c.operation_id == operation_id, step.c.ordinal == ordinal).values(**values))


def keep_data(conn: Connection, operation_id: str, name: str, data: Mapping[str, Any]) -> None:
    """What a step leaves for those after it, and for who looks."""
    mine = (step.c.operation_id == operation_id, step.c.name == name)
    conn.execute(update(step).where(*mine).values(data=dict(data)))


def add_items(conn: Connection, operation_id: str, items: Sequence[NewItem]) -> None:
    """VMs of which only a step finds out that the operation is about them; once in an operation. Raises what
    `refuse_not_free` raises."""
    refuse_not_free(conn, operation_id, items)
    insert_rows(conn, operation_item, [_new_item(operation_id, at, item) for at, item in enumerate(items)])


def refuse_not_free(conn: Connection, operation_id: str, items: Sequence[NewItem]) -> None:
    """Raises `vm.wrong_state` when another operation is at work on any of the VMs, or when by the record one is on
    another host: a host speaks for its own VMs alone."""
    # Two requests for one VM follow one another, and the second sees the first one's operation.
    ids = [item.vm_id for item in items]
    conn.execute(select(vm.c.id).where(vm.c.id.in_(ids)).order_by(vm.c.id).with_for_update())
    busy = {vm_id: other for vm_id, other in under_way(conn, ids).items() if other != operation_id}
    first = next((item for item in items if item.vm_id in busy), None)
    if first is not None:
        raise PpecError(
            "vm.wrong_state",
            f"vm {first.name} can't be changed now: operation {busy[first.vm_id]} is under way",
            hint="Wait for that operation, then ask again.",
            subject=f"vm {first.name}",
            details={"operation_id": busy[first.vm_id]},
        )
    _refuse_elsewhere(conn, items)


def _refuse_elsewhere(conn: Connection, items: Sequence[NewItem]) -> None:
    placed = select(allocation.c.vm_id, host.c.name).join(host, host.c.id == allocation.c.host_id)
    at = {row.vm_id: row.name for row in conn.execute(placed.where(allocation.c.vm_id.in_([i.vm_id for i in items])))}
    wrong = next((item for item in items if at.get(item.vm_id, item.host) != item.host), None)
    if wrong is not None:
        raise PpecError(
            "vm.wrong_state",
            f"vm {wrong.name} can't be changed on host {wrong.host}: by the record it is on host {at[wrong.vm_id]}",
            hint="Delete what is left of it on the host that should not have it, then ask again.",
            subject=f"vm {wrong.name}",
            details={"host": wrong.host, "placed_on": at[wrong.vm_id]},
        )


def set_problem(conn: Connection, operation_id: str, problem: Problem) -> None:
    """From here on the operation is being undone, whoever claims it."""
    conn.execute(
        update(operation).where(operation.c.id == operation_id).values(problem=problem.model_dump(mode="json"))
    )


def end(
    conn: Connection, operation_id: str, state: OperationState, now: datetime, problem: Problem | None = None
) -> None:
    conn.execute(
        update(operation)
        .where(operation.c.id == operation_id)
        .values(
            state=state.value,
            ended_at=now,
            lease_until=None,
            problem=problem.model_dump(mode="json") if problem else None,
        )
    )


def postpone(conn: Connection, operation_id: str, not_before: datetime, detail: str) -> None:
    """Back into the queue, with everything it has reached so far; `detail` is why."""
    conn.execute(
        update(step).where(step.c.operation_id == operation_id, step.c.state == "running").values(detail=detail)
    )
    conn.execute(
        update(operation)
        .where(operation.c.id == operation_id)
        .values(state=OperationState.QUEUED.value, owner=None, lease_until=not_before)
    )


@dataclass(frozen=True, slots=True)
class ItemChange:
    """A new state of one item; what is None stays as it is, but `problem` is always written."""

    vm_id: UUID
    state: ItemState
    problem: Problem | None = None
    stage: str | None = None
    stage_ms: Mapping[str, int] | None = None


def change_items(conn: Connection, operation_id: str, changes: Sequence[ItemChange]) -> None:
    if not changes:
        return
    statement = (
        update(operation_item)
        .where(operation_item.c.operation_id == operation_id, operation_item.c.vm_id == bindparam("which"))
        .values(
            state=bindparam("new_state"),
            problem=bindparam("new_problem", type_=operation_item.c.problem.type),
            stage=func.coalesce(bindparam("new_stage"), operation_item.c.stage),
            stage_ms=bindparam("new_stage_ms", type_=operation_item.c.stage_ms.type),
        )
    )
    conn.execute(
        statement,
        [
            {
                "which": change.vm_id,
                "new_state": change.state.value,
                "new_problem": change.problem.model_dump(mode="json") if change.problem else None,
                "new_stage": change.stage,
                "new_stage_ms": dict(change.stage_ms or {}),
            }
            for change in changes
        ],
    )


def fail_open_items(conn: Connection, operation_id: str, problem: Problem) -> None:
    """Whatever the items hold: nothing of them is read."""
    conn.execute(
        update(operation_item)
        .where(
            operation_item.c.operation_id == operation_id,
            operation_item.c.state.in_((ItemState.PENDING.value, ItemState.RUNNING.value)),
        )
        .values(state=ItemState.FAILED.value, problem=problem.model_dump(mode="json"))
    )


def move_item(conn: Connection, operation_id: str, item: Item, host: str, excluded: Iterable[str]) -> None:
    """The next attempt of a VM, on another host."""
    conn.execute(
        update(operation_item)
        .where(operation_item.c.operation_id == operation_id, operation_item.c.vm_id == item.vm_id)
        .values(
            state=ItemState.RUNNING.value,
            host=host,
            attempt=item.attempt + 1,
            excluded_hosts=sorted(excluded),
            problem=None,
            stage=None,
            stage_ms={},
        )
    )


# --- reading ---------------------------------------------------------------------------------------------------------


def items_of(conn: Connection, operation_id: str) -> list[Item]:
    rows = conn.execute(
        select(operation_item).where(operation_item.c.operation_id == operation_id).order_by(operation_item.c.position)
    )
    return [_item(row) for row in rows]


def _item(row: Row[Any]) -> Item:
    return Item(
        vm_id=row.vm_id,
        name=row.name,
        state=ItemState(row.state),
        host=row.host,
        attempt=row.attempt,
        excluded_hosts=frozenset(row.excluded_hosts),
        problem=Problem.model_validate(row.problem) if row.problem else None,
    )


def steps_of(conn: Connection, operation_id: str) -> list[StepRow]:
    rows = conn.execute(
        select(step.c.ordinal, step.c.name, step.c.state)
        .where(step.c.operation_id == operation_id)
        .order_by(step.c.ordinal)
    )
    return [StepRow(row.ordinal, row.name, row.state) for row in rows]


def data_of(conn: Connection, operation_id: str, name: str) -> Mapping[str, Any]:
    """What `keep_data` kept, or nothing yet."""
    found = conn.execute(select(step.c.data).where(step.c.operation_id == operation_id, step.c.name == name)).scalar()
    return dict(found or {})


def under_way(conn: Connection, vm_ids: Collection[UUID]) -> dict[UUID, str]:
    """The open operation of each VM that has one; its clean-up on another host doesn't count."""
    if not vm_ids:
        return {}
    rows = conn.execute(
        select(operation_item.c.vm_id, operation.c.id)
        .join(operation, operation.c.id == operation_item.c.operation_id)
        .where(
            operation_item.c.vm_id.in_(list(vm_ids)),
            operation.c.state.in_(OPEN),
            operation.c.kind != CLEANUP,
        )
    )
    return {row.vm_id: row.id for row in rows}


def request_cancel(conn: Connection, operation_id: str) -> OperationState | None:
    """The state it was in; None when there is no such operation. Only an open one is marked."""
    row = conn.execute(select(operation.c.state).where(operation.c.id == operation_id).with_for_update()).first()
    if row is None:
        return None
    state = OperationState(row.state)
    if not state.ended:
        conn.execute(update(operation).where(operation.c.id == operation_id).values(cancel_requested=True))
    return state


def settings_of(conn: Connection, prefix: str) -> dict[str, Any]:
    """The settings whose names start with `prefix`, by the rest of the name."""
    rows = conn.execute(select(setting).where(setting.c.name.startswith(prefix, autoescape=True)))
    return {row.name.removeprefix(prefix): row.value for row in rows}


_VALUE = select(setting.c.value).where(setting.c.name == bindparam("which"))


def value_of(conn: Connection, name: str) -> Any:
    """Of the setting of this name; None without one."""
    return conn.execute(_VALUE, {"which": name}).scalar()


def change_setting(conn: Connection, name: str, value: Any) -> None:
    changed = conn.execute(update(setting).where(setting.c.name == name).values(value=value))
    if changed.rowcount == 0:
        conn.execute(insert(setting).values(name=name, value=value))
