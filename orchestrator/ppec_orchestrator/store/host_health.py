# SPDX-License-Identifier: Apache-2.0
"""What hosts say of their health: the latest, and an event for each change of a check's level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

from sqlalchemy import Connection, delete, insert, select, update

from ppec_contract.api_hosts import HostEventView
from ppec_contract.host import HealthFinding, HealthLevel
from ppec_orchestrator.store.catalogue import not_found
from ppec_orchestrator.store.tables import host, host_event

KEPT_EVENTS = 500
_LONGEST_CHECK = 256
_TROUBLE = (HealthLevel.WARNING, HealthLevel.ERROR)


def differs(conn: Connection, host_id: int, said: Sequence[HealthFinding]) -> bool:
    """Whether a host says anything else of itself than what is stored."""
    stored = conn.execute(select(host.c.health).where(host.c.id == host_id)).scalar_one_or_none()
    return _stored_levels(stored) != {finding.check: finding.level.value for finding in said}


def apply_health(conn: Connection, host_id: int, said: Sequence[HealthFinding], *, now: datetime) -> int:
    """Takes what a host says of itself; returns how many levels changed. A check that is new and well is no event."""
    stored = conn.execute(select(host.c.health).where(host.c.id == host_id).with_for_update()).scalar_one_or_none()
    before = _stored_levels(stored)
    after = {finding.check: finding for finding in said}
    changed = [
        finding
        for check, finding in after.items()
        if before.get(check) != finding.level.value and (check in before or finding.level in _TROUBLE)
    ]
    if before != {check: finding.level.value for check, finding in after.items()}:
        dumped = [finding.model_dump(mode="json") for finding in said]
        conn.execute(update(host).where(host.c.id == host_id).values(health=dumped))
    if changed:
        _record(conn, host_id, changed, before, now)
    return len(changed)


def _stored_levels(stored: Sequence[Mapping[str, object]] | None) -> dict[str, str]:
    return {str(finding["check"]): str(finding["level"]) for finding in stored or ()}


def _record(
    conn: Connection, host_id: int, changed: Sequence[HealthFinding], before: dict[str, str], now: datetime
) -> None:
    rows = [
        {
            "host_id": host_id,
            "at": now,
            "check": finding.check[:_LONGEST_CHECK],
            "before": before.get(finding.check),
            "after": finding.level.value,
            "found": finding.found,
        }
        for finding in changed
    ]
    conn.execute(insert(host_event), rows)
    oldest_kept = (
        select(host_event.c.id)
        .where(host_event.c.host_id == host_id)
        .order_by(host_event.c.id.desc())
        .offset(KEPT_EVENTS - 1)
        .limit(1)
    )
    oldest = conn.execute(oldest_kept).scalar_one_or_none()
    if oldest is not None:
        conn.execute(delete(host_event).where(host_event.c.host_id == host_id, host_event.c.id < oldest))


def events_of(conn: Connection, host_name: str, limit: int) -> tuple[HostEventView, ...]:
    """The latest first. Raises `host.not_found`."""
    host_id = conn.execute(select(host.c.id).where(host.c.name == host_name)).scalar_one_or_none()
    if host_id is None:
        raise not_found("host", "host", host_name)
    rows = conn.execute(
        select(host_event).where(host_event.c.host_id == host_id).order_by(host_event.c.id.desc()).limit(limit)
    )
    return tuple(
        HostEventView(at=row.at, check=row.check, before=row.before, after=row.after, found=row.found) for row in rows
    )
