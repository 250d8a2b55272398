# SPDX-License-Identifier: Apache-2.0
"""Recording a host's certificate that was not given out by enrolment: from then on it counts like one that was."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Connection, select, update

from ppec_contract.errors import PpecError
from ppec_contract.identity import Identity
from ppec_orchestrator.pki.ca import Issued
from ppec_orchestrator.store.catalogue import not_found
from ppec_orchestrator.store.certificates import record_certificate
from ppec_orchestrator.store.tables import certificate, host


def record_host_certificate(conn: Connection, issued: Issued, identity: Identity, *, now: datetime) -> bool:
    """Whether it is new in the record; one that is there and counts stays as it is.

    Raises `host.not_found`, and `request.invalid` when the serial is another's or the certificate was superseded.
    """
    # Holds the host's row to the end: a host deleted meanwhile would leave the certificate to its successor.
    enrolled = update(host).where(host.c.name == identity.name).values(enrolled_at=now)
    if conn.execute(enrolled).rowcount != 1:
        raise not_found("host", "host", identity.name)
    known = conn.execute(select(certificate).where(certificate.c.serial == issued.serial)).one_or_none()
    if known is None:
        record_certificate(conn, issued, now=now)
        return True
    if known.uri != issued.uri:
        raise _conflict(issued, f"is recorded as {known.uri}'s")
    if known.not_after < issued.not_after:
        raise _conflict(issued, "was superseded by a newer certificate that is in use")
    return False


def _conflict(issued: Issued, why: str) -> PpecError:
    return PpecError(
        "request.invalid",
        f"the certificate of {issued.uri} can't be recorded: serial {issued.serial} {why}",
        hint="Issue a new certificate for the host, with a serial of its own, and record that.",
        subject="certificate",
    )
