# SPDX-License-Identifier: Apache-2.0
"""How a flavor's VMs sit on their hosts and how far they can grow; shared vCPUs and huge pages of each cell."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in ("flavor", "vm"):
        op.add_column(table, sa.Column("max_vcpus", sa.Integer(), nullable=True))
        op.add_column(table, sa.Column("max_memory_mib", sa.Integer(), nullable=True))
        op.add_column(table, sa.Column("numa", sa.JSON(), nullable=False, server_default="{}"))
    _add_count("host_cell", "shared_cpus", sa.Integer())
    for name, kind in (("shared_vcpus", sa.Integer()), ("pages_2m", sa.BigInteger()), ("pages_1g", sa.BigInteger())):
        _add_count("host_cell", name, kind)
        # In words of its own: SQLite adds a constraint only along with its column, and Alembic only afterwards.
        op.execute(
            f"ALTER TABLE host_cell ADD COLUMN {name}_used {kind.compile()} DEFAULT 0 NOT NULL "
            f"CONSTRAINT ck_host_cell_{name}_used_not_negative CHECK ({name}_used >= 0)"
        )
        _add_count("allocation_cell", name, kind)


def _add_count(table: str, name: str, kind: sa.Integer) -> None:
    op.add_column(table, sa.Column(name, kind, nullable=False, server_default="0"))
