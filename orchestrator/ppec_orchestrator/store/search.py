# SPDX-License-Identifier: Apache-2.0
"""The text that a search box looks through.

A search finds what contains the words as they were typed, whatever their case. Rows are narrow and lie in the order of
lists. It is by `LIKE`: of `strpos` PostgreSQL's planner has no idea how many rows it leaves, and would always look
through them in that order, which for a text that few have takes twice as long as to find those and sort them. A trigram
index would be quicker on fleets of millions; PostgreSQL has it as an extension only, SQLite in
another shape, and neither finds two letters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sqlalchemy import ColumnElement

# Between parts: nobody can type it, so nothing is found across two of them.
_BETWEEN = "\n"


def search_text(parts: Iterable[str], labels: Mapping[str, str]) -> str:
    pairs = (f"{key}={value}" for key, value in sorted(labels.items()))
    return _BETWEEN.join((*parts, *pairs)).casefold()


def host_text(name: str, address: str, labels: Mapping[str, str]) -> str:
    return search_text((name, address), labels)


def vm_text(name: str, image: str, flavor: str, labels: Mapping[str, str]) -> str:
    """Its host and its addresses come and go: a search asks for them where they are."""
    return search_text((name, image, flavor), labels)


def contains(text: ColumnElement[str], wanted: str) -> ColumnElement[bool]:
    """`text` is as `search_text` makes it."""
    return text.contains(wanted.casefold(), autoescape=True)
