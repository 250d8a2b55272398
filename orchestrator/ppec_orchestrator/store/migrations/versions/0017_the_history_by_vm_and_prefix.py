# SPDX-License-Identifier: Apache-2.0
"""What befell the addresses of a VM, by its name, or of a prefix, is found without a look at the whole history."""

from __future__ import annotations

from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_address_event_name", "address_event", ["vm", "id"])
    op.create_index("ix_address_event_prefix", "address_event", ["prefix_id", "id"])
