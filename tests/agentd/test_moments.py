# SPDX-License-Identifier: Apache-2.0
"""Reports carry a moment from before their first look, answers one from after their last; and what was answered since
the last report is followed by a report, even if the picture is the same."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from ppec_agentd.journal import Key
from ppec_agentd.moments import Moments
from ppec_agentd.recovery import recover
from ppec_agentd.report import ReportSource
from ppec_agentd.reporter import Reporter
from ppec_agentd.settings import ReportSettings
from ppec_contract.agent import DeleteVms, StartVms, StopVms, VmResult
from ppec_contract.host import Heartbeat, HeartbeatReply, ReportEnvelope


class Watched:
    """A hypervisor that notes the moment of every call before it begins and after it ended. `meanwhile` is done once,
    when the domains have been looked at for a report."""

    def __init__(self, hypervisor: Any, moments: Moments) -> None:
        self._hypervisor = hypervisor
        self._moments = moments
        self.looks: list[int] = []
        self.meanwhile: Callable[[], Awaitable[object]] | None = None

    def __getattr__(self, name: str) -> Any:
        called = getattr(self._hypervisor, name)
        if not asyncio.iscoroutinefunction(called):
            return called

        async def noted(*arguments: Any, **named: Any) -> Any:
            self.looks.append(self._moments.before_snapshot())
            try:
                return await called(*arguments, **named)
            finally:
                self.looks.append(self._moments.before_snapshot())
                if name == "domains" and self.meanwhile is not None:
                    do, self.meanwhile = self.meanwhile, None
                    await do()

        return noted


class Sink:
    def __init__(self) -> None:
        self.sent: list[ReportEnvelope | Heartbeat] = []

    def send_report(self, envelope: ReportEnvelope) -> None:
        self.sent.append(envelope)

    def send_heartbeat(self, heartbeat: Heartbeat) -> HeartbeatReply:
        self.sent.append(heartbeat)
        return HeartbeatReply(send_report=False, heartbeat_interval_s=10.0, report_interval_s=60.0)

    def last_report(self) -> ReportEnvelope:
        last = self.sent[-1]
        assert isinstance(last, ReportEnvelope)
        return last


def watch(agent: Any) -> Watched:
    watched = Watched(agent.context.hypervisor, agent.context.moments)
    agent.context.hypervisor = watched
    return watched


def tick_of(result: VmResult) -> int:
    assert result.problem is None, result.problem
    assert result.observed_at is not None
    return result.observed_at.tick


def test_a_report_is_stamped_before_its_first_look(settings: Any, words: Any, vm: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            await agent.create(vm())
            watched, sink = watch(agent), Sink()
            await Reporter(ReportSource("h1", agent.context), sink, ReportSettings()).beat()
            sent = sink.last_report()
            assert sent.agent_started_at_unix_ms == agent.context.moments.started_at_unix_ms
            assert len(watched.looks) >= 4
            assert sent.snapshot_tick is not None
            assert sent.snapshot_tick < min(watched.looks)

    asyncio.run(scenario())


def test_an_answer_is_stamped_after_its_last_look(settings: Any, words: Any, vm: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            watched, one = watch(agent), vm()
            ids = {"fence": 1, "vm_ids": (one.vm_id,)}
            answered = [
                await agent.create(one),
                await agent.run(StopVms(operation_id="op-2", force=True, timeout_s=0, **ids)),
                await agent.run(StartVms(operation_id="op-3", **ids)),
                await agent.run(DeleteVms(operation_id="op-4", **ids)),
            ]
            looked = 0
            for (result,) in answered:
                before = [look for look in watched.looks if look < tick_of(result)]
                assert len(before) > looked, "each has looked anew"
                looked = len(before)
            assert looked == len(watched.looks), "and not once more after the last"

    asyncio.run(scenario())


@pytest.mark.parametrize("changes", [True, False])
def test_what_was_answered_is_followed_by_a_report_of_a_later_moment(
    settings: Any, words: Any, vm: Any, *, changes: bool
) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            one, sink = vm(), Sink()
            await agent.create(one)
            reporter = Reporter(ReportSource("h1", agent.context), sink, ReportSettings())
            await reporter.beat()
            first = sink.last_report()
            ids = {"fence": 1, "vm_ids": (one.vm_id,)}
            if changes:
                await agent.run(StopVms(operation_id="op-2", force=True, timeout_s=0, **ids))
            (result,) = await agent.run(StartVms(operation_id="op-3", **ids))
            assert result.changed is changes
            reporter.touch()
            await reporter.beat()
            again = sink.last_report()
            assert again.report.digest() == first.report.digest()
            assert again.snapshot_tick is not None
            assert again.snapshot_tick > tick_of(result)
            reporter.touch()
            await reporter.beat()
            assert isinstance(sink.sent[-1], Heartbeat), "once is enough"

    asyncio.run(scenario())


def test_a_report_under_way_during_an_answer_is_followed_by_another(settings: Any, words: Any, vm: Any) -> None:
    """The orchestrator leaves the VM aside that the first of them speaks of, and may never see its digest change."""

    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            one, sink, results = vm(), Sink(), []
            await agent.create(one)
            watched = watch(agent)
            reporter = Reporter(ReportSource("h1", agent.context), sink, ReportSettings())

            async def start() -> None:
                results.extend(await agent.run(StartVms(operation_id="op-2", fence=1, vm_ids=(one.vm_id,))))

            watched.meanwhile = start
            await reporter.beat()
            first = sink.last_report()
            assert first.snapshot_tick is not None
            assert first.snapshot_tick < tick_of(results[0])
            reporter.touch()
            await reporter.beat()
            second = sink.last_report()
            assert second.report == first.report
            assert second.snapshot_tick is not None
            assert second.snapshot_tick > tick_of(results[0])

    asyncio.run(scenario())


def test_an_answer_from_the_journal_keeps_its_first_moment(settings: Any, words: Any, vm: Any) -> None:
    one = vm()

    async def life() -> tuple[VmResult, int]:
        async with words.open_agent(settings) as agent:
            (result,) = await agent.create(one)
            return result, agent.context.moments.started_at_unix_ms

    first, started = asyncio.run(life())
    again, started_again = asyncio.run(life())
    assert again.replayed
    assert again.observed_at == first.observed_at
    assert first.observed_at is not None
    assert (first.observed_at.agent_started_at_unix_ms, started_again > started) == (started, True)


def test_what_recovery_answers_is_of_the_recovering_process(settings: Any, words: Any, vm: Any) -> None:
    one = vm()

    async def first_life() -> None:
        async with words.open_agent(settings) as agent:
            await agent.create(one)
            # As a crash before the answer leaves it.
            agent.context.journal.append_intents("op-1", 1, [(Key("op-1", "CreateVms", str(one.vm_id)), one.name)])

    async def second_life() -> None:
        async with words.open_agent(settings) as agent:
            watched = watch(agent)
            assert (await recover(agent.context)).finished == (str(one.vm_id),)
            (result,) = await agent.create(one)
            assert result.replayed
            assert result.observed_at is not None
            assert result.observed_at.agent_started_at_unix_ms == agent.context.moments.started_at_unix_ms
            assert tick_of(result) > min(watched.looks)

    asyncio.run(first_life())
    asyncio.run(second_life())
