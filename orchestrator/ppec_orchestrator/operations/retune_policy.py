# SPDX-License-Identifier: Apache-2.0
"""The policy "retune after deletes": hosts that lost VMs are asked to open a whole cell again, if the settings say so.

Read and carried out in the transaction that ends the delete: the retunes are in the queue if and only if it has ended.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import structlog
from pydantic import ValidationError
from sqlalchemy import Connection, func, select

from ppec_contract.api_operations import ItemState
from ppec_contract.retune import RetuneBounds
from ppec_orchestrator.audit import audit
from ppec_orchestrator.operations.context import Context
from ppec_orchestrator.operations.limits import PREFIX
from ppec_orchestrator.operations.steps import nobody_told
from ppec_orchestrator.operations.wanted import RetuneInput
from ppec_orchestrator.store import operations as store
from ppec_orchestrator.store.operations import RETUNE, RETUNE_STEPS, NewOperation
from ppec_orchestrator.store.tables import host, host_cell, operation, setting

_log = structlog.get_logger(__name__)
SWITCH = "retune_after_deletes"
# The bounds, by the name of their setting.
BOUNDS = {"retune_max_moves": "moves", "retune_max_memory_mib": "memory_mib"}
REQUESTER = "policy"
# After everything that somebody waits for.
_PRIORITY = -100


def after_deletes(context: Context, conn: Connection) -> Callable[[], None]:
    """Enqueues a retune per live host that the delete took VMs from; returns what tells of them once committed."""
    if not _switched_on(conn):
        return nobody_told
    lost = {item.host for item in store.items_of(conn, context.operation_id) if item.state is ItemState.SUCCEEDED}
    bounds = _bounds(store.settings_of(conn, PREFIX))
    enqueued: dict[str, str] = {}
    for name in _worth_it(context, conn, sorted(one for one in lost if one is not None)):
        kept = RetuneInput(host=name, bounds=bounds).model_dump(mode="json")
        new = NewOperation(
            operation_id=f"op-{uuid.uuid4().hex}",
            kind=RETUNE,
            created_by=REQUESTER,
            created_at=context.ports.now(),
            input=kept,
            steps=RETUNE_STEPS,
            items=(),
            done=1,
            priority=_PRIORITY,
        )
        store.enqueue(conn, [new])
        store.keep_data(conn, new.operation_id, RETUNE_STEPS[0], {"after": context.operation_id})
        enqueued[name] = new.operation_id
    if enqueued:
        context.ports.database.notify(store.WORK, within=conn)
    return lambda: _tell(enqueued)


def nobody_asked(conn: Connection, operation_id: str) -> bool:
    """Whether this retune is the policy's. Its requester's name alone says nothing: a token may have the same."""
    return "after" in store.data_of(conn, operation_id, RETUNE_STEPS[0])


def _switched_on(conn: Connection) -> bool:
    """The row stays locked till the delete has ended: of two that end at once, the later one sees the other's retunes.

    No other row would do. Hosts and VMs are locked in an order that the delete's own writes have begun already.
    """
    row = conn.execute(select(setting.c.value).where(setting.c.name == PREFIX + SWITCH).with_for_update()).first()
    value = False if row is None else row.value
    if not isinstance(value, bool):
        _unusable(SWITCH, "true or false", value)
    return value is True


def _bounds(values: Mapping[str, Any]) -> RetuneBounds:
    """One that is no number of its kind is left at its default and logged, as limits are."""
    bounds: dict[str, Any] = {}
    for name, field in BOUNDS.items():
        if name not in values:
            continue
        try:
            RetuneBounds.model_validate({field: values[name]})
        except ValidationError as error:
            _unusable(name, error.errors()[0]["msg"], values[name])
            continue
        bounds[field] = values[name]
    return RetuneBounds(**bounds)


def _unusable(name: str, wanted: str, found: Any) -> None:
    _log.error("setting.unusable", setting=PREFIX + name, wanted=wanted, found=found)


def _worth_it(context: Context, conn: Connection, names: Sequence[str]) -> list[str]:
    """Hosts that are live and to take VMs, have more than one cell, and are not being retuned or about to be."""
    if not names:
        return []
    cells = select(func.count()).select_from(host_cell).where(host_cell.c.host_id == host.c.id).scalar_subquery()
    query = select(host.c.name).where(
        host.c.name.in_(names),
        host.c.enrolled_at.is_not(None),
        host.c.last_seen_at >= context.ports.planning.alive_since(),
        host.c.draining.is_(False),
        cells > 1,
    )
    fit = sorted(conn.execute(query.order_by(host.c.name)).scalars())
    query_open = select(operation.c.input).where(operation.c.kind == RETUNE, operation.c.state.in_(store.OPEN))
    busy = {asked["host"] for asked in conn.execute(query_open).scalars() if not asked["plan_only"]}
    return [name for name in fit if name not in busy]


def _tell(enqueued: Mapping[str, str]) -> None:
    for name, operation_id in enqueued.items():
        audit(REQUESTER, "retune_host", name, "done", operation=operation_id)
