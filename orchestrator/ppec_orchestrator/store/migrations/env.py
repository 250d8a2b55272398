# SPDX-License-Identifier: Apache-2.0
"""Alembic's entry point. The connection comes from `upgrade.py` with its transaction already begun."""

from __future__ import annotations

from typing import Any, Literal

from alembic import context

from ppec_orchestrator.store.tables import UtcTime, metadata


def _render(kind: str, value: Any, _context: Any) -> str | Literal[False]:
    # A revision must not change when the tables do: it names plain types only.
    return "sa.DateTime(timezone=True)" if kind == "type" and isinstance(value, UtcTime) else False


context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_item=_render,
)
context.run_migrations()
