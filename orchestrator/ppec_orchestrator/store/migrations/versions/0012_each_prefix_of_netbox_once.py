# SPDX-License-Identifier: Apache-2.0
"""A prefix of NetBox's is registered once: of two, each would be given the same addresses."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from ppec_contract.errors import PpecError

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

_NAMED = sa.text("netbox_id IS NOT NULL")
_TWICE = sa.text(
    "SELECT netbox_id FROM prefix WHERE netbox_id IS NOT NULL "
    "GROUP BY netbox_id HAVING COUNT(*) > 1 ORDER BY netbox_id LIMIT 10"
)


def upgrade() -> None:
    twice = op.get_bind().execute(_TWICE).scalars().all()
    if twice:
        raise PpecError(
            "prefix.invalid",
            f"NetBox's prefixes {', '.join(map(str, twice))} are each registered more than once",
            hint="With the version before, delete all but one of each, and the VMs that have their addresses first.",
            subject="database",
        )
    op.create_index(
        "ix_prefix_netbox_id", "prefix", ["netbox_id"], unique=True, sqlite_where=_NAMED, postgresql_where=_NAMED
    )
