# SPDX-License-Identifier: Apache-2.0
"""The table of settings."""

from __future__ import annotations

from sqlalchemy import JSON, Column, String, Table

from ppec_orchestrator.store.tables.schema import metadata

# Limits and intervals that may change at run time.
setting = Table(
    "setting",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("value", JSON, nullable=False),
)
