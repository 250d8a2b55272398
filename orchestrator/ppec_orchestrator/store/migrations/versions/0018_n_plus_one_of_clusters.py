# SPDX-License-Identifier: Apache-2.0
"""A cluster may have a rule about N+1 that holds for all requests."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("cluster", sa.Column("n_plus_one", sa.JSON(), nullable=False, server_default="{}"))
