# SPDX-License-Identifier: Apache-2.0
"""Sends the host's report to the orchestrator: whole at first and when it is asked for, then what changed, and a
heartbeat of its digest while nothing does.

A change is sent within about a second; whole to an orchestrator that doesn't say that it takes deltas. While the
orchestrator is away the pauses grow, and nothing else of the agent notices. All intervals are jittered, so that a fleet
that started together doesn't report together.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from typing import Protocol

import structlog

from ppec_agentd.moments import Moments
from ppec_agentd.orchestrator_link import OrchestratorLink
from ppec_agentd.settings import ReportSettings
from ppec_contract.errors import PpecError
from ppec_contract.host import HealthFinding, Heartbeat, HeartbeatReply, HostReport, ReportEnvelope, Vitals
from ppec_contract.host_delta import ReportDelta, changes_between

log = structlog.get_logger(__name__)
# Changes come in bursts (define, start, commit): wait this long for the burst to end.
SETTLE_S = 0.3
FIRST_BACKOFF_S = 1.0


# A hypervisor that takes longer to show its domains is not waited for: the orchestrator hears of that, too.
SNAPSHOT_S = 8.0


class PictureSource(Protocol):
    """What `report.ReportSource` offers: the host as it is now, in the order of the agent's moments."""

    @property
    def moments(self) -> Moments: ...

    async def snapshot(self) -> tuple[int, HostReport]: ...


class HealthSource(Protocol):
    """What `health_watch.HealthWatch` offers: the findings of its last look, none before the first."""

    @property
    def findings(self) -> tuple[HealthFinding, ...]: ...

    async def vitals(self) -> Vitals: ...


class Sink(Protocol):
    """Where reports go: `PUT` and `PATCH …/report`, `POST …/heartbeat`. The first may get no reply but "taken"."""

    def send_report(self, envelope: ReportEnvelope) -> HeartbeatReply | None: ...

    def send_delta(self, delta: ReportDelta) -> HeartbeatReply: ...

    def send_heartbeat(self, heartbeat: Heartbeat) -> HeartbeatReply: ...


class OrchestratorSink:
    """The orchestrator's API over HTTPS. Blocking."""

    def __init__(self, host: str, link: OrchestratorLink) -> None:
        self._path = f"/v1/hosts/{host}"
        self._link = link

    def send_report(self, envelope: ReportEnvelope) -> HeartbeatReply | None:
        answer = self._link.send_json("PUT", f"{self._path}/report", envelope.model_dump_json().encode())
        return _reply(answer) if answer else None

    def send_delta(self, delta: ReportDelta) -> HeartbeatReply:
        return _reply(self._link.send_json("PATCH", f"{self._path}/report", delta.model_dump_json().encode()))

    def send_heartbeat(self, heartbeat: Heartbeat) -> HeartbeatReply:
        return _reply(self._link.send_json("POST", f"{self._path}/heartbeat", heartbeat.model_dump_json().encode()))


def _reply(answer: dict[str, object]) -> HeartbeatReply:
    # A newer orchestrator may say more: what this agent doesn't know it leaves alone.
    return HeartbeatReply.model_validate({k: v for k, v in answer.items() if k in HeartbeatReply.model_fields})


