# SPDX-License-Identifier: Apache-2.0
"""The path and query parameters that many endpoints take."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Path, Query

from ppec_orchestrator.store.paging import DEFAULT_LIMIT, MAX_LIMIT, Slice, decode_cursor

# A name in a path is only looked up, so any short text may be asked for; PostgreSQL has no NUL in texts.
Name = Annotated[str, Path(min_length=1, max_length=128, pattern=r"^[^\x00]+$")]
Limit = Annotated[int, Query(ge=1, le=MAX_LIMIT, description="Items per page.")]
Cursor = Annotated[str | None, Query(max_length=256, description="next_cursor of the page before.")]


def by_name(limit: Limit = DEFAULT_LIMIT, cursor: Cursor = None) -> Slice:
    return Slice(limit, decode_cursor(cursor, str))


def by_id(limit: Limit = DEFAULT_LIMIT, cursor: Cursor = None) -> Slice:
    return Slice(limit, decode_cursor(cursor, int))


ByName = Annotated[Slice, Depends(by_name)]
ById = Annotated[Slice, Depends(by_id)]
Filter = Annotated[str | None, Query(max_length=128, pattern=r"^[^\x00]*$")]
