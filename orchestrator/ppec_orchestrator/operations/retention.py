# SPDX-License-Identifier: Apache-2.0
"""Removes what the database need not keep for ever, in batches short enough that nobody's write waits for long.

Every replica does it, at its start and then every hour; two at once remove the same and harm nothing.
"""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta

import structlog

from ppec_orchestrator.operations.limits import Limits
from ppec_orchestrator.store import retention as store
from ppec_orchestrator.store.clock import Clock
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.retention import OldRows

_log = structlog.get_logger(__name__)
# Between two batches, so that those who wait to write come first.
_PAUSE_S = 0.01
# A replica whose clock is ahead by less takes no token away that the others would still take.
_TOKENS_KEPT = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Removed:
    """How many rows a sweep removed."""

    operations: int
    idempotency_keys: int
    certificates: int
    enrolment_tokens: int
    address_events: int = 0
    plans: int = 0


class Retention:
    """`sweep` does it once, `run` until `stopping` is set."""

    def __init__(self, database: Database, now: Clock, stopping: threading.Event) -> None:
        self._database = database
        self._now = now
        self._stopping = stopping

    def run(self) -> None:
        every_s = Limits().sweep_every_s
        while not self._stopping.is_set():
            try:
                with self._database.read() as conn:
                    limits = Limits.read(conn)
                every_s = limits.sweep_every_s
                self.sweep(limits)
            except Exception as error:
                # The next one tries again; the thread must not end.
                _log.error("retention.failed", exc_info=error)
            self._stopping.wait(every_s)

    def sweep(self, limits: Limits) -> Removed:
        """Keys before operations: an operation stays as long as a key leads to it."""
        now = self._now()
        keys_before = now - timedelta(seconds=limits.keep_idempotency_keys_s)
        certificates_before = now - timedelta(seconds=limits.keep_certificates_s)
        keys = self._in_batches(store.old_keys(keys_before))
        certificates = self._in_batches(store.old_certificates(certificates_before))
        tokens = self._in_batches(store.old_enrolment_tokens(now - _TOKENS_KEPT))
        events = self._in_batches(store.old_address_events(now - timedelta(seconds=limits.keep_address_events_s)))
        plans = self._in_batches(store.old_plans(now))
        operations = self._operations(now - timedelta(seconds=limits.keep_operations_s))
        removed = Removed(operations, keys, certificates, tokens, events, plans)
        _log.info("retention.swept", **asdict(removed))
        return removed

    def _in_batches(self, old: OldRows) -> int:
        total = 0
        while not self._stopping.is_set():
            with self._database.read() as conn:
                if not old.exist(conn):
                    break
            with self._database.write() as conn:
                total += old.remove(conn)
            self._stopping.wait(_PAUSE_S)
        return total

    def _operations(self, before: datetime) -> int:
        with self._database.read() as conn:
            kept = store.referred_to(conn, before)
        total, last = 0, None
        while not self._stopping.is_set():
            with self._database.read() as conn:
                old = store.old_operations(conn, before, last)
            if not old:
                break
            last = old[-1]
            for batch in store.in_batches(old, kept):
                with self._database.write() as conn:
                    total += store.remove_operations(conn, batch)
                if self._stopping.wait(_PAUSE_S):
                    break
        return total
