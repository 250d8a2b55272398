# SPDX-License-Identifier: Apache-2.0
"""Tables of callers: their tokens, and the requests they may repeat."""

from __future__ import annotations

from sqlalchemy import Column, String, Table

from ppec_orchestrator.store.tables.schema import UtcTime, metadata

api_token = Table(
    "api_token",
    metadata,
    Column("name", String(63), primary_key=True),
    Column("sha256", String(64), nullable=False, unique=True),
    Column("role", String(16), nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("expires_at", UtcTime),
)

idempotency_key = Table(
    "idempotency_key",
    metadata,
    Column("caller", String(128), primary_key=True),
    Column("key", String(128), primary_key=True),
    Column("request_sha256", String(64), nullable=False),
    Column("operation_id", String(64), nullable=False),
    Column("created_at", UtcTime, nullable=False),
)
