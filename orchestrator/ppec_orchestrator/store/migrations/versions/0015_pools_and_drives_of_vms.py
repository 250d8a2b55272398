# SPDX-License-Identifier: Apache-2.0
"""VMs have their disk in a storage pool, if it is asked for, and NVMe drives; pools are counted by host."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "host_pool",
        sa.Column("host_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("size_mib", sa.BigInteger(), nullable=False),
        sa.Column("used_mib", sa.BigInteger(), server_default="0", nullable=False),
        sa.CheckConstraint("used_mib >= 0", name=op.f("ck_host_pool_used_not_negative")),
        sa.ForeignKeyConstraint(["host_id"], ["host.id"], name=op.f("fk_host_pool_host_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("host_id", "name", name=op.f("pk_host_pool")),
        sqlite_with_rowid=False,
    )
    for table in ("flavor", "vm"):
        op.add_column(table, sa.Column("nvme_drives", sa.Integer(), nullable=False, server_default="0"))
    for table in ("vm", "allocation"):
        op.add_column(table, sa.Column("pool", sa.String(length=63), nullable=True))
    chosen = sa.text("pool IS NOT NULL")
    op.create_index("ix_vm_pool", "vm", ["pool", "id"], sqlite_where=chosen, postgresql_where=chosen)
