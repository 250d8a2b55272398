# SPDX-License-Identifier: Apache-2.0
"""Reports: whole when something changed, else heartbeats; an absent orchestrator disturbs nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from ppec_agentd.report import ReportSource
from ppec_agentd.reporter import Reporter
from ppec_agentd.settings import ReportSettings
from ppec_contract.errors import PpecError
from ppec_contract.host import Heartbeat, HeartbeatReply, HostReport, ReportEnvelope
from ppec_contract.host_delta import ReportDelta
from ppec_lab.conditions import wait_until

# Long enough for a loaded machine; reached only when a test fails.
SOON_S = 60


class Sink:
    """Keeps what it is sent; `wants_report` asks for the report in answer to the next heartbeat or delta.
    One that is `modern` takes deltas and says so; another refuses them."""

    def __init__(self, *, modern: bool = False) -> None:
        self.sent: list[ReportEnvelope | ReportDelta | Heartbeat] = []
        self.wants_report = False
        self.modern = modern
        self.away = False
        self.tries = 0

    def send_report(self, envelope: ReportEnvelope) -> None:
        self._take(envelope)

    def send_delta(self, delta: ReportDelta) -> HeartbeatReply:
        if not self.modern:
            raise PpecError("internal.error", "answered 405")
        return self._reply(delta)

    def send_heartbeat(self, heartbeat: Heartbeat) -> HeartbeatReply:
        return self._reply(heartbeat)

    def _reply(self, message: ReportDelta | Heartbeat) -> HeartbeatReply:
        self._take(message)
        wants, self.wants_report = self.wants_report, False
        return HeartbeatReply(
            send_report=wants, heartbeat_interval_s=10.0, report_interval_s=60.0, takes_deltas=self.modern
        )

    def _take(self, message: ReportEnvelope | ReportDelta | Heartbeat) -> None:
        self.tries += 1
        if self.away:
            raise PpecError("host.unreachable", "nobody there")
        self.sent.append(message)

    def kinds(self) -> list[str]:
        return [type(message).__name__ for message in self.sent]


async def until(condition: Callable[[], object], what: str) -> None:
    await asyncio.to_thread(wait_until, condition, what, timeout_s=SOON_S)


def test_a_change_is_reported_whole_and_the_rest_are_heartbeats(settings: Any, words: Any, vm: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            sink = Sink()
            reporter = Reporter(ReportSource("h1", agent.context), sink, ReportSettings())
            await reporter.beat()
            await reporter.beat()
            reporter.touch()  # something happened, and nothing is different
            await reporter.beat()
            assert sink.kinds() == ["ReportEnvelope", "Heartbeat", "Heartbeat"]
            await agent.create(vm())
            reporter.touch()
            await reporter.beat()
            sink.wants_report = True
            await reporter.beat()
            assert sink.kinds()[3:] == ["ReportEnvelope", "Heartbeat", "ReportEnvelope"]
            first, _, third, changed, beat, asked = sink.sent
            assert isinstance(first, ReportEnvelope)
            assert isinstance(third, Heartbeat)
            assert third.digest == first.report.digest()
            assert isinstance(changed, ReportEnvelope)
            assert isinstance(beat, Heartbeat)
            assert isinstance(asked, ReportEnvelope)
            assert beat.digest == changed.report.digest() == asked.report.digest()
            assert [message.sequence for message in sink.sent] == [1, 2, 3, 4, 5, 6]
            assert [v.state for v in changed.report.vms] == ["running"]

    asyncio.run(scenario())


def test_what_changed_is_told_to_who_takes_deltas(settings: Any, words: Any, vm: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            sink = Sink(modern=True)
            reporter = Reporter(ReportSource("h1", agent.context), sink, ReportSettings())

            async def create_and_beat() -> HostReport:
                await agent.create(vm())
                reporter.touch()
                await reporter.beat()
                return await ReportSource("h1", agent.context).build()

            # Who takes deltas is known from the first answer that says so.
            await reporter.beat()
            await reporter.beat()
            first = sink.sent[0]
            assert isinstance(first, ReportEnvelope)
            seen = await create_and_beat()
            sink.wants_report = True
            await create_and_beat()
            # Before the next one an older orchestrator is put in its place: it refuses, and is told the whole.
            sink.modern = False
            with pytest.raises(PpecError):
                await create_and_beat()
            reporter.touch()
            await reporter.beat()
            await create_and_beat()
            assert sink.kinds() == [
                *("ReportEnvelope", "Heartbeat", "ReportDelta"),
                *("ReportDelta", "ReportEnvelope"),
                *("ReportEnvelope", "ReportEnvelope"),
            ]
            told = sink.sent[2]
            assert isinstance(told, ReportDelta)
            assert (told.before, told.after) == (first.report.digest(), seen.digest())
            assert told.changes.put_to(first.report) == seen
            assert told.changes.model_dump().keys() == {"cells", "vms", "disk_free_mib"}

    asyncio.run(scenario())


def test_an_answer_is_followed_by_a_delta_even_of_an_equal_picture(settings: Any, words: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            sink = Sink(modern=True)
            reporter = Reporter(ReportSource("h1", agent.context), sink, ReportSettings())
            await reporter.beat()
            await reporter.beat()
            answered = agent.context.moments.observed()
            reporter.touch()
            await reporter.beat()
            told = sink.sent[-1]
            assert isinstance(told, ReportDelta)
            assert told.before == told.after
            assert told.snapshot_tick is not None
            assert told.snapshot_tick > answered.tick
            assert told.changes.model_dump() == {}

    asyncio.run(scenario())


def test_a_report_that_got_lost_is_sent_again(settings: Any, words: Any, vm: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            sink = Sink()
            sink.away = True
            reporter = Reporter(ReportSource("h1", agent.context), sink, ReportSettings(longest_backoff_s=0.05))
            running = asyncio.create_task(reporter.run())
            await until(lambda: sink.tries > 0, "the first report gets lost")
            (result,) = await agent.create(vm())
            assert result.problem is None
            # The first try from now may be with a report from before; the second isn't.
            lost = sink.tries + 2
            await until(lambda: sink.tries >= lost, "the report of the change gets lost")
            sink.away = False
            await until(lambda: sink.sent, "it is sent again")
            assert isinstance(sink.sent[0], ReportEnvelope)
            assert len(sink.sent[0].report.vms) == 1
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running

    asyncio.run(scenario())


def test_the_process_reports_over_https_as_its_host(
    agent_process: Callable[..., Any], orchestrator: Callable[..., Any], vm: Any
) -> None:
    server = orchestrator()
    agent = agent_process(
        reports={"orchestrator_url": server.url, "heartbeat_interval_s": 0.5, "longest_backoff_s": 0.5}, tls=server.tls
    ).start()
    wait_until(lambda: server.sent("PUT"), "the first report", timeout_s=SOON_S)
    wait_until(lambda: server.sent("POST"), "a heartbeat", timeout_s=SOON_S)
    assert {path for _, path, _ in server.requests} == {"/v1/hosts/h1/report", "/v1/hosts/h1/heartbeat"}
    assert set(server.peers) == {"ppec://host/h1"}
    first = ReportEnvelope.model_validate(server.sent("PUT")[0])
    assert server.sent("POST")[0]["digest"] == first.report.digest()
    one = vm()
    request = {"operation_id": "op-1", "fence": 1, "vms": [one.model_dump(mode="json")]}
    server.answers["PUT"] = (503, {"code": "store.unavailable", "detail": "away"})
    assert agent.client().call("CreateVms", request)["parameters"]["results"][0]["problem"] is None
    served = HostReport.model_validate(agent.client().call("GetReport")["parameters"]["report"])
    assert [v.vm_id for v in served.vms] == [one.vm_id]

    def reports_of_the_change() -> int:
        return sum(HostReport.model_validate(sent["report"]) == served for sent in server.sent("PUT"))

    wait_until(lambda: reports_of_the_change() >= 2, "what was refused is sent again", timeout_s=SOON_S)
    assert {beat["digest"] for beat in server.sent("POST")} == {first.report.digest()}
    server.answers["PUT"] = (204, None)
    # Heartbeats tell the digest of the last report that was taken.
    taken = "the report is taken"
    wait_until(lambda: server.sent("POST")[-1]["digest"] == served.digest(), taken, timeout_s=SOON_S)
    assert HostReport.model_validate(server.sent("PUT")[-1]["report"]) == served
    assert agent.end() == 0
