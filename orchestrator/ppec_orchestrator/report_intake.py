# SPDX-License-Identifier: Apache-2.0
"""Takes hosts' reports and heartbeats in. An unchanged host costs a row read at most, and no row written."""

from __future__ import annotations

from datetime import datetime

from ppec_contract.errors import PpecError
from ppec_contract.host import Heartbeat, HeartbeatReply, ReportEnvelope
from ppec_orchestrator.liveness import Heard, LivenessBook, MessageId
from ppec_orchestrator.settings import Settings
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.reports import NewReport, StoredReport, apply_report, stored_report


class ReportIntake:
    """`database` holds the reports, `liveness` what was heard last."""

    def __init__(self, database: Database, liveness: LivenessBook, settings: Settings) -> None:
        self._database = database
        self._liveness = liveness
        self._settings = settings

    def report(self, host: str, envelope: ReportEnvelope, *, now: datetime) -> HeartbeatReply:
        """Stores a report that differs from the stored one. An older message than the last is dropped."""
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
            if stored.digest == digest:
                break
            new = NewReport(stored.host_id, message, digest, envelope.report, after=stored.message)
            with self._database.write() as conn:
                if apply_report(conn, new, now=now):
                    break
            # Another message of this host came in between: see whether this one is still the newer.
        self._liveness.note(host, Heard(stored.host_id, message, digest, now))
        return self._reply(send_report=False)

    def heartbeat(self, host: str, beat: Heartbeat, *, now: datetime) -> HeartbeatReply:
        """Asks for the full report when the stored one has another digest."""
        message = MessageId(beat.agent_started_at_unix_ms, beat.sequence)
        heard = self._liveness.heard(host)
        if heard is not None and heard.digest == beat.digest and message > heard.message:
            self._liveness.note(host, Heard(heard.host_id, message, heard.digest, now))
            return self._reply(send_report=False)
        stored = self._stored(host)
        if not self._accepts(host, stored, message, now):
            return self._reply(send_report=False)
        self._liveness.note(host, Heard(stored.host_id, message, stored.digest, now))
        return self._reply(send_report=stored.digest != beat.digest)

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
