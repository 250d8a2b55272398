# SPDX-License-Identifier: Apache-2.0
"""Reading and deleting named resources: the same commands for all of them, made from a row each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Annotated, Any
from urllib.parse import quote

import typer

from ppec_orchestrator.cli.session import Session, session_of

# (header, attribute); a header with a trailing > is of figures, and set to the right.
Name = Annotated[str, typer.Argument(help="Its name, or id.")]
Limit = Annotated[int | None, typer.Option(min=1, help="At most so many.")]
Columns = Sequence[tuple[str, str | Callable[[Any], object]]]


@dataclass(frozen=True, slots=True)
class Resource:
    """`view` names the class of the contract (`model_named`), which is imported only when an answer is read.

    `rarely` are columns that a table has only if one of its items has something there. `silent` are fields that people
    aren't shown of a single item while they are at their default; JSON has them always. `told` says in which lines
    people are shown fields that are more than a word.
    """

    noun: str
    path: str
    view: str
    columns: Columns
    rarely: Columns = ()
    silent: tuple[str, ...] = ()
    told: Mapping[str, Callable[[Any], Sequence[str]]] = field(default_factory=dict)

    @property
    def plural(self) -> str:
        return self.noun + ("es" if self.noun.endswith("x") else "s")

    def url(self, name: str) -> str:
        return f"{self.path}/{quote(name, safe='')}"

    def view_class(self) -> Any:
        return model_named(self.view)


def model_named(name: str) -> Any:
    """A model of the REST API."""
    from ppec_contract import api_catalogue, api_hosts, api_ipdb, api_operations, api_plans, api_vms

    subjects = (api_catalogue, api_hosts, api_ipdb, api_operations, api_plans, api_vms)
    return next(getattr(subject, name) for subject in subjects if hasattr(subject, name))


def show_items(
    context: typer.Context, resource: Resource, query: Mapping[str, str | None] | None = None, limit: int | None = None
) -> None:
    """Lists the resource, all pages of it or up to `limit` items."""
    session = session_of(context)
    found = session.client.items(resource.path, resource.view_class(), query)
    items = list(islice(found, limit))
    session.output.items(items, columns_for(resource, items))


def columns_for(resource: Resource, items: Sequence[Any]) -> list[Any]:
    """Of a table of these items."""
    rarely = [column for column in made_columns(resource.rarely) if any(column.cell(item) != "-" for item in items)]
    return made_columns(resource.columns) + rarely


def made_columns(columns: Columns) -> list[Any]:
    from ppec_orchestrator.cli.output import Column

    return [Column(header.rstrip(">"), _cell(source), header.endswith(">")) for header, source in columns]


def _cell(source: str | Callable[[Any], object]) -> Callable[[Any], object]:
    if callable(source):
        return source

    def cell(item: Any) -> object:
        value = getattr(item, source)
        return "-" if value is None or value in ("", ()) else value

    return cell


def add_list(app: typer.Typer, resource: Resource) -> None:
    @app.command("list", help=f"List all {resource.plural}.")
    def _list(context: typer.Context, limit: Limit = None) -> None:
        show_items(context, resource, limit=limit)


def add_show(app: typer.Typer, resource: Resource) -> None:
    @app.command("show", help=f"Show one {resource.noun}.")
    def _show(context: typer.Context, name: Name) -> None:
        session = session_of(context)
        item = session.client.get(resource.url(name), resource.view_class())
        show_item(session, resource, item)


def show_item(session: Session, resource: Resource, item: Any) -> None:
    session.output.item(item, hidden=at_default(item, resource.silent), told=resource.told)


def add_delete(app: typer.Typer, resource: Resource) -> None:
    @app.command("delete", help=f"Delete a {resource.noun} nothing refers to.")
    def _delete(context: typer.Context, name: Name) -> None:
        session = session_of(context)
        session.client.delete(resource.url(name))
        session.output.say(f"{resource.noun} {name} deleted")


def create(context: typer.Context, resource: Resource, model: str, values: dict[str, Any]) -> None:
    """Checks the values against the contract's `model` here, so that a mistake costs no round trip; then creates."""
    from ppec_contract.validation import parse

    session = session_of(context)
    body = parse(model_named(model), {key: value for key, value in values.items() if value is not None})
    item = session.client.post(resource.path, body, resource.view_class())
    show_item(session, resource, item)


def at_default(item: Any, names: Sequence[str]) -> set[str]:
    """Those of the fields that say nothing but their default."""
    known = type(item).model_fields
    return {name for name in names if getattr(item, name) == known[name].get_default(call_default_factory=True)}
