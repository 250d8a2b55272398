# SPDX-License-Identifier: Apache-2.0
"""Wake-ups between replicas, by PostgreSQL's LISTEN and NOTIFY: see `notices.py`."""

from __future__ import annotations

import json
import select
import socket
import threading

import psycopg
import structlog

from ppec_orchestrator.store.notices import Notices

_log = structlog.get_logger(__name__)
POSTGRES_CHANNEL = "ppec"
_RECONNECT_S = 1.0


class PostgresBridge:
    """Carries PostgreSQL's notifications into `Notices`: one thread and one connection, opened again when cut."""

    def __init__(self, conninfo: str, notices: Notices) -> None:
        self._conninfo = conninfo
        self._notices = notices
        self._stop = threading.Event()
        self._listening = threading.Event()
        # Readable from when the other end is closed: whoever waits for notices then waits for that as well.
        self._ended, self._ending = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="ppec-notices", daemon=True)
        self._thread.start()

    def wait_until_listening(self, timeout_s: float) -> bool:
        return self._listening.wait(timeout_s)

    def close(self) -> None:
        self._stop.set()
        self._ending.close()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        with self._ended:
            while not self._stop.is_set():
                try:
                    self._listen()
                except psycopg.Error as error:
                    self._listening.clear()
                    _log.warning("notices.connection_lost", error=type(error).__name__)
                    self._stop.wait(_RECONNECT_S)

    def _listen(self) -> None:
        with psycopg.connect(self._conninfo, autocommit=True, connect_timeout=5) as connection:
            connection.execute(f"LISTEN {POSTGRES_CHANNEL}")
            # In this order: whoever waits until it listens is not woken by this any more.
            self._notices.announce_all()
            self._listening.set()
            readable = select.poll()
            readable.register(connection, select.POLLIN)
            readable.register(self._ended, select.POLLIN)
            while not self._stop.is_set():
                # First those that came with an answer: they don't make the connection readable any more.
                for notice in connection.notifies(timeout=0):
                    channel, payload = json.loads(notice.payload)
                    self._notices.announce(channel, payload)
                readable.poll()
