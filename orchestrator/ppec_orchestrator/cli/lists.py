# SPDX-License-Identifier: Apache-2.0
"""Lists that may be of a hundred thousand: people are shown the first, programs all, and nobody holds them whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any

import typer

from ppec_orchestrator.cli.resources import Resource, columns_for, show_item
from ppec_orchestrator.cli.session import Session, session_of

Query = Mapping[str, str | list[str] | None]
# `--q` as the API calls it.
Text = Annotated[str | None, typer.Option("-q", "--query", "--q", help="Only what has this text in it, in any case.")]
Labels = Annotated[
    list[str] | None, typer.Option("--label", help="Only with this label: KEY or KEY=VALUE; may repeat.")
]
Architecture = Annotated[str | None, typer.Option(help="Only of this architecture.")]
Region = Annotated[str | None, typer.Option(help="Only in this region.")]
Datacentre = Annotated[str | None, typer.Option(help="Only in this data centre.")]
Cluster = Annotated[str | None, typer.Option(help="Only in this cluster.")]
Rack = Annotated[str | None, typer.Option(help="Only in this rack.")]
Vrf = Annotated[str | None, typer.Option(help="Only of this VRF.")]
Limit = Annotated[int | None, typer.Option(min=1, help="At most so many.  [default: 500; all with --output json]")]
Whole = Annotated[bool, typer.Option("--all", help="All of them.")]
Paged = Annotated[bool, typer.Option("--paged", help="JSON: one page of --limit items, with its next_cursor.")]
Cursor = Annotated[str | None, typer.Option(help="JSON: the page after the one with this next_cursor.")]
# How many people are shown at once; an answer has no more.
_PART = 500


@dataclass(frozen=True, slots=True)
class Part:
    """Which part of a list is wanted."""

    limit: int | None = None
    whole: bool = False
    paged: bool = False
    cursor: str | None = None


def show_list(context: typer.Context, resource: Resource, query: Query, part: Part) -> None:
    session = session_of(context)
    if part.paged or part.cursor is not None:
        _page(session, resource, query, part)
    elif session.output.as_json and part.limit is not None:
        found = session.client.items(resource.path, resource.view_class(), query, part.limit)
        session.output.stream(item.model_dump(mode="json") for item in islice(found, part.limit))
    elif session.output.as_json:
        session.output.stream(session.client.lines(resource.path, query))
    elif part.whole:
        _tables(session, resource, session.client.lines(resource.path, query))
    else:
        _first(session, resource, query, part.limit or _PART)


def _page(session: Session, resource: Resource, query: Query, part: Part) -> None:
    """Of people only the items are shown: a cursor means nothing to them."""
    asked = {**query, "limit": str(min(part.limit or _PART, _PART)), "cursor": part.cursor}
    page = session.client.page(resource.path, resource.view_class(), asked)
    if session.output.as_json:
        session.output.json(page)
    else:
        session.output.items(page.items, columns_for(resource, page.items))


def _first(session: Session, resource: Resource, query: Query, limit: int) -> None:
    found = list(islice(session.client.items(resource.path, resource.view_class(), query, limit + 1), limit + 1))
    session.output.items(found[:limit], columns_for(resource, found[:limit]))
    if len(found) > limit:
        session.output.say(f"these are the first {limit}; -q and the other options narrow them, --all shows them all")


def _tables(session: Session, resource: Resource, found: Iterator[dict[str, Any]]) -> None:
    """A table for each part: the widths of columns are known only when all of a table is."""
    view = resource.view_class()
    for items in _parts(view.model_validate(item) for item in found):
        session.output.items(items, columns_for(resource, items))


def _parts(items: Iterable[Any]) -> Iterator[list[Any]]:
    left = iter(items)
    first = True
    while (part := list(islice(left, _PART))) or first:
        yield part
        first = False


def labels_of(given: list[str] | None) -> dict[str, str]:
    """`KEY=VALUE` each."""
    return {key: value for key, value in label_changes(given or [], removable=False).items() if value is not None}


def label_changes(given: list[str], *, removable: bool = True) -> dict[str, str | None]:
    """`KEY=VALUE` sets a label, `KEY-` removes one."""
    from ppec_contract.errors import PpecError

    changes: dict[str, str | None] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals and not (removable and text.endswith("-")):
            wanted = "KEY=VALUE, nor KEY-" if removable else "KEY=VALUE"
            raise PpecError("request.invalid", f"the label {text[:80]!r} is not {wanted}", subject="label")
        changes[key if equals else text[:-1]] = value if equals else None
    return changes


def relabel(context: typer.Context, resource: Resource, name: str, given: list[str]) -> None:
    from ppec_contract.api import LabelsUpdate
    from ppec_contract.validation import parse

    body = parse(LabelsUpdate, {"labels": label_changes(given)}, subject=f"{resource.noun} label")
    session = session_of(context)
    show_item(session, resource, session.client.patch(f"{resource.url(name)}/labels", body, resource.view_class()))


def shown_labels(item: Any) -> str:
    return ", ".join(f"{key}={value}" if value else key for key, value in item.labels.items()) or "-"
