# SPDX-License-Identifier: Apache-2.0
"""Pages by key, not by offset: a page costs the same wherever it starts, and nothing is skipped or shown twice."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ppec_contract.api import Page
from ppec_contract.errors import PpecError

MAX_LIMIT = 500
DEFAULT_LIMIT = 100
R = TypeVar("R")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Slice:
    """What a caller asked for: up to `limit` items after the one `after` names (None: from the start)."""

    limit: int = DEFAULT_LIMIT
    after: str | int | None = None


def encode_cursor(key: str | int) -> str:
    return base64.urlsafe_b64encode(json.dumps(key).encode()).decode("ascii").rstrip("=")


def decode_cursor(cursor: str | None, kind: type[str] | type[int]) -> str | int | None:
    """The key within a cursor of ours; anything else is `request.invalid`."""
    if cursor is None:
        return None
    try:
        padded = cursor.encode("ascii") + b"=" * (-len(cursor) % 4)
        key = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
    except (ValueError, binascii.Error, RecursionError) as error:
        raise _bad_cursor() from error
    bounded = isinstance(key, str) or (isinstance(key, int) and -(2**63) <= key < 2**63)
    if not isinstance(key, kind) or isinstance(key, bool) or not bounded or "\x00" in str(key):
        raise _bad_cursor()
    return key


def _bad_cursor() -> PpecError:
    return PpecError(
        "request.invalid",
        "cursor: it is not one that this list answered",
        hint="Pass next_cursor of the page before, unchanged.",
        subject="cursor",
    )


def page_of(rows: Sequence[R], limit: int, view: Callable[[R], V], key: Callable[[R], str | int]) -> Page[V]:
    """A page of up to `limit` of the rows; one row more than that says that there is a next page."""
    shown = rows[:limit]
    more = encode_cursor(key(shown[-1])) if len(rows) > limit else None
    return Page[Any](items=tuple(view(row) for row in shown), next_cursor=more)
