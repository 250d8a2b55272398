# SPDX-License-Identifier: Apache-2.0
"""The record of every certificate issued, and which of a host's are good at the API: those recorded and not over.

A host's rows go when the host is deleted, so a host registered again under the name starts without. A host that
enrols again keeps its older certificate until the newer one has been used, and for `OVERLAP` after that: an answer to
an enrolment may get lost, and an agent goes on with the connection it has open.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select, update

from ppec_contract.identity import Identity
from ppec_orchestrator.pki.ca import Issued
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.tables import certificate

OVERLAP = timedelta(hours=1)
# How long a certificate withdrawn by another replica may still work in this one. Longer than a few heartbeats, so that
# these cost no look at the database.
CACHE_S = 60.0
_MAX_CACHED = 65536
_TICK = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class _Known:
    uri: str
    not_after: datetime
    looked_up_at: datetime

    def fresh_at(self, now: datetime) -> bool:
        # A clock that was set back makes it stale too.
        return self.looked_up_at <= now < self.looked_up_at + timedelta(seconds=CACHE_S)


def record_certificate(conn: Connection, issued: Issued, *, now: datetime) -> None:
    """`issued_at` follows the order of recording whatever the clocks say: they differ between replicas and are set
    back, and an older certificate must never supersede a newer one. A host's enrolments take turns on its row."""
    newest = conn.execute(
        select(func.max(certificate.c.issued_at)).where(certificate.c.uri == issued.uri)
    ).scalar_one_or_none()
    issued_at = now if newest is None else max(now, newest + _TICK)
    conn.execute(
        insert(certificate).values(
            serial=issued.serial, uri=issued.uri, issued_at=issued_at, not_after=issued.not_after
        )
    )


def withdraw_certificates(conn: Connection, identity: Identity) -> None:
    """None of this identity's certificates counts any more."""
    conn.execute(delete(certificate).where(certificate.c.uri == identity.uri))


def serial_of(peer_certificate: Mapping[str, Any]) -> str:
    """The serial of `getpeercert()`'s certificate as it is recorded; empty when there is none to be read."""
    try:
        return f"{int(str(peer_certificate.get('serialNumber', '')), 16):x}"
    except ValueError:
        return ""


class CertificateBook:
    """Looks certificates up, and remembers the good ones for `CACHE_S`. Unknown ones are never remembered."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._cached: dict[str, _Known] = {}
        self._generation = 0

    def remembers(self, identity: Identity, serial: str, *, now: datetime) -> bool:
        """Whether it counts, as far as that is known without a look at the database: False says nothing."""
        with self._lock:
            known = self._cached.get(serial)
        return known is not None and known.fresh_at(now) and known.uri == identity.uri and now < known.not_after

    def holds(self, identity: Identity, serial: str, *, now: datetime) -> bool:
        """Whether this serial was issued to this identity and still counts."""
        with self._lock:
            known, generation = self._cached.get(serial), self._generation
        if known is None or not known.fresh_at(now):
            known = self._load(identity, serial, now)
            if known is None:
                return False
            self._remember(serial, known, generation)
        return known.uri == identity.uri and now < known.not_after

    def forget(self) -> None:
        """After certificates were withdrawn: everything is looked up again."""
        with self._lock:
            self._cached.clear()
            self._generation += 1

    def _remember(self, serial: str, known: _Known, generation: int) -> None:
        with self._lock:
            if generation != self._generation:
                return  # Looked up before something was withdrawn.
            if len(self._cached) >= _MAX_CACHED:
                self._cached.clear()
            self._cached[serial] = known

    def _load(self, identity: Identity, serial: str, now: datetime) -> _Known | None:
        with self._database.read() as conn:
            rows = conn.execute(select(certificate).where(certificate.c.uri == identity.uri)).all()
        mine = next((row for row in rows if row.serial == serial), None)
        if mine is None:
            return None
        if now < mine.not_after and any(
            row.issued_at < mine.issued_at and row.not_after > now + OVERLAP for row in rows
        ):
            self._supersede(identity, mine.issued_at, now + OVERLAP)
        return _Known(identity.uri, mine.not_after, now)

    def _supersede(self, identity: Identity, issued_at: datetime, until: datetime) -> None:
        older = (certificate.c.uri == identity.uri, certificate.c.issued_at < issued_at)
        with self._database.write() as conn:
            conn.execute(update(certificate).where(*older, certificate.c.not_after > until).values(not_after=until))
        self.forget()
