# SPDX-License-Identifier: Apache-2.0
"""The shape of an operation kind: a table of steps, each with its do and its undo.

A do or undo may run again from its start after a crash, so each must find out what is done already. It returns the
writes that belong to its end; the engine commits them together with the step's check-point.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import Connection

from ppec_contract.api_operations import OperationState
from ppec_contract.errors import PpecError, Problem
from ppec_orchestrator.store.operations import Item

if TYPE_CHECKING:
    from ppec_orchestrator.operations.context import Context

Writes = Callable[[Connection], None]


def nothing(conn: Connection) -> None:
    """No business rows belong to the end of this step."""


@dataclass(frozen=True, slots=True)
class StepEnd:
    """How a do or undo ended: rows to write with the check-point, and a line for people."""

    writes: Writes = nothing
    detail: str = ""


Do = Callable[["Context"], StepEnd]


def nobody_told() -> None:
    """Nothing more is said of an end."""


def no_more(context: Context, conn: Connection) -> Callable[[], None]:
    """Nothing else is written with the end of the operation."""
    return nobody_told


@dataclass(frozen=True, slots=True)
class NoUndo:
    """An undo that is missing on purpose, with the reason."""

    why: str


def done_on_accept(context: Context) -> StepEnd:
    """The do of a step that the accepting transaction has done already."""
    return StepEnd()


@dataclass(frozen=True, slots=True)
class Step:
    name: str
    do: Do
    undo: Do | NoUndo


@dataclass(frozen=True, slots=True)
class Verdict:
    """How an operation whose steps are all done has ended."""

    state: OperationState
    problem: Problem | None = None


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of operation. `verdict` looks at the items once every step is done.

    An undo that fails by our own fault is given up after some tries and its VMs are left to the operator, unless
    `undo_for_ever`: then there are no VMs that would remember what is left.

    `at_end` writes in the transaction of the end, whether that was reached forwards or backwards; what it returns is
    called when that is committed.
    """

    name: str
    steps: tuple[Step, ...]
    verdict: Callable[[Sequence[Item]], Verdict]
    undo_for_ever: bool = False
    at_end: Callable[[Context, Connection], Callable[[], None]] = no_more

    @property
    def step_names(self) -> tuple[str, ...]:
        return tuple(step.name for step in self.steps)


class StepFailedError(PpecError):
    """The operation can't be completed: everything done so far is undone, and this is its reason."""

    def __init__(self, problem: Problem) -> None:
        error = problem.error()
        super().__init__(error.code, error.message, hint=error.hint, subject=error.subject, details=error.details)


class PostponedError(Exception):
    """What a step needs isn't there yet: the operation goes back into the queue for a while."""

    def __init__(self, delay_s: float, detail: str) -> None:
        super().__init__(detail)
        self.delay_s = delay_s
        self.detail = detail


class HandedOverError(Exception):
    """This process stops; whoever claims the operation next carries on where it stands."""
