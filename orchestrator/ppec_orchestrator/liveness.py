# SPDX-License-Identifier: Apache-2.0
"""When each host was last heard, kept in memory and written in batches: a heartbeat writes no row of its own.

Also remembers each host's latest message, so that one that was delayed on the way can't turn the picture back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

import structlog

from ppec_contract.api_hosts import HostLiveness
from ppec_contract.errors import PpecError
from ppec_contract.vm import VmState

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, order=True, slots=True)
class MessageId:
    """Orders one host's messages: by agent process, then by its sequence."""

    agent_started_at_unix_ms: int
    sequence: int


@dataclass(frozen=True, slots=True)
class Heard:
    """A host's latest message: `digests` are of the report the orchestrator holds, as far as this process knows, by
    every rule that agents have had."""

    host_id: int
    message: MessageId
    digests: frozenset[str]
    at: datetime


def liveness_of(
    enrolled_at: datetime | None, last_seen_at: datetime | None, *, now: datetime, silent_after_s: float
) -> HostLiveness:
    """A host silent for `silent_after_s` seconds is unknown: it may well be running, and so may its VMs."""
    if enrolled_at is None:
        return HostLiveness.REGISTERED
    if last_seen_at is None:
        return HostLiveness.ENROLLED
    if now - last_seen_at > timedelta(seconds=silent_after_s):
        return HostLiveness.UNKNOWN
    return HostLiveness.UP


def observed_of(reported: VmState, host: HostLiveness) -> VmState:
    """What may be said of a VM now: of a silent host's VMs nothing is known, never that they stopped."""
    return reported if host is HostLiveness.UP else VmState.UNKNOWN


class LivenessBook:
    """`flush_to` writes `{host_id: last seen}` in one transaction, and returns the hosts that it could not write now.
    It is called by `run`'s thread every few seconds."""

    def __init__(self, flush_to: Callable[[Mapping[int, datetime]], Collection[int]], *, silent_after_s: float) -> None:
        self._flush_to = flush_to
        self._silent_after = timedelta(seconds=silent_after_s)
        self._lock = threading.Lock()
        self._heard: dict[str, Heard] = {}
        self._dirty: dict[int, datetime] = {}

    def heard(self, host: str) -> Heard | None:
        with self._lock:
            return self._heard.get(host)

    def accepts(self, last: MessageId | None, last_at: datetime | None, message: MessageId, *, now: datetime) -> bool:
        """False for a message older than the last one.

        Not so after a silence: no message is delayed that long, but a host's clock may have been set back, and would
        otherwise never be believed again.
        """
        if last is None or last_at is None or message > last:
            return True
        return now - last_at > self._silent_after

    def note(self, host: str, heard: Heard) -> None:
        with self._lock:
            self._heard[host] = heard
            self._dirty[heard.host_id] = heard.at

    def forget(self, host: str) -> None:
        with self._lock:
            known = self._heard.pop(host, None)
            if known is not None:
                self._dirty.pop(known.host_id, None)

    def last_seen(self, host: str, stored: datetime | None) -> datetime | None:
        """The later of what this process heard and what the database says (another replica may have heard more)."""
        heard = self.heard(host)
        if heard is None or (stored is not None and stored > heard.at):
            return stored
        return heard.at

    def flush(self) -> int:
        """Writes what was heard since the last flush; what could not be written stays for the next."""
        with self._lock:
            batch, self._dirty = self._dirty, {}
        if not batch:
            return 0
        left: Collection[int] = batch
        try:
            left = self._flush_to(batch)
        finally:
            with self._lock:
                self._dirty = {host_id: batch[host_id] for host_id in left} | self._dirty
        return len(batch) - len(left)

    def run(self, stop: threading.Event, interval_s: float) -> None:
        """Flushes until `stop` is set, and once more then."""
        while not stop.wait(interval_s):
            self._try_flush()
        self._try_flush()

    def _try_flush(self) -> None:
        try:
            self.flush()
        except PpecError as error:
            _log.warning("liveness.flush_failed", code=error.code)
