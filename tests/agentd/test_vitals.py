# SPDX-License-Identifier: Apache-2.0
"""What changes by itself goes with the messages when it is due; a hypervisor that is away keeps none of them back."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ppec_agentd.health_watch import HealthWatch
from ppec_agentd.report import ReportSource
from ppec_agentd.reporter import Reporter
from ppec_agentd.settings import ReportSettings
from ppec_contract.errors import PpecError
from ppec_contract.host import Heartbeat, HeartbeatReply, ReportEnvelope
from ppec_contract.host_delta import ReportDelta

SOON_S = 60


class Sink:
    """Keeps what it is sent."""

    def __init__(self, report_interval_s: float = 60.0) -> None:
        self.report_interval_s = report_interval_s
        self.sent: list[ReportEnvelope | ReportDelta | Heartbeat] = []
        self.wants_report = False

    def send_report(self, envelope: ReportEnvelope) -> None:
        self.sent.append(envelope)

    def send_delta(self, delta: ReportDelta) -> HeartbeatReply:
        raise AssertionError("this orchestrator doesn't say that it takes deltas")

    def send_heartbeat(self, heartbeat: Heartbeat) -> HeartbeatReply:
        self.sent.append(heartbeat)
        return HeartbeatReply(
            send_report=self.wants_report, heartbeat_interval_s=10.0, report_interval_s=self.report_interval_s
        )

    def told(self) -> list[tuple[str, bool]]:
        return [(type(message).__name__, message.vitals is not None) for message in self.sent]


def watch_of(agent: Any) -> HealthWatch:
    storage = agent.settings.storage
    return HealthWatch(agent.hypervisor, agent.context.places, storage.images, probe_s=0.05)


def test_vitals_are_told_first_on_a_change_and_once_an_interval(settings: Any, words: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            sink, watch = Sink(), watch_of(agent)
            reporter = Reporter(ReportSource("h1", agent.context), sink, ReportSettings(), watch)
            await reporter.beat()  # before the first look there is nothing to tell
            await watch.look()
            for _ in range(3):
                await reporter.beat()
            agent.hypervisor.faults.delays_s["domain"] = 60.0
            await watch.look()
            for _ in range(2):
                await reporter.beat()
            beat = "Heartbeat"
            assert sink.told() == [
                ("ReportEnvelope", False),
                *((beat, True), (beat, False), (beat, False)),
                *((beat, True), (beat, False)),
            ]
            assert sink.sent[4].vitals is not None
            assert sink.sent[4].vitals.health == watch.findings

    asyncio.run(scenario())


def test_the_use_is_told_again_when_a_report_would_be_due(settings: Any, words: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            sink, watch = Sink(report_interval_s=1.0), watch_of(agent)
            reporter = Reporter(ReportSource("h1", agent.context), sink, ReportSettings(report_interval_s=1), watch)
            await watch.look()
            await reporter.beat()
            await asyncio.sleep(1.0)
            await reporter.beat()
            assert [with_vitals for _, with_vitals in sink.told()] == [True, True]

    asyncio.run(scenario())


@pytest.mark.parametrize("hangs", [True, False], ids=["hangs", "is-away"])
def test_heartbeats_go_on_while_the_hypervisor_shows_nothing(settings: Any, words: Any, vm: Any, hangs: bool) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            sink, watch = Sink(), watch_of(agent)
            reporter = Reporter(ReportSource("h1", agent.context), sink, ReportSettings(), watch, snapshot_s=0.2)
            await reporter.beat()
            await agent.create(vm())
            if hangs:
                agent.hypervisor.faults.delays_s.update({"facts": 600.0, "domain": 600.0})
            else:
                agent.hypervisor.cut_off()
            await watch.look()
            reporter.touch()
            sink.wants_report = True  # it can't be sent now, either
            async with asyncio.timeout(SOON_S):
                await reporter.beat()
            assert sink.told() == [("ReportEnvelope", False), ("Heartbeat", True)]
            first, beat = sink.sent
            assert isinstance(first, ReportEnvelope)
            assert isinstance(beat, Heartbeat)
            assert beat.digest == first.report.digest()
            assert beat.vitals is not None
            (said,) = (finding for finding in beat.vitals.health if finding.check == "libvirt")
            assert said.level == "error"
            # Back again: the change that could not be looked at is told, without another touch.
            agent.hypervisor.faults.delays_s.clear()
            agent.hypervisor.come_back()
            sink.wants_report = False
            await reporter.beat()
            last = sink.sent[-1]
            assert isinstance(last, ReportEnvelope)
            assert len(last.report.vms) == 1

    asyncio.run(scenario())


def test_without_any_report_yet_a_failure_is_a_failure(settings: Any, words: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            sink = Sink()
            reporter = Reporter(ReportSource("h1", agent.context), sink, ReportSettings(), watch_of(agent))
            agent.hypervisor.cut_off()
            with pytest.raises(PpecError) as caught:
                await reporter.beat()
            assert caught.value.code == "hypervisor.unavailable"
            assert sink.sent == []

    asyncio.run(scenario())
