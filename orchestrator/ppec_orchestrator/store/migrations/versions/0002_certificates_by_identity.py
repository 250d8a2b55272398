# SPDX-License-Identifier: Apache-2.0
"""Certificates are looked up by the identity they were issued to."""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index(op.f("ix_certificate_uri"), "certificate", ["uri"], unique=False)
