# SPDX-License-Identifier: Apache-2.0
"""One-time enrolment tokens, kept as sha256 only, and swept when they are over (`store/retention.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Connection, delete, insert, select, update

from ppec_contract.errors import PpecError
from ppec_orchestrator.store.catalogue import not_found
from ppec_orchestrator.store.tables import enrolment_token, host
from ppec_orchestrator.store.tokens import new_secret, token_hash


@dataclass(frozen=True, slots=True)
class Enrollee:
    """The record of a host that enrols: its certificate's names come from here."""

    host_id: int
    name: str
    address: str


def create_enrolment_token(
    conn: Connection, host_name: str, *, now: datetime, lifetime_s: float
) -> tuple[str, datetime]:
    """A token for this host and its expiry; the host's earlier tokens stop working."""
    host_id = conn.execute(select(host.c.id).where(host.c.name == host_name)).scalar_one_or_none()
    if host_id is None:
        raise not_found("host", "host", host_name)
    token, expires_at = new_secret(), now + timedelta(seconds=lifetime_s)
    conn.execute(delete(enrolment_token).where(enrolment_token.c.host_id == host_id))
    conn.execute(
        insert(enrolment_token).values(sha256=token_hash(token), host_id=host_id, created_at=now, expires_at=expires_at)
    )
    return token, expires_at


def use_enrolment_token(conn: Connection, host_name: str, token: str, *, now: datetime) -> Enrollee:
    """Uses the token up; of two at once only one succeeds. Raises `enrolment.token_invalid`, whatever is wrong."""
    row = conn.execute(select(host.c.id, host.c.name, host.c.address).where(host.c.name == host_name)).one_or_none()
    used = 0
    if row is not None:
        used = conn.execute(
            update(enrolment_token)
            .where(
                enrolment_token.c.sha256 == token_hash(token),
                enrolment_token.c.host_id == row.id,
                enrolment_token.c.used_at.is_(None),
                enrolment_token.c.expires_at > now,
            )
            .values(used_at=now)
        ).rowcount
    if row is None or used != 1:
        raise PpecError(
            "enrolment.token_invalid",
            f"the token does not enrol host {host_name!r}: it is unknown, used, expired or another host's",
            hint=f"Make a new one: POST /v1/hosts/{host_name}/enrolment-token.",
            subject=f"host {host_name}",
        )
    conn.execute(update(host).where(host.c.id == row.id).values(enrolled_at=now))
    return Enrollee(row.id, row.name, row.address)
