# SPDX-License-Identifier: Apache-2.0
"""What a host answers and what it reports are told apart by the host's own order."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("host", sa.Column("report_tick", sa.BigInteger(), nullable=True))
    op.add_column("allocation", sa.Column("seen_started_at_unix_ms", sa.BigInteger(), nullable=True))
    op.add_column("allocation", sa.Column("seen_tick", sa.BigInteger(), nullable=True))
