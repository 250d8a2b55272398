# SPDX-License-Identifier: Apache-2.0
"""What hosts say of their use, kept in memory: it changes by itself, and nobody wants it written down.

The use of a host is known to the replica that heard it last, until the host's next word, a minute later at most.
"""

from __future__ import annotations

import threading
from datetime import datetime
from uuid import UUID

from ppec_contract.host import HostUse, Vitals, VmUse


class VitalsBook:
    """By host. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._uses: dict[str, tuple[HostUse, datetime]] = {}

    def note(self, host: str, vitals: Vitals, *, now: datetime) -> None:
        with self._lock:
            self._uses[host] = (vitals.use, now)

    def use_of(self, host: str) -> tuple[HostUse, datetime] | None:
        with self._lock:
            return self._uses.get(host)

    def use_of_vm(self, host: str, vm_id: UUID) -> VmUse | None:
        """What the VM's host said of it, if it did."""
        known = self.use_of(host)
        return None if known is None else next((use for use in known[0].vms if use.vm_id == vm_id), None)

    def forget(self, host: str) -> None:
        with self._lock:
            self._uses.pop(host, None)
