# SPDX-License-Identifier: Apache-2.0
"""A process that dies at a chosen write of its database."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection

from ppec_orchestrator.store.database import Database

# No test outlives a lease: `bury` ends those of the dead, as time would.
QUICK = {"renewal_s": 0.2, "poll_s": 0.05, "cleanup_retry_s": 0.2}


class Crash(BaseException):
    """The process is gone: nothing catches this, and nothing it holds writes any more."""


class CrashingDatabase(Database):
    """Dies at the `at`-th write after `arm(at)`, just before or just after that is committed."""

    def __init__(self, url: str, *, committed: bool) -> None:
        super().__init__(url)
        self._left, self._committed = 0, committed
        self.dead = threading.Event()

    def arm(self, at: int) -> None:
        self._left = at

    @contextmanager
    def write(self) -> Iterator[Connection]:
        if self.dead.is_set():
            raise Crash
        self._left -= 1
        last = self._left == 0
        try:
            with super().write() as conn:
                yield conn
                if last and not self._committed:
                    raise Crash
        finally:
            if last:
                self.dead.set()
        if last:
            raise Crash
