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
from datetime import UTC, datetime
from typing import Any, TypeVar

from sqlalchemy import Connection, Row, Select, Table, and_, or_

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
    return _page(rows, wanted, lambda shown: [view(row) for row in shown], key)


def newest_page(
    conn: Connection, query: Select[Any], wanted: Slice, of: Table, views: Callable[[Sequence[Row[Any]]], Iterable[V]]
) -> Page[V]:
    """The newest first, by the table's `created_at` and `id`, which the query has among its columns. `views` are of all
    rows of the page at once, for what belongs to them is read together."""
    query = query.order_by(of.c.created_at.desc(), of.c.id.desc()).limit(wanted.limit + 1)
    if wanted.after is not None:
        last_at, last = _made_at_and_key(str(wanted.after))
        query = query.where(or_(of.c.created_at < last_at, and_(of.c.created_at == last_at, of.c.id < last)))
    return _page(conn.execute(query).all(), wanted, views, _newest_key)


def _page(
    rows: Sequence[R], wanted: Slice, views: Callable[[Sequence[R]], Iterable[V]], key: Callable[[R], str | int]
) -> Page[V]:
    shown = rows[: wanted.limit]
    more = wanted.cursor(key(shown[-1])) if len(rows) > wanted.limit else None
    return Page[Any](items=tuple(views(shown)), next_cursor=more)


def _newest_key(row: Row[Any]) -> str:
    """With the time, because the row itself may be gone before its list goes on."""
    return f"{row.created_at.isoformat()}/{row.id}"


def _made_at_and_key(after: str) -> tuple[datetime, str]:
    made_at, _, key = after.partition("/")
    try:
        parsed = datetime.fromisoformat(made_at)
        if parsed.tzinfo is None:
            raise bad_cursor()
        # Near the first and the last year a time may have no UTC.
        return parsed.astimezone(UTC), key
    except (ValueError, OverflowError) as error:
        raise bad_cursor() from error
