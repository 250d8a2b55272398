# SPDX-License-Identifier: Apache-2.0
"""Whoever wants the same kind of work done at the same time has it done at once, by one of them for all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import structlog

_log = structlog.get_logger(__name__)
W = TypeVar("W")
R = TypeVar("R")


@dataclass(slots=True, eq=False)
class _Waiting(Generic[W, R]):
    wish: W
    done: bool = False
    result: R | None = None


class Joined(Generic[W, R]):
    """`work` is given up to `most` wishes, in the order they came in, and answers each; None, or whatever it raises,
    leaves a wish to whoever has it."""

    def __init__(self, work: Callable[[Sequence[W]], Sequence[R | None]], most: int) -> None:
        self._work = work
        self._most = most
        self._waiting: list[_Waiting[W, R]] = []
        self._turn = threading.Lock()
        self._lock = threading.Lock()

    def answer(self, wish: W) -> R | None:
        """What the work made of the wish; None if its owner has to see to it himself."""
        mine: _Waiting[W, R] = _Waiting(wish)
        with self._lock:
            self._waiting.append(mine)
        with self._turn:
            # Whoever had the turn before did it, or it is done now, for all that came in meanwhile.
            while not mine.done:
                with self._lock:
                    together, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
                self._do(together)
        return mine.result

    def _do(self, together: Sequence[_Waiting[W, R]]) -> None:
        try:
            for one, result in zip(together, self._work([each.wish for each in together]), strict=True):
                one.result = result
        except Exception as error:
            # Each will meet it again by itself, and tell it to its own caller.
            _log.warning("joined.failed", wishes=len(together), exc_info=error)
        finally:
            for one in together:
                one.done = True
