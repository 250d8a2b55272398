# SPDX-License-Identifier: Apache-2.0
"""Takes hosts' reports and heartbeats in. An unchanged host costs a row read at most, and no row written."""

from __future__ import annotations

from datetime import datetime

from ppec_contract.errors import PpecError
from ppec_contract.host import Heartbeat, HeartbeatReply, ReportEnvelope, Vitals
from ppec_orchestrator.liveness import Heard, LivenessBook, MessageId
from ppec_orchestrator.settings import Settings
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.host_health import apply_health, differs
from ppec_orchestrator.store.reports import NewReport, StoredReport, apply_report, stored_report
from ppec_orchestrator.vitals_book import VitalsBook


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
        message = MessageId(envelope.agent_started_at_unix_ms, envelope.sequence)
        digest = envelope.report.digest()
        while True:
            stored = self._stored(host)
            if not self._accepts(host, stored, message, now):
                return self._reply(send_report=False)
            if stored.digest == digest and not _is_later(stored, message, envelope.snapshot_tick):
                break
            new = NewReport(stored.host_id, message, digest, envelope.report, stored.message, envelope.snapshot_tick)
            with self._database.write() as conn:
                if apply_report(conn, new, now=now):
                    break
            # Another message of this host came in between: see whether this one is still the newer.
        self._liveness.note(host, Heard(stored.host_id, message, digest, now))
        self._take_vitals(host, stored.host_id, envelope.vitals, now)
        return self._reply(send_report=False)

    def heartbeat(self, host: str, beat: Heartbeat, *, now: datetime) -> HeartbeatReply:
        """Asks for the full report when the stored one has another digest, or is of a time before the host's clock was
        set back: its moments would be later than all that is to come."""
        message = MessageId(beat.agent_started_at_unix_ms, beat.sequence)
        heard = self._liveness.heard(host)
        if heard is not None and heard.digest == beat.digest and message > heard.message:
            self._liveness.note(host, Heard(heard.host_id, message, heard.digest, now))
            self._take_vitals(host, heard.host_id, beat.vitals, now)
            return self._reply(send_report=False)
        stored = self._stored(host)
        if not self._accepts(host, stored, message, now):
            return self._reply(send_report=False)
        self._liveness.note(host, Heard(stored.host_id, message, stored.digest, now))
        self._take_vitals(host, stored.host_id, beat.vitals, now)
        set_back = stored.message is not None and (
            message.agent_started_at_unix_ms < stored.message.agent_started_at_unix_ms
        )
        return self._reply(send_report=stored.digest != beat.digest or set_back)

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

    def _stored(self, host: str) -> StoredReport:
        with self._database.read() as conn:
            return stored_report(conn, host)

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
        )


def _is_later(stored: StoredReport, message: MessageId, tick: int | None) -> bool:
    """Whether the report's moment, if it has one, is another than the stored one's: the message is the later one."""
    if tick is None or stored.message is None:
        return False
    return (message.agent_started_at_unix_ms, tick) != (stored.message.agent_started_at_unix_ms, stored.tick)
