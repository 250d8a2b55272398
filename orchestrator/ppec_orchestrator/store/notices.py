# SPDX-License-Identifier: Apache-2.0
"""Wake-ups: "something changed on this channel", within the process and, on PostgreSQL, between replicas.

A notice is a hint to look at the database, never the information itself: one may come twice or too early, and after a
lost connection every waiter is woken because notices may have been missed. Waiters therefore always use a timeout.
"""

from __future__ import annotations

import json
import threading
from collections import defaultdict, deque
from types import TracebackType

_KEPT_PAYLOADS = 1024


class Listener:
    """Payloads of one channel since this listener was made. Close it, or use it as a context manager."""

    def __init__(self, notices: Notices, channel: str) -> None:
        self._notices = notices
        self.channel = channel
        self.woken = False
        # A slow listener loses the oldest payloads, not its wake-up.
        self.payloads: deque[str] = deque(maxlen=_KEPT_PAYLOADS)

    def wait(self, timeout_s: float) -> tuple[str, ...] | None:
        """The payloads since the last call, waiting for one if there is none; None when the time is up.

        An empty tuple means "look": notices may have been missed. Once `ended`, it no longer waits.
        """
        return self._notices.take(self, timeout_s)

    @property
    def ended(self) -> bool:
        """Whether there will be no more notices, because the database was closed. Whoever waits in a loop asks this."""
        return self._notices.closed

    def close(self) -> None:
        self._notices.remove(self)

    def __enter__(self) -> Listener:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Notices:
    """The process's own switchboard: `announce` wakes every listener of the channel."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._listeners: dict[str, set[Listener]] = defaultdict(set)
        self._closed = False

    @property
    def closed(self) -> bool:
        return self._closed

    def listen(self, channel: str) -> Listener:
        listener = Listener(self, channel)
        with self._changed:
            self._listeners[channel].add(listener)
        return listener

    def remove(self, listener: Listener) -> None:
        with self._changed:
            self._listeners[listener.channel].discard(listener)
            if not self._listeners[listener.channel]:
                del self._listeners[listener.channel]

    def announce(self, channel: str, payload: str) -> None:
        with self._changed:
            for listener in self._listeners.get(channel, ()):
                listener.payloads.append(payload)
                listener.woken = True
            self._changed.notify_all()

    def announce_all(self) -> None:
        """Wakes every listener without a payload: something may have been missed."""
        with self._changed:
            for listeners in self._listeners.values():
                for listener in listeners:
                    listener.woken = True
            self._changed.notify_all()

    def take(self, listener: Listener, timeout_s: float) -> tuple[str, ...] | None:
        with self._changed:
            self._changed.wait_for(lambda: listener.woken or self._closed, timeout=timeout_s)
            if not listener.woken:
                return None
            listener.woken = False
            payloads = tuple(listener.payloads)
            listener.payloads.clear()
            return payloads

    def close(self) -> None:
        """Ends every wait, now and later, so that threads can stop."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def encode(channel: str, payload: str) -> str:
    """A notice as PostgreSQL's one string. All channels share one LISTEN, so that names need no quoting."""
    return json.dumps([channel, payload])
