# SPDX-License-Identifier: Apache-2.0
"""NVMe drives are counted by NUMA cell, as cores and memory are."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in ("host_cell", "allocation_cell"):
        op.add_column(table, sa.Column("nvme", sa.Integer(), nullable=False, server_default="0"))
    # In words of its own: SQLite adds a constraint only along with its column, and Alembic only afterwards.
    op.execute(
        "ALTER TABLE host_cell ADD COLUMN nvme_used INTEGER DEFAULT 0 NOT NULL "
        "CONSTRAINT ck_host_cell_nvme_used_not_negative CHECK (nvme_used >= 0)"
    )
