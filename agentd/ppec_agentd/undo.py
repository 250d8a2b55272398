# SPDX-License-Identifier: Apache-2.0
"""A stack of undos: what has been done so far, and how to take it back, last first."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import structlog

from ppec_contract.errors import PpecError

log = structlog.get_logger(__name__)
Undo = Callable[[], Awaitable[object]]


class UndoStack:
    """Push an undo *before* the step that may leave something behind: undos are idempotent and find nothing to do.

    `run` stops at the first undo that fails, since those below it (files, the reservation) may still be in use by what
    could not be removed, and returns the names of all that were not done.
    """

    def __init__(self) -> None:
        self._undos: list[tuple[str, Undo]] = []

    def push(self, name: str, undo: Undo) -> None:
        self._undos.append((name, undo))

    async def run(self) -> tuple[str, ...]:
        while self._undos:
            name, undo = self._undos[-1]
            try:
                await undo()
            except Exception as error:
                # To be tried again is what happens when the hypervisor is away, and no fault of ours to trace.
                again = isinstance(error, PpecError) and error.retryable
                log.error("undo_failed", step=name, why=str(error), exc_info=None if again else error)
                return tuple(name for name, _ in reversed(self._undos))
            self._undos.pop()
        return ()
