# SPDX-License-Identifier: Apache-2.0
"""How readers of the fleet find out which hosts changed: every change of a host's row leaves a mark that grows.

A reader remembers the horizon of its last look and next time asks for marks from there on. No committed change is
missed, late ones included:

- PostgreSQL: the mark is the transaction's own id, the horizon the oldest id that was under way when the reader looked.
  Whoever had not committed by then is marked at or above it.
- SQLite has one writer at a time: the mark is one above the highest, and so is the horizon. Marks come again after the
  host with the highest is deleted; deletions are counted (`host_removal`), and a reader that missed one reads anew.

Here alone the two differ.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.expression import FunctionElement


class ChangeMark(FunctionElement[int]):
    """The mark of a change made in this transaction."""

    type = BigInteger()
    inherit_cache = True
    name = "change_mark"


class Horizon(FunctionElement[int]):
    """The lowest mark that a reader may not have seen yet once this transaction's snapshot is behind it."""

    type = BigInteger()
    inherit_cache = True
    name = "horizon"


@compiles(ChangeMark, "postgresql")
def _own_transaction(element: ChangeMark, compiler: Any, **options: Any) -> str:
    return "CAST(CAST(pg_current_xact_id() AS text) AS bigint)"


@compiles(Horizon, "postgresql")
def _oldest_under_way(element: Horizon, compiler: Any, **options: Any) -> str:
    return "CAST(CAST(pg_snapshot_xmin(pg_current_snapshot()) AS text) AS bigint)"


@compiles(ChangeMark, "sqlite")
@compiles(Horizon, "sqlite")
def _above_the_highest(element: FunctionElement[int], compiler: Any, **options: Any) -> str:
    return "(SELECT coalesce(max(changed), 0) + 1 FROM host)"
