# SPDX-License-Identifier: Apache-2.0
"""The path and query parameters that many endpoints take, and the two ways to answer a list.

A list is answered in pages, or whole as a stream of lines (`Accept: application/x-ndjson`), which neither side ever
holds in memory. A stream is made of many short reads: what happens to the fleet meanwhile makes nothing else be left
out or come twice, and a slow reader holds nothing in the database.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Annotated, Any

from fastapi import Depends, Path, Query, Request
from fastapi.responses import Response, StreamingResponse
from pydantic_core import to_json

from ppec_orchestrator.store.labels import WantedLabel
from ppec_orchestrator.store.paging import DEFAULT_LIMIT, MAX_LIMIT, Documents, Slice, decode_cursor, mark_of

# A name in a path is only looked up, so any short text may be asked for; PostgreSQL has no NUL in texts.
Name = Annotated[str, Path(min_length=1, max_length=128, pattern=r"^[^\x00]+$")]
Limit = Annotated[int, Query(ge=1, le=MAX_LIMIT, description="Items per page.")]
Cursor = Annotated[
    str | None, Query(max_length=512, description="next_cursor of the page before, with the same filters.")
]
LINES = "application/x-ndjson"
# Of a stream: what is read, and sent, at once.
_STREAM_ITEMS = 1000
MAX_LABEL_FILTERS = 8


def _mark(request: Request) -> str:
    given = request.query_params.multi_items()
    return mark_of(request.url.path, [(key, value) for key, value in given if key not in ("limit", "cursor")])


# Asynchronous, because otherwise each request would change threads for it.
async def by_name(request: Request, limit: Limit = DEFAULT_LIMIT, cursor: Cursor = None) -> Slice:
    mark = _mark(request)
    return Slice(limit, decode_cursor(cursor, str, mark), mark)


async def by_id(request: Request, limit: Limit = DEFAULT_LIMIT, cursor: Cursor = None) -> Slice:
    mark = _mark(request)
    return Slice(limit, decode_cursor(cursor, int, mark), mark)


ByName = Annotated[Slice, Depends(by_name)]
ById = Annotated[Slice, Depends(by_id)]
Filter = Annotated[str | None, Query(max_length=128, pattern=r"^[^\x00]*$")]
SearchText = Annotated[
    str | None, Query(max_length=128, pattern=r"^[^\x00-\x1f\x7f]*$", description="Text to look for, in any case.")
]
LabelText = Annotated[str, Query(min_length=1, max_length=321, pattern=r"^[^\x00-\x1f\x7f]+$")]
LabelFilter = Annotated[
    list[LabelText],
    Query(max_length=MAX_LABEL_FILTERS, description="`key` or `key=value`; all that are given."),
]


def wanted_labels(given: list[str]) -> tuple[WantedLabel, ...]:
    return tuple(WantedLabel.parse(text) for text in given)


def wanted_text(given: str | None) -> str | None:
    """Of a search box: spaces around the words mean nothing, and an empty box finds everything."""
    return (given or "").strip() or None


STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {LINES: {"schema": {"type": "string"}}},
        "description": "A page; or, if asked for by `Accept`, the whole list from the cursor on: an item a line.",
    }
}


def listed(request: Request, wanted: Slice, read: Callable[[Slice], Documents]) -> Response:
    """The page, or the stream, of what `read` reads. The first part is read before anything is answered."""
    if not _lines_wanted(request):
        page = read(wanted)
        cursor = None if page.last is None else wanted.cursor(page.last)
        body = b'{"items":[%b],"next_cursor":%b}' % (b",".join(page.items), to_json(cursor))
        return Response(body, media_type="application/json")
    start = replace(wanted, limit=_STREAM_ITEMS)
    return StreamingResponse(_lines(read(start), start, read), media_type=LINES, headers={"Cache-Control": "no-store"})


def _lines_wanted(request: Request) -> bool:
    kinds = ",".join(request.headers.getlist("accept")).split(",")
    return any(kind.partition(";")[0].strip().lower() == LINES for kind in kinds)


def _lines(first: Documents, wanted: Slice, read: Callable[[Slice], Documents]) -> Iterator[bytes]:
    page = first
    while True:
        yield b"\n".join((*page.items, b""))
        if page.last is None:
            return
        page = read(replace(wanted, after=page.last))
