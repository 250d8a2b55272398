# SPDX-License-Identifier: Apache-2.0
"""Tables of operations: their steps, and the VMs that each is about."""

from __future__ import annotations

from sqlalchemy import JSON, BigInteger, Boolean, Column, ForeignKey, Index, Integer, String, Table, Text, Uuid, text

from ppec_orchestrator.store.tables.schema import UtcTime, metadata

operation = Table(
    "operation",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("kind", String(32), nullable=False),
    Column("state", String(16), nullable=False),
    Column("priority", Integer, nullable=False, default=0),
    Column("created_by", String(128), nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("started_at", UtcTime),
    Column("ended_at", UtcTime),
    # What was asked, as the kind's own model.
    Column("input", JSON, nullable=False),
    Column("problem", JSON),
    Column("counters", JSON, nullable=False),
    Column("cancel_requested", Boolean, nullable=False, default=False),
    # The owner's lease; the fence grows with every claim and travels to the agents.
    Column("owner", String(64)),
    Column("lease_until", UtcTime),
    Column("fence", BigInteger, nullable=False, default=0),
    # The plan that it carries out as it was shown, and who had approved it. The plan itself is gone by then.
    Column("plan_id", String(64)),
    Column("approved_by", String(128)),
    Index(
        "ix_operation_open",
        "priority",
        "created_at",
        sqlite_where=text("state IN ('queued', 'running')"),
        postgresql_where=text("state IN ('queued', 'running')"),
    ),
    Index("ix_operation_created", "created_at"),
)

step = Table(
    "step",
    metadata,
    Column("operation_id", ForeignKey("operation.id", ondelete="CASCADE"), primary_key=True),
    Column("ordinal", Integer, primary_key=True),
    Column("name", String(48), nullable=False),
    Column("state", String(16), nullable=False),
    Column("started_at", UtcTime),
    Column("ended_at", UtcTime),
    # The check-point: what the step needs to be continued or undone.
    Column("data", JSON, nullable=False),
    Column("detail", Text, nullable=False, default=""),
)

operation_item = Table(
    "operation_item",
    metadata,
    Column("operation_id", ForeignKey("operation.id", ondelete="CASCADE"), primary_key=True),
    Column("vm_id", Uuid, primary_key=True),
    Column("position", Integer, nullable=False),
    Column("name", String(63), nullable=False),
    Column("state", String(16), nullable=False),
    Column("host", String(63)),
    Column("attempt", Integer, nullable=False, default=1),
    # Hosts that failed this VM: a replan leaves them out.
    Column("excluded_hosts", JSON, nullable=False),
    Column("stage", String(16)),
    Column("stage_ms", JSON, nullable=False),
    Column("problem", JSON(none_as_null=True)),
    Index("ix_operation_item_vm", "vm_id"),
)
