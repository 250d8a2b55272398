# SPDX-License-Identifier: Apache-2.0
"""What every accepted request comes to: an operation in the queue, once, however often the request is sent."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from ppec_contract.errors import PpecError
from ppec_orchestrator.operations.limits import priority
from ppec_orchestrator.operations.registry import KINDS
from ppec_orchestrator.store import idempotency
from ppec_orchestrator.store import operations as store
from ppec_orchestrator.store.clock import Clock
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.faults import is_unique_violation
from ppec_orchestrator.store.idempotency import RequestKey
from ppec_orchestrator.store.operations import UNPLANNED, NewItem, NewOperation, Origin


@dataclass(frozen=True, slots=True)
class Ask:
    """Who asks, and under which idempotency key (None: without one)."""

    caller: str
    key: RequestKey | None = None


@dataclass(frozen=True, slots=True)
class Accepted:
    """An operation about to be enqueued for whoever asked; `kept` is its input."""

    ask: Ask
    operation_id: str
    kind: str
    kept: dict[str, Any]
    items: Sequence[NewItem]
    passes: int = 0
    origin: Origin = UNPLANNED


class Queue:
    def __init__(self, database: Database, now: Clock) -> None:
        self._database = database
        self._now = now

    def earlier(self, conn: Connection, ask: Ask) -> str | None:
        """The operation that the same request has made before. Raises `request.idempotency_mismatch`."""
        return idempotency.earlier(conn, ask.key) if ask.key is not None else None

    def enqueue(self, conn: Connection, accepted: Sequence[Accepted]) -> list[NewOperation]:
        """Within the transaction that makes what the operations work on."""
        now = self._now()
        priorities = {kind: priority(conn, kind) for kind in {one.kind for one in accepted}}
        new = [
            NewOperation(
                operation_id=one.operation_id,
                kind=one.kind,
                created_by=one.ask.caller,
                created_at=now,
                input=one.kept,
                steps=KINDS[one.kind].step_names,
                items=one.items,
                # The first step of each of these is this very transaction.
                done=1,
                priority=priorities[one.kind],
                counters={"commits": 1} | ({"planning_passes": one.passes} if one.passes else {}),
                origin=one.origin,
            )
            for one in accepted
        ]
        store.enqueue(conn, new)
        for one in accepted:
            if one.ask.key is not None:
                idempotency.remember(conn, one.ask.key, one.operation_id, now)
        self._database.notify(store.WORK, within=conn)
        return new

    def once_per_key(self, ask: Ask, accept: Callable[[], NewOperation | str]) -> NewOperation | str:
        """Whatever refuses a request may be its twin's doing, accepted just before: then that is the answer."""
        try:
            return accept()
        except (IntegrityError, PpecError) as error:
            with self._database.read() as conn:
                known = self.earlier(conn, ask)
            if known is not None:
                return known
            if isinstance(error, PpecError):
                raise
            if not is_unique_violation(error):
                raise PpecError(
                    "placement.conflict",
                    "something that the request names was deleted by another one while this was being accepted",
                    hint="Try again: then it is said what.",
                    subject="request",
                ) from error
            raise PpecError(
                "vm.exists",
                "a name was taken by another request while this one was being accepted",
                hint="Choose other names.",
                subject="request",
            ) from error


def new_id() -> str:
    return f"op-{uuid.uuid4().hex}"
