# SPDX-License-Identifier: Apache-2.0
"""Pages by key, not by offset: a page costs the same wherever it starts, and what comes or goes meanwhile makes nothing
else be skipped or shown twice.

A cursor names the last item's key and the list that it belongs to, so that it can't be used with other filters: their
list would begin in its midst, and nobody would see what is missing.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Select, and_, or_

from ppec_contract.api import Page
from ppec_contract.errors import PpecError

MAX_LIMIT = 500
DEFAULT_LIMIT = 100
R = TypeVar("R")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Slice:
    """What a caller asked for: up to `limit` items after the one `after` names (None: from the start). `of` is the
    list's own mark, see `mark_of`."""

    limit: int = DEFAULT_LIMIT
    after: str | int | None = None
    of: str = ""

    def cursor(self, key: str | int) -> str:
        """Of the page after the item with this key."""
        return base64.urlsafe_b64encode(json.dumps([self.of, key]).encode()).decode("ascii").rstrip("=")


@dataclass(frozen=True, slots=True)
class Documents:
    """Each item as its JSON; `last` is the key of the last one if there are more."""

    items: list[bytes]
    last: str | None


def mark_of(path: str, filters: Iterable[tuple[str, str]]) -> str:
    """The same for the same list with the same filters, in whatever order they were given."""
    return hashlib.sha256(json.dumps([path, sorted(filters)]).encode()).hexdigest()[:16]


def decode_cursor(cursor: str | None, kind: type[str] | type[int], of: str = "") -> str | int | None:
    """The key within a cursor of this list; anything else is `request.invalid`."""
    if cursor is None:
        return None
    try:
        padded = cursor.encode("ascii") + b"=" * (-len(cursor) % 4)
        found = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
    except (ValueError, binascii.Error, RecursionError) as error:
        raise bad_cursor() from error
    if not isinstance(found, list) or len(found) != 2 or not isinstance(found[0], str):
        raise bad_cursor()
    mark, key = found
    bounded = isinstance(key, str) or (isinstance(key, int) and -(2**63) <= key < 2**63)
    if not isinstance(key, kind) or isinstance(key, bool) or not bounded or not _storable(str(key)):
        raise bad_cursor()
    if mark != of:
        raise bad_cursor("it belongs to another list, or to other filters")
    return key


def _storable(key: str) -> bool:
    """PostgreSQL has no NUL in texts, and half a surrogate pair, which JSON can spell, has no UTF-8."""
    return not any(c == "\x00" or 0xD800 <= ord(c) <= 0xDFFF for c in key)


def bad_cursor(why: str = "it is not one that this list answered") -> PpecError:
    return PpecError(
        "request.invalid",
        f"cursor: {why}",
        hint="Pass next_cursor of the page before, unchanged, with the same filters.",
        subject="cursor",
    )


def page_of(rows: Sequence[R], wanted: Slice, view: Callable[[R], V], key: Callable[[R], str | int]) -> Page[V]:
    """A page of up to the wanted number of rows; one row more than that says that there is a next page."""
    shown = rows[: wanted.limit]
    more = wanted.cursor(key(shown[-1])) if len(rows) > wanted.limit else None
    return Page[Any](items=tuple(view(row) for row in shown), next_cursor=more)


def newest_first(
    query: Select[Any], wanted: Slice, made_at: ColumnElement[datetime], key: ColumnElement[str]
) -> Select[Any]:
    """The rows of the slice, and one more that says whether there is a next page; `newest_key` is what its cursors
    hold."""
    query = query.order_by(made_at.desc(), key.desc()).limit(wanted.limit + 1)
    if wanted.after is None:
        return query
    last_at, last = _made_at_and_key(str(wanted.after))
    return query.where(or_(made_at < last_at, and_(made_at == last_at, key < last)))


def newest_key(made_at: datetime, key: str) -> str:
    """With the time, because the row itself may be gone before its list goes on."""
    return f"{made_at.isoformat()}/{key}"


def _made_at_and_key(after: str) -> tuple[datetime, str]:
    made_at, _, key = after.partition("/")
    try:
        parsed = datetime.fromisoformat(made_at)
    except ValueError as error:
        raise bad_cursor() from error
    if parsed.tzinfo is None:
        raise bad_cursor()
    return parsed, key
