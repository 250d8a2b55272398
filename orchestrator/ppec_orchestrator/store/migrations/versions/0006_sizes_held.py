# SPDX-License-Identifier: Apache-2.0
"""The other size for which a VM's host keeps room while a resize has not ended."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("vm", sa.Column("held_vcpus", sa.Integer(), nullable=True))
    op.add_column("vm", sa.Column("held_memory_mib", sa.Integer(), nullable=True))
