# SPDX-License-Identifier: Apache-2.0
"""Takes hosts' reports, deltas and heartbeats in. An unchanged host costs a row read at most, and no row written."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from ppec_contract.errors import PpecError
from ppec_contract.host import Heartbeat, HeartbeatReply, HostReport, ReportEnvelope, Vitals
from ppec_contract.host_delta import ReportDelta
from ppec_orchestrator.liveness import Heard, LivenessBook, MessageId
from ppec_orchestrator.settings import Settings
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.host_health import apply_health, differs
from ppec_orchestrator.store.reports import NewReport, StoredReport, apply_report, stored_picture, stored_report
from ppec_orchestrator.vitals_book import VitalsBook

# The report a message brings, given what is stored of it; None asks for the whole report.
Brought = Callable[[StoredReport, HostReport | None], HostReport | None]


class ReportIntake:
    """`database` holds the reports, `liveness` what was heard last."""

    def __init__(self, database: Database, liveness: LivenessBook, settings: Settings) -> None:
        self._database = database
        self._liveness = liveness
        self._settings = settings
        self.vitals = VitalsBook()

    def report(self, host: str, envelope: ReportEnvelope, *, now: datetime) -> HeartbeatReply:
        """Stores a report that differs from the stored one, or has a later moment: an equal picture that an agent sends
        again says that it is true after what was answered meanwhile. An older message than the last is dropped."""
        if envelope.report.host != host:
            raise PpecError(
                "auth.wrong_identity",
                f"the report is of host {envelope.report.host!r}, the certificate of {host!r}",
                hint="A host may report itself only.",
                subject=f"host {host}",
            )
        return self._take(host, envelope, lambda stored, picture: envelope.report, now)

    def delta(self, host: str, delta: ReportDelta, *, now: datetime) -> HeartbeatReply:
        """Stores exactly what the whole report would have; asks for that where the stored one is not the one that the
        delta was taken off. An older message than the last is dropped."""

        def changed(stored: StoredReport, picture: HostReport | None) -> HostReport | None:
            return None if _set_back(stored, _id_of(delta)) else _put_to(delta, stored, picture)

        return self._take(host, delta, changed, now)

    def heartbeat(self, host: str, beat: Heartbeat, *, now: datetime) -> HeartbeatReply:
        """Asks for the full report when the stored one has another digest, or is of a time before the host's clock was
        set back: its moments would be later than all that is to come."""
        message = _id_of(beat)
        heard = self._liveness.heard(host)
        if heard is not None and beat.digest in heard.digests and message > heard.message:
            self._liveness.note(host, Heard(heard.host_id, message, heard.digests, now))
            self._take_vitals(host, heard.host_id, beat.vitals, now)
            return self._reply(send_report=False)
        with self._database.read() as conn:
            stored = stored_report(conn, host)
            known = _digests(stored)
            if beat.digest not in known:
                picture = stored_picture(conn, stored.host_id)
                known |= frozenset() if picture is None else {picture.digest_as_spoken()}
        if not self._accepts(host, stored, message, now):
            return self._reply(send_report=False)
        self._liveness.note(host, Heard(stored.host_id, message, known, now))
        self._take_vitals(host, stored.host_id, beat.vitals, now)
        return self._reply(send_report=beat.digest not in known or _set_back(stored, message))

    def _take(self, host: str, said: ReportEnvelope | ReportDelta, brought: Brought, now: datetime) -> HeartbeatReply:
        message = _id_of(said)
        while True:
            with self._database.read() as conn:
                stored = stored_report(conn, host)
                picture = stored_picture(conn, stored.host_id) if isinstance(said, ReportDelta) else None
            if not self._accepts(host, stored, message, now):
                return self._reply(send_report=False)
            report = brought(stored, picture)
            if report is None:
                known = _digests(stored)
                break
            digest = report.digest()
            known = frozenset({digest, report.digest_as_spoken()})
            if stored.digest == digest and not _is_later(stored, message, said.snapshot_tick):
                break
            new = NewReport(stored.host_id, message, digest, report, stored.message, said.snapshot_tick)
            with self._database.write() as conn:
                if apply_report(conn, new, now=now):
                    break
            # Another message of this host came in between: see whether this one is still the newer.
        self._liveness.note(host, Heard(stored.host_id, message, known, now))
        self._take_vitals(host, stored.host_id, said.vitals, now)
        return self._reply(send_report=report is None)

    def _take_vitals(self, host: str, host_id: int, vitals: Vitals | None, now: datetime) -> None:
        if vitals is None:
            return
        # Asked each time, once in a report interval: another replica may have heard something else meanwhile.
        with self._database.read() as conn:
            news = differs(conn, host_id, vitals.health)
        if news:
            with self._database.write() as conn:
                apply_health(conn, host_id, vitals.health, now=now)
        self.vitals.note(host, vitals, now=now)

    def _accepts(self, host: str, stored: StoredReport, message: MessageId, now: datetime) -> bool:
        last, last_at = stored.message, stored.last_seen_at
        heard = self._liveness.heard(host)
        if heard is not None and (last is None or heard.message > last):
            last, last_at = heard.message, heard.at
        return self._liveness.accepts(last, last_at, message, now=now)

    def _reply(self, *, send_report: bool) -> HeartbeatReply:
        return HeartbeatReply(
            send_report=send_report,
            heartbeat_interval_s=self._settings.heartbeat_interval_s,
            report_interval_s=self._settings.report_interval_s,
            takes_deltas=True,
        )


def _id_of(said: ReportEnvelope | ReportDelta | Heartbeat) -> MessageId:
    return MessageId(said.agent_started_at_unix_ms, said.sequence)


def _set_back(stored: StoredReport, message: MessageId) -> bool:
    """Whether the message is of an earlier process than the stored report: the host's clock was set back."""
    last = stored.message
    return last is not None and message.agent_started_at_unix_ms < last.agent_started_at_unix_ms


def _digests(stored: StoredReport) -> frozenset[str]:
    return frozenset() if stored.digest is None else frozenset({stored.digest})


def _put_to(delta: ReportDelta, stored: StoredReport, picture: HostReport | None) -> HostReport | None:
    """The report that the delta makes of the stored one; None unless both are those that it names."""
    if picture is None or stored.digest != delta.before:
        return None
    try:
        report = delta.changes.put_to(picture)
    except ValueError:
        # More than a report holds.
        return None
    return report if report.digest() == delta.after else None


def _is_later(stored: StoredReport, message: MessageId, tick: int | None) -> bool:
    """Whether the report's moment, if it has one, is another than the stored one's: the message is the later one."""
    if tick is None or stored.message is None:
        return False
    return (message.agent_started_at_unix_ms, tick) != (stored.message.agent_started_at_unix_ms, stored.tick)
