# SPDX-License-Identifier: Apache-2.0
"""What hosts say of their health, and an event for each change of a check's level."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from ppec_orchestrator.store.tables import UtcTime

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("host", sa.Column("health", sa.JSON(), nullable=True))
    op.create_table(
        "host_event",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("host_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("at", UtcTime(), nullable=False),
        sa.Column("check", sa.String(length=256), nullable=False),
        sa.Column("before", sa.String(length=16), nullable=True),
        sa.Column("after", sa.String(length=16), nullable=False),
        sa.Column("found", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["host_id"], ["host.id"], name=op.f("fk_host_event_host_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_host_event")),
    )
    op.create_index(op.f("ix_host_event_host_id_host_event_id"), "host_event", ["host_id", "id"], unique=False)
