# SPDX-License-Identifier: Apache-2.0
"""Live progress of an operation: a table that redraws itself on a terminal, one line per change elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from ppec_contract.api_operations import ItemState, OperationItem, OperationView
from ppec_orchestrator.cli.output import Column, Output, plain, table

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

# Lines of a terminal that are not rows of the table.
_FRAME_LINES = 6
_OPEN = (ItemState.RUNNING, ItemState.PENDING)


class Clock:
    """How long each VM has taken: from when we first saw the operation to when the VM was first seen ended."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._start = now()
        self._ended: dict[str, float] = {}

    def note(self, view: OperationView) -> None:
        for item in view.items:
            if item.state not in _OPEN:
                self._ended.setdefault(str(item.vm_id), self._now())

    def elapsed_s(self, item: OperationItem | None = None) -> float:
        end = self._ended.get(str(item.vm_id)) if item else None
        return (end if end is not None else self._now()) - self._start


def watch(views: Iterable[OperationView], output: Output) -> OperationView:
    """Shows the operation until it has ended; returns how it ended."""
    if output.messages.is_terminal:
        return _live(views, output)
    return _lines(views, output)


def _lines(views: Iterable[OperationView], output: Output) -> OperationView:
    clock = Clock()
    shown: dict[str, str] = {}
    last: OperationView | None = None
    for view in views:
        clock.note(view)
        changed = {line.partition(":")[0]: line for line in change_lines(view)}
        for subject, line in changed.items():
            if shown.get(subject) != line:
                output.say(f"[{clock.elapsed_s():6.1f}s] {line}")
        shown |= changed
        last = view
    return _ended(last)


def change_lines(view: OperationView) -> list[str]:
    """One line per VM and one for the whole, to be shown when it differs from the last."""
    items = [f"{item.name}: {_situation(item)}" for item in view.items]
    return [f"operation {view.operation_id}: {view.state}", *items]


def _situation(item: OperationItem) -> str:
    parts = [str(item.state)]
    if item.host:
        parts.append(f"on {item.host}")
    if item.stage and item.state is ItemState.RUNNING:
        parts.append(str(item.stage))
    if item.attempt > 1:
        parts.append(f"(attempt {item.attempt})")
    if item.problem:
        parts.append(f"- {item.problem.detail} [{item.problem.code}]")
    return " ".join(parts)


class _Picture:
    """Renders the latest view; rich asks for it several times a second, so the seconds run on between events."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.view: OperationView | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.view is None:
            return
        room = max(3, console.height - _FRAME_LINES)
        items = sorted(self.view.items, key=lambda item: item.state not in _OPEN)[:room]
        clock = self._clock
        columns: list[Column[OperationItem]] = [
            Column("VM", lambda item: item.name),
            Column("host", lambda item: item.host or "-"),
            Column("state", lambda item: item.state),
            Column("stage", lambda item: item.stage or "-"),
            Column("elapsed", lambda item: f"{clock.elapsed_s(item):.1f} s", right=True),
        ]
        yield table(items, columns)
        done = sum(item.state not in _OPEN for item in self.view.items)
        hidden = f", {len(self.view.items) - len(items)} not shown" if len(items) < len(self.view.items) else ""
        yield plain(
            f"operation {self.view.operation_id}: {self.view.state}, {done} of {len(self.view.items)} done, "
            f"{clock.elapsed_s():.1f} s{hidden}"
        )


def _live(views: Iterable[OperationView], output: Output) -> OperationView:
    from rich.live import Live

    clock = Clock()
    picture = _Picture(clock)
    with Live(picture, console=output.messages, refresh_per_second=8, transient=True):
        for view in views:
            clock.note(view)
            picture.view = view
    return _ended(picture.view)


def _ended(view: OperationView | None) -> OperationView:
    if view is None:
        raise RuntimeError("an operation has at least one view")
    return view
