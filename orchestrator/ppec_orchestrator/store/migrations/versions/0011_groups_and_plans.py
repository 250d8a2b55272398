# SPDX-License-Identifier: Apache-2.0
"""Groups of VMs that stand apart or together, and plans that are kept until they are executed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from ppec_orchestrator.store.tables import UtcTime

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "vm_group",
        sa.Column("vm_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("apart", sa.Boolean(), nullable=False),
        sa.Column("level", sa.String(length=16), nullable=False),
        sa.Column("hard", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["vm_id"], ["vm.id"], name="fk_vm_group_vm_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("vm_id", "name", name="pk_vm_group"),
    )
    op.create_index("ix_vm_group_name", "vm_group", ["name"])
    op.create_table(
        "plan",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("created_by", sa.String(length=128), nullable=False),
        sa.Column("created_at", UtcTime(), nullable=False),
        sa.Column("expires_at", UtcTime(), nullable=False),
        sa.Column("asked", sa.JSON(), nullable=False),
        sa.Column("input", sa.JSON(), nullable=False),
        sa.Column("places", sa.JSON(), nullable=False),
        sa.Column("generations", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_plan"),
    )
    op.create_index("ix_plan_created_at", "plan", ["created_at"])
