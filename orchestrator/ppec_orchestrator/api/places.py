# SPDX-License-Identifier: Apache-2.0
"""A number of places for what takes long: who finds none free is told so, and nobody queues."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ppec_contract.errors import PpecError


class Places:
    """`what` is what they are for, in the plural."""

    def __init__(self, what: str, most: int) -> None:
        self._what = what
        self._most = most
        self._taken = 0
        self._lock = threading.Lock()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Has one for the time of the block. Raises `orchestrator.busy`."""
        with self._lock:
            if self._taken >= self._most:
                raise PpecError(
                    "orchestrator.busy",
                    f"{self._taken} {self._what} are open, and there may be {self._most}",
                    hint="Try again when one has ended.",
                    subject="orchestrator",
                )
            self._taken += 1
        try:
            yield
        finally:
            with self._lock:
                self._taken -= 1
