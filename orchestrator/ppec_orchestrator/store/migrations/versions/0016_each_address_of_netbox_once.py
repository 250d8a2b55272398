# SPDX-License-Identifier: Apache-2.0
"""An address of NetBox's has one row: of two, each could be a VM's."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from ppec_contract.errors import PpecError

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None

_NUMBERED = sa.text("external_id IS NOT NULL")
_OF_TWO_VMS = sa.text(
    "SELECT external_id FROM address WHERE external_id IS NOT NULL AND vm_id IS NOT NULL "
    "GROUP BY external_id HAVING COUNT(*) > 1 ORDER BY external_id LIMIT 10"
)
# The one that a VM has stays, else the first.
_SPARE = sa.text(
    "DELETE FROM address WHERE vm_id IS NULL AND external_id IN ("
    "SELECT external_id FROM address WHERE external_id IS NOT NULL GROUP BY external_id HAVING COUNT(*) > 1"
    ") AND EXISTS (SELECT 1 FROM address AS other WHERE other.external_id = address.external_id "
    "AND other.id <> address.id AND (other.vm_id IS NOT NULL OR other.id < address.id))"
)


def upgrade() -> None:
    shared = op.get_bind().execute(_OF_TWO_VMS).scalars().all()
    if shared:
        raise PpecError(
            "prefix.invalid",
            f"NetBox's addresses {', '.join(map(str, shared))} are each those of more than one VM",
            hint="With the version before, delete all VMs but one of each. Their prefixes overlap in NetBox.",
            subject="database",
        )
    op.execute(_SPARE)
    op.create_index(
        "ix_address_external",
        "address",
        ["external_id"],
        unique=True,
        sqlite_where=_NUMBERED,
        postgresql_where=_NUMBERED,
    )