class Reporter:
    """`touch` whenever something may have changed, `wake` if only the health has; `run` until cancelled.

    A hypervisor that is away or hangs keeps no heartbeat back: the last report stands, and the health says what is up.
    """

    def __init__(
        self,
        source: PictureSource,
        sink: Sink,
        settings: ReportSettings,
        health: HealthSource | None = None,
        *,
        snapshot_s: float = SNAPSHOT_S,
    ) -> None:
        self._source = source
        self._sink = sink
        self._settings = settings
        self._health = health
        self._snapshot_s = snapshot_s
        self._heartbeat_interval_s = settings.heartbeat_interval_s
        self._report_interval_s = settings.report_interval_s
        self._woken = asyncio.Event()
        self._touched = True
        self._started_at_unix_ms = source.moments.started_at_unix_ms
        self._sequence = 0
        # The report that the orchestrator has, as far as its answers say.
        self._told_report: HostReport | None = None
        self._digest = ""
        self._takes_deltas = False
        self._snapshot_tick = 0
        self._reported_s = float("-inf")
        self._told_health: tuple[HealthFinding, ...] = ()
        self._told_use_s = float("-inf")
        self._failures = 0

    def touch(self) -> None:
        self._touched = True
        self._woken.set()

    def wake(self) -> None:
        """Have a message sent soon, without a look at the hypervisor."""
        self._woken.set()

    async def run(self) -> None:
        while True:
            try:
                await self.beat()
            except Exception as error:
                self._failures += 1
                # The first failure is worth a line; an orchestrator that is away for a day is not worth thousands.
                say = log.warning if self._failures == 1 else log.debug
                say("report_failed", why=str(error), failures=self._failures)
                self._touched = True
                await asyncio.sleep(self._backoff_s())
                continue
            if self._failures:
                log.info("reports_resumed", failures=self._failures)
            self._failures = 0
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_jittered(self._heartbeat_interval_s)):
                    await self._woken.wait()
                await asyncio.sleep(SETTLE_S)

    async def beat(self) -> None:
        """Sends what is due: what changed if anything did, else a heartbeat."""
        self._woken.clear()
        due = time.monotonic() - self._reported_s >= self._report_interval_s
        if not self._touched and not due:
            await self._heartbeat()
            return
        seen = await self._snapshot()
        if seen is None:
            await self._heartbeat()
            return
        tick, report = seen
        # An answer later than the last report stands in that report's place, or will when it arrives: what is true now
        # must be told even if it is what was true before.
        answered = self._source.moments.observed_since(self._snapshot_tick)
        if report.digest() == self._digest and not answered:
            self._reported_s = time.monotonic()
            await self._heartbeat()
        else:
            await self._change(tick, report)

    async def _snapshot(self) -> tuple[int, HostReport] | None:
        """None while the hypervisor doesn't answer; the look is then made up for with the next message."""
        self._touched = False
        try:
            async with asyncio.timeout(self._snapshot_s):
                return await self._source.snapshot()
        except (TimeoutError, PpecError) as error:
            # With no report at all there is nothing that a heartbeat could stand for.
            if not self._digest or (isinstance(error, PpecError) and error.code != "hypervisor.unavailable"):
                raise
            self._touched = True
            log.debug("report_put_off", why=str(error))
            return None

    async def _change(self, snapshot_tick: int, report: HostReport) -> None:
        """Tells what changed since the last report, or the whole of it where that can't be done."""
        told = self._told_report
        changes = changes_between(told, report) if self._takes_deltas and told is not None else None
        if changes is None:
            await self._report(snapshot_tick, report)
            return
        vitals, digest = await self._due_vitals(), report.digest()
        delta = ReportDelta(
            agent_started_at_unix_ms=self._started_at_unix_ms,
            sequence=self._next_sequence(),
            before=self._digest,
            after=digest,
            changes=changes,
            snapshot_tick=snapshot_tick,
            vitals=vitals,
        )
        # Until it is answered nobody knows which report the orchestrator has, nor whether it is one of before deltas.
        self._takes_deltas = False
        reply = await asyncio.to_thread(self._sink.send_delta, delta)
        self._told(vitals)
        self._heed(reply)
        if reply.send_report:
            await self._report(snapshot_tick, report)
        else:
            self._reported(snapshot_tick, report, digest)

    async def _report(self, snapshot_tick: int, report: HostReport) -> None:
        vitals = await self._due_vitals()
        envelope = ReportEnvelope(
            agent_started_at_unix_ms=self._started_at_unix_ms,
            sequence=self._next_sequence(),
            report=report,
            snapshot_tick=snapshot_tick,
            vitals=vitals,
        )
        reply = await asyncio.to_thread(self._sink.send_report, envelope)
        self._told(vitals)
        if reply is not None:
            self._heed(reply)
        self._reported(snapshot_tick, report, report.digest())

    def _reported(self, snapshot_tick: int, report: HostReport, digest: str) -> None:
        self._told_report, self._digest = report, digest
        self._snapshot_tick = snapshot_tick
        self._reported_s = time.monotonic()

    async def _heartbeat(self) -> None:
        vitals = await self._due_vitals()
        heartbeat = Heartbeat(
            agent_started_at_unix_ms=self._started_at_unix_ms,
            sequence=self._next_sequence(),
            digest=self._digest,
            vitals=vitals,
        )
        reply = await asyncio.to_thread(self._sink.send_heartbeat, heartbeat)
        self._told(vitals)
        self._heed(reply)
        if reply.send_report and (seen := await self._snapshot()) is not None:
            await self._report(*seen)

    def _heed(self, reply: HeartbeatReply) -> None:
        self._heartbeat_interval_s = min(max(reply.heartbeat_interval_s, 0.5), 3600.0)
        self._report_interval_s = min(max(reply.report_interval_s, 1.0), 86400.0)
        self._takes_deltas = reply.takes_deltas

    async def _due_vitals(self) -> Vitals | None:
        """When a check changed, and once in each report interval: the use has changed by then."""
        if self._health is None or not self._health.findings:
            return None
        due = time.monotonic() - self._told_use_s >= self._report_interval_s
        return await self._health.vitals() if due or self._health.findings != self._told_health else None

    def _told(self, vitals: Vitals | None) -> None:
        if vitals is not None:
            self._told_health, self._told_use_s = vitals.health, time.monotonic()

    def _next_sequence(self) -> int:
        self._sequence += 1
        return self._sequence

    def _backoff_s(self) -> float:
        return _jittered(min(FIRST_BACKOFF_S * 2 ** min(self._failures - 1, 16), self._settings.longest_backoff_s))


def _jittered(seconds: float) -> float:
    return seconds * random.uniform(0.75, 1.0)  # noqa: S311 - spreads load, guards nothing
