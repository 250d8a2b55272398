# SPDX-License-Identifier: Apache-2.0
"""Plans can be looked at again and approved; operations know which plan they carry out, and who approved it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from ppec_orchestrator.store.tables import UtcTime

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("plan", sa.Column("shown", sa.JSON(none_as_null=True), nullable=True))
    op.add_column("plan", sa.Column("image", sa.String(length=63), nullable=True))
    op.add_column("plan", sa.Column("first_vm", sa.String(length=63), nullable=True))
    op.add_column("plan", sa.Column("vms", sa.Integer(), nullable=True))
    op.add_column("plan", sa.Column("placed", sa.Integer(), nullable=True))
    op.add_column("plan", sa.Column("approved_by", sa.String(length=128), nullable=True))
    op.add_column("plan", sa.Column("approved_at", UtcTime(), nullable=True))
    op.add_column("operation", sa.Column("plan_id", sa.String(length=64), nullable=True))
    op.add_column("operation", sa.Column("approved_by", sa.String(length=128), nullable=True))
