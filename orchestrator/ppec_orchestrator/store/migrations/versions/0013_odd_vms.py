# SPDX-License-Identifier: Apache-2.0
"""VMs that failed, that are being made, or that don't run are found without a look at all others."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

_ODD = sa.text("record <> 'active' OR observed <> 'running'")


def upgrade() -> None:
    op.create_index(
        "ix_vm_odd",
        "vm",
        ["name", "id", "record", "image_id", "flavor", "observed"],
        sqlite_where=_ODD,
        postgresql_where=_ODD,
    )
