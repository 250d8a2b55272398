# SPDX-License-Identifier: Apache-2.0
"""Idempotency keys: a caller's request sent twice gets one operation, and the same answer both times."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, insert, select

from ppec_contract.errors import PpecError
from ppec_orchestrator.store.tables import idempotency_key


@dataclass(frozen=True, slots=True)
class RequestKey:
    """`sha256` is of the request itself: a key is good for one request only."""

    caller: str
    key: str
    sha256: str


def earlier(conn: Connection, request: RequestKey) -> str | None:
    """The operation the same request has made before. Raises `request.idempotency_mismatch` for another request."""
    row = conn.execute(
        select(idempotency_key.c.request_sha256, idempotency_key.c.operation_id).where(
            idempotency_key.c.caller == request.caller, idempotency_key.c.key == request.key
        )
    ).first()
    if row is None:
        return None
    if row.request_sha256 != request.sha256:
        raise PpecError(
            "request.idempotency_mismatch",
            f"the idempotency key was used for another request, which made operation {row.operation_id}",
            hint="Take a new key for a new request.",
            subject="header Idempotency-Key",
            details={"operation_id": row.operation_id},
        )
    return str(row.operation_id)


def remember(conn: Connection, request: RequestKey, operation_id: str, now: datetime) -> None:
    """Raises IntegrityError when the same request is just being accepted by somebody else: look again."""
    conn.execute(
        insert(idempotency_key).values(
            caller=request.caller,
            key=request.key,
            request_sha256=request.sha256,
            operation_id=operation_id,
            created_at=now,
        )
    )
