# SPDX-License-Identifier: Apache-2.0
"""Changes of hosts leave a mark, and removed hosts a row, for those who keep the fleet in memory."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("host", sa.Column("changed", sa.BigInteger(), nullable=False, server_default="0"))
    op.create_index("ix_host_changed", "host", ["changed"])
    op.create_table(
        "host_removal",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("name", sa.String(63), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_host_removal")),
    )
