# SPDX-License-Identifier: Apache-2.0
"""What goes to the terminal. Results to stdout (a table, or JSON and nothing else), all else to stderr.

Names, labels and messages may be somebody else's text: they are shown as text, never as rich's markup, and characters
that could steer a terminal are replaced.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ppec_contract.errors import PpecError
from ppec_contract.model import Model

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

M = TypeVar("M", bound=Model)
# How some of a thing's fields are told to people, by their names: in these lines.
Told = Mapping[str, Callable[[M], Sequence[str]]]
# A pipe or a log has no width; wide enough that no ordinary table is folded.
_PLAIN_WIDTH = 220


def visible(text: object) -> str:
    """The text with everything unprintable (control characters, text direction, escapes) replaced."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def count(number: int) -> str:
    """A count for people: the API's end at 2**53, and nobody counted just so many."""
    from ppec_contract.api_ipdb import MAX_COUNT

    return "over 9.0e15" if number >= MAX_COUNT else str(number)


def plain(text: object, style: str = "") -> Text:
    from rich.text import Text

    return Text(visible(text), style=style)


@dataclass(frozen=True, slots=True)
class Column(Generic[M]):
    """A header and how to get the cell's text from an item."""

    header: str
    cell: Callable[[M], object]
    right: bool = False


class Output:
    """Where a command's results and messages go."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json

    @cached_property
    def results(self) -> Console:
        return _console(stderr=False)

    @cached_property
    def messages(self) -> Console:
        return _console(stderr=True)

    def items(self, items: Iterable[M], columns: Sequence[Column[M]]) -> None:
        """A list: a table, or a JSON array."""
        if self.as_json:
            _write_json([item.model_dump(mode="json") for item in items])
        else:
            self.results.print(table(items, columns))

    def stream(self, items: Iterable[Mapping[str, Any]]) -> None:
        """A list as a JSON array, an item a line as it comes; broken off where the items are."""
        between = "[\n"
        for item in items:
            sys.stdout.write(between + json.dumps(item))
            between = ",\n"
        sys.stdout.write("\n]\n" if between == ",\n" else "[]\n")

    def item(self, item: M, hidden: Collection[str] = (), told: Told[M] | None = None) -> None:
        """One thing: its fields one a line, without the `hidden` ones, and with lines of their own for those `told`; or
        a JSON object."""
        if self.as_json:
            _write_json(item.model_dump(mode="json"))
            return
        shown = item.model_dump(mode="json", exclude=set(hidden))
        lines = {name: tuple(tell(item)) for name, tell in (told or {}).items() if name in shown}
        self.results.print(fields(shown | lines))

    def json(self, item: Model, *, without_none: bool = False) -> None:
        _write_json(item.model_dump(mode="json", exclude_none=without_none))

    def lines(self, texts: Iterable[str]) -> None:
        """One a line, for other programs to read."""
        for text in texts:
            self.results.print(plain(text), soft_wrap=True)

    def say(self, text: str) -> None:
        """A message for people; on stderr, so that it's never in the way of a result."""
        self.messages.print(plain(text), soft_wrap=True)

    def error(self, error: PpecError) -> None:
        from rich.text import Text

        line = Text("error: ", style="bold red") + plain(error.message) + plain(f" [{error.code}]", "dim")
        self.messages.print(line, soft_wrap=True)
        if error.hint:
            self.messages.print(Text("hint: ", style="bold") + plain(error.hint), soft_wrap=True)


def table(items: Iterable[M], columns: Sequence[Column[M]]) -> Table:
    headers = [column.header + ">" * column.right for column in columns]
    return rows(headers, ([column.cell(item) for column in columns] for item in items))


def rows(headers: Sequence[str], cells: Iterable[Sequence[object]]) -> Table:
    """A table of what is no model; a header that ends in `>` is of figures, which stand to the right."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for header in headers:
        right = header.endswith(">")
        made.add_column(header.removesuffix(">"), justify="right" if right else "left", overflow="fold")
    for row in cells:
        made.add_row(*(plain(cell) for cell in row))
    return made


def fields(value: dict[str, Any]) -> Table:
    from rich.table import Table

    made = Table.grid(padding=(0, 2))
    made.add_column(no_wrap=True)
    made.add_column(overflow="fold")
    for key, shown in value.items():
        for line in _field(shown):
            made.add_row(plain(_label(key), "bold"), plain(line))
            key = ""  # noqa: PLW2901 - the name stands beside the first line only
    return made


def _label(key: str) -> str:
    return key.removesuffix("_mib").replace("_", " ") + (", MiB" if key.endswith("_mib") else "")


def _field(value: Any) -> list[str]:
    """The lines a value is shown in: one, or one for each part of a list or mapping. A tuple has them already."""
    if value is None or value in ("", [], {}, ()):
        return ["-"]
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, dict):
        return [f"{key} = {_word(part)}" for key, part in value.items()]
    if isinstance(value, list) and any(isinstance(part, dict) for part in value):
        return [_word(part) for part in value]
    return [_word(value)]


def _word(value: Any) -> str:
    """A value within a line, without a trace of Python or JSON."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_inner(part)}" for key, part in value.items() if part not in (None, "", [], {}))
    if isinstance(value, list):
        return ", ".join(map(_inner, value))
    if value is None:
        return "-"
    return count(value) if isinstance(value, int) else str(value)


def _inner(value: Any) -> str:
    several = isinstance(value, dict) or (isinstance(value, list) and not any(isinstance(part, dict) for part in value))
    return f"({_word(value)})" if several else _word(value)


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PLAIN_WIDTH
    return Console(file=stream, width=width, markup=False, emoji=False, highlight=False)


def _write_json(value: Any) -> None:
    # ASCII, so that neither the terminal nor a pipe's encoding can spoil or be spoilt by it.
    sys.stdout.write(json.dumps(value, indent=2) + "\n")
