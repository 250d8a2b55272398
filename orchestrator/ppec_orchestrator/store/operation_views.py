# SPDX-License-Identifier: Apache-2.0
"""Operations as the API shows them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, select

from ppec_contract.agent import Resized, Stage
from ppec_contract.api import Page
from ppec_contract.api_operations import (
    ItemState,
    OperationItem,
    OperationState,
    OperationStep,
    OperationView,
    RetuneView,
)
from ppec_contract.api_placement import ExposedView
from ppec_contract.errors import PpecError, Problem
from ppec_orchestrator.store.operations import PLAN_STEP, RESIZE_STEP, RETUNE, NewOperation
from ppec_orchestrator.store.paging import Slice, newest_page
from ppec_orchestrator.store.tables import operation, operation_item, step


@dataclass(frozen=True, slots=True)
class OperationFilter:
    """Which operations to list; None means any."""

    state: OperationState | None = None
    kind: str | None = None


def not_found(operation_id: str) -> PpecError:
    return PpecError(
        "operation.not_found",
        f"there is no operation {operation_id[:80]!r}",
        hint="`ppec operation list` shows the operations there are.",
        subject=f"operation {operation_id[:80]}",
    )


def show(conn: Connection, operation_id: str) -> OperationView:
    """One operation, whole. Raises `operation.not_found`."""
    row = conn.execute(select(operation).where(operation.c.id == operation_id)).first()
    if row is None:
        raise not_found(operation_id)
    return _views(conn, [row])[0]


def page(conn: Connection, wanted: Slice, chosen: OperationFilter) -> Page[OperationView]:
    """The newest first. Items and steps are those of each operation; a page is therefore to be kept short."""
    query = select(operation)
    if chosen.state is not None:
        query = query.where(operation.c.state == chosen.state.value)
    if chosen.kind is not None:
        query = query.where(operation.c.kind == chosen.kind)
    return newest_page(conn, query, wanted, operation, lambda rows: _views(conn, rows))


def _views(conn: Connection, rows: Sequence[Row[Any]]) -> list[OperationView]:
    ids = [row.id for row in rows]
    items: dict[str, list[OperationItem]] = defaultdict(list)
    found = conn.execute(
        select(operation_item).where(operation_item.c.operation_id.in_(ids)).order_by(operation_item.c.position)
    )
    for row in found:
        items[row.operation_id].append(_item(row))
    steps: dict[str, list[OperationStep]] = defaultdict(list)
    planned: dict[str, Mapping[str, Any]] = {}
    for row in conn.execute(select(step).where(step.c.operation_id.in_(ids)).order_by(step.c.ordinal)):
        steps[row.operation_id].append(_step(row))
        if row.name == PLAN_STEP:
            planned[row.operation_id] = row.data
        if row.name == RESIZE_STEP and row.data:
            items[row.operation_id] = [_with_effect(one, row.data) for one in items[row.operation_id]]
    return [
        OperationView(
            operation_id=row.id,
            kind=row.kind,
            state=OperationState(row.state),
            created_by=row.created_by,
            created_at=row.created_at,
            started_at=row.started_at,
            ended_at=row.ended_at,
            cancel_requested=row.cancel_requested,
            items=tuple(items[row.id]),
            steps=tuple(steps[row.id]),
            problem=Problem.model_validate(row.problem) if row.problem else None,
            counters=row.counters,
            retune=_retune(row.kind, row.input, planned.get(row.id, {})),
            exposed=_exposed(row.input),
            plan_id=row.plan_id,
            approved_by=row.approved_by,
        )
        for row in rows
    ]


def _with_effect(one: OperationItem, effects: Mapping[str, Any]) -> OperationItem:
    told = effects.get(str(one.vm_id))
    return one.model_copy(update={"resized": Resized.model_validate(told)}) if told else one


def _retune(kind: str, asked: Mapping[str, Any], planned: Mapping[str, Any]) -> RetuneView | None:
    return RetuneView.model_validate({**asked, **planned}) if kind == RETUNE else None


def _exposed(asked: Mapping[str, Any]) -> tuple[ExposedView, ...]:
    """Of a create; others have no such thing."""
    return tuple(ExposedView.model_validate(each) for each in asked.get("exposed", ()))


def _item(row: Row[Any]) -> OperationItem:
    return OperationItem(
        vm_id=row.vm_id,
        name=row.name,
        state=ItemState(row.state),
        host=row.host,
        attempt=row.attempt,
        stage=Stage(row.stage) if row.stage else None,
        stage_ms={Stage(name): ms for name, ms in row.stage_ms.items()},
        problem=Problem.model_validate(row.problem) if row.problem else None,
    )


def _step(row: Row[Any]) -> OperationStep:
    return OperationStep(
        ordinal=row.ordinal,
        name=row.name,
        state=row.state,
        started_at=row.started_at,
        ended_at=row.ended_at,
        detail=row.detail,
    )


def enqueued(new: NewOperation) -> OperationView:
    """An operation as `show` shows it when the transaction that enqueues it has just committed."""
    return OperationView(
        operation_id=new.operation_id,
        kind=new.kind,
        state=OperationState.QUEUED,
        created_by=new.created_by,
        created_at=new.created_at,
        items=tuple(
            OperationItem(vm_id=item.vm_id, name=item.name, state=item.state, host=item.host, problem=item.problem)
            for item in new.items
        ),
        steps=tuple(_enqueued_step(new, ordinal, name) for ordinal, name in enumerate(new.steps)),
        counters=dict(new.counters),
        retune=_retune(new.kind, new.input, {}),
        exposed=_exposed(new.input),
        plan_id=new.origin.plan_id,
        approved_by=new.origin.approved_by,
    )


def _enqueued_step(new: NewOperation, ordinal: int, name: str) -> OperationStep:
    if ordinal >= new.done:
        return OperationStep(ordinal=ordinal, name=name, state="pending")
    return OperationStep(ordinal=ordinal, name=name, state="done", started_at=new.created_at, ended_at=new.created_at)


def with_stages(view: OperationView, stages: Mapping[UUID, Stage]) -> OperationView:
    """The view with the stages running VMs are in right now."""
    if not stages:
        return view
    items = tuple(
        item.model_copy(update={"stage": stages[item.vm_id]})
        if item.vm_id in stages and item.state is ItemState.RUNNING
        else item
        for item in view.items
    )
    return view.model_copy(update={"items": items})
