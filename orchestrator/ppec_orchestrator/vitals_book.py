# SPDX-License-Identifier: Apache-2.0
"""What hosts say that changes by itself, kept in memory: a message writes a row only when a level changes.

The use of a host is known to the replica that heard it last, until the host's next word, a minute later at most.
"""

from __future__ import annotations

import threading
from datetime import datetime

from ppec_contract.host import HostUse, Vitals


class VitalsBook:
    """By host. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, dict[str, str]] = {}
        self._uses: dict[str, tuple[HostUse, datetime]] = {}

    def is_known(self, host: str, vitals: Vitals) -> bool:
        """Whether the database is known to hold these levels."""
        with self._lock:
            return self._known.get(host) == _levels(vitals)

    def note(self, host: str, vitals: Vitals, *, now: datetime) -> None:
        """What was stored, or was there already."""
        with self._lock:
            self._known[host] = _levels(vitals)
            self._uses[host] = (vitals.use, now)

    def use_of(self, host: str) -> tuple[HostUse, datetime] | None:
        with self._lock:
            return self._uses.get(host)

    def forget(self, host: str) -> None:
        with self._lock:
            self._known.pop(host, None)
            self._uses.pop(host, None)


def _levels(vitals: Vitals) -> dict[str, str]:
    return {finding.check: finding.level.value for finding in vitals.health}
