# SPDX-License-Identifier: Apache-2.0
"""Writes of a claimed operation: each in one transaction with its check-point, each under owner and fence."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy import Connection

from ppec_contract.errors import PpecError
from ppec_orchestrator.store.claims import Claim, guard
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.operations import CHANGED

T = TypeVar("T")
_TRIES = 5
_PAUSE_S = 0.1


class Journal:
    """Counts what it commits: the counters an operation shows are those of its own writes and runs."""

    def __init__(self, database: Database, claimed: Claim) -> None:
        self._database = database
        self.claimed = claimed
        self._counters = Counter(claimed.counters)

    @property
    def counters(self) -> dict[str, int]:
        return dict(self._counters)

    def count(self, **more: int) -> None:
        """Written with the next check-point."""
        self._counters.update(more)

    def count_up_to(self, **least: int) -> None:
        """Raises counters to at least these values."""
        for name, value in least.items():
            self._counters[name] = max(self._counters[name], value)

    def commit(self, writes: Callable[[Connection], T]) -> T:
        """One check-point. Raises `operation.fenced` when another has taken over; then nothing was written.

        A transaction the database gave up is repeated: what it holds is decided, only not yet on disk.
        """
        for left in reversed(range(_TRIES)):
            try:
                return self._once(writes)
            except PpecError as error:
                if error.code != "store.unavailable" or not left:
                    raise
                time.sleep(_PAUSE_S * (_TRIES - left))
        raise AssertionError("unreachable")

    def _once(self, writes: Callable[[Connection], T]) -> T:
        counters = self._counters + Counter(commits=1)
        with self._database.write() as conn:
            guard(conn, self.claimed, counters)
            result = writes(conn)
            self._database.notify(CHANGED, self.claimed.operation_id, within=conn)
        self._counters["commits"] += 1
        return result
