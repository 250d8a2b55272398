# SPDX-License-Identifier: Apache-2.0
"""Deltas store what whole reports would have, whatever becomes of the messages, and write only what changed."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, delete, event, insert, select, update

from ppec_agentd.moments import Moments
from ppec_agentd.reporter import Reporter
from ppec_agentd.settings import ReportSettings
from ppec_contract.agent import VmResult
from ppec_contract.errors import PpecError
from ppec_contract.host import Heartbeat, HeartbeatReply, HostReport, ReportEnvelope
from ppec_contract.host_delta import ReportDelta, changes_between
from ppec_contract.vm import VmState
from ppec_orchestrator.liveness import LivenessBook
from ppec_orchestrator.report_intake import ReportIntake
from ppec_orchestrator.settings import Settings
from ppec_orchestrator.store import tables
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.observations import record_observed

from ..contract.host_reports import report, reports, vm

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
VMS = 4
STATE = (tables.host, tables.host_cell, tables.host_pool, tables.vm, tables.allocation, tables.allocation_cell)


@dataclass
class Orchestrator:
    """A record with the host `h1` and its VMs. `renew` is another replica's memory: empty."""

    database: Database
    folder: Path
    intake: ReportIntake = field(init=False)

    def __post_init__(self) -> None:
        with self.database.write() as conn:
            conn.execute(insert(tables.datacentre).values(id=1, name="dc1", region="r"))
            conn.execute(insert(tables.cluster).values(id=1, name="c1", datacentre_id=1, architecture="x86_64"))
            conn.execute(insert(tables.rack).values(id=1, name="r1", cluster_id=1))
            conn.execute(insert(tables.vrf).values(id=1, name="v1", description=""))
            image = {"name": "i", "format": "raw", "architecture": "x86_64", "sha256": "0" * 64}
            conn.execute(insert(tables.image).values(id=1, size_bytes=1, virtual_size_mib=1, **image))
        self.empty()

    def renew(self) -> None:
        liveness = LivenessBook(lambda seen: (), silent_after_s=30.0)
        self.intake = ReportIntake(self.database, liveness, Settings(state_dir=self.folder))

    def empty(self, vms: int = VMS) -> None:
        """No report yet; each VM's share is in cell 0."""
        self.renew()
        with self.database.write() as conn:
            for table in reversed(STATE):
                conn.execute(delete(table))
            place = {"rack_id": 1, "vrf_id": 1, "address": "127.0.0.1", "port": 7443}
            conn.execute(insert(tables.host).values(id=1, name="h1", enrolled_at=NOW, **place))
            for cell, used in ((0, vms), (1, 0)):
                size = {"socket": cell, "threads_per_core": 2, "cores": 7, "memory_mib": 14336}
                taken = {"cores_used": used, "memory_used_mib": 64 * used}
                conn.execute(insert(tables.host_cell).values(host_id=1, cell=cell, **size, **taken))
            for vm_id in map(UUID, (f"{number:032x}" for number in range(vms))):
                size = {"vcpus": 2, "memory_mib": 64, "disk_mib": 9}
                known = {"record": "active", "flavor": "f", "image_id": 1, "labels": {}, "operation_id": "o"}
                conn.execute(insert(tables.vm).values(id=vm_id, name=str(vm_id), created_at=NOW, **size, **known))
                conn.execute(insert(tables.allocation).values(vm_id=vm_id, host_id=1, disk_mib=9))
                conn.execute(insert(tables.allocation_cell).values(vm_id=vm_id, cell=0, cores=1, memory_mib=64))

    def answered(self, result: VmResult) -> None:
        with self.database.write() as conn:
            record_observed(conn, [result], NOW)

    def state(self) -> dict[str, list[dict[str, Any]]]:
        with self.database.read() as conn:
            return {
                # Marks of change count a database's own transactions.
                table.name: [
                    {name: value for name, value in row._mapping.items() if name != "changed"}
                    for row in conn.execute(select(table).order_by(*table.primary_key))
                ]
                for table in STATE
            }


class Wire:
    """Between an agent and its orchestrator. `fates` befall messages, one each; then all is well.

    What the orchestrator took, its twin is told whole: the record of a fleet that knows no deltas.
    """

    def __init__(self, real: Orchestrator, twin: Orchestrator, source: Source) -> None:
        self.real, self.twin, self.source = real, twin, source
        self.fates: list[str] = []
        self.late: list[ReportEnvelope | ReportDelta | Heartbeat] = []
        self.picture: dict[str, HostReport] = {}
        self.deltas_taken = 0

    def send_report(self, envelope: ReportEnvelope) -> HeartbeatReply:
        return self._send(ReportEnvelope.model_validate_json(envelope.model_dump_json()))

    def send_delta(self, sent: ReportDelta) -> HeartbeatReply:
        return self._send(ReportDelta.model_validate_json(sent.model_dump_json()))

    def send_heartbeat(self, beat: Heartbeat) -> HeartbeatReply:
        return self._send(beat)

    def _send(self, message: ReportEnvelope | ReportDelta | Heartbeat) -> HeartbeatReply:
        self.picture[self.source.report.digest()] = self.source.report
        fate = self.fates.pop(0) if self.fates else "well"
        if fate == "late":
            self.late.append(message)
        if fate in ("late", "lost"):
            raise PpecError("host.unreachable", fate)
        reply = self.deliver(message)
        if fate == "twice":
            reply = self.deliver(message)
        while self.late:
            self.deliver(self.late.pop())
        if fate == "reply lost":
            raise PpecError("host.unreachable", fate)
        return reply

    def deliver(self, message: ReportEnvelope | ReportDelta | Heartbeat) -> HeartbeatReply:
        if isinstance(message, Heartbeat):
            return self.real.intake.heartbeat("h1", message, now=NOW)
        if isinstance(message, ReportEnvelope):
            whole, reply = message, self.real.intake.report("h1", message, now=NOW)
        else:
            reply = self.real.intake.delta("h1", message, now=NOW)
            whole = ReportEnvelope(
                agent_started_at_unix_ms=message.agent_started_at_unix_ms,
                sequence=message.sequence,
                report=HostReport.model_validate_json(self.picture[message.after].model_dump_json()),
                snapshot_tick=message.snapshot_tick,
            )
        if not reply.send_report:
            self.twin.intake.report("h1", whole, now=NOW)
            self.deltas_taken += isinstance(message, ReportDelta)
        assert self.real.state() == self.twin.state(), message
        return reply


class Source:
    """A host that is as the test says."""

    def __init__(self) -> None:
        self.moments = Moments()
        self.report = report()

    async def snapshot(self) -> tuple[int, HostReport]:
        return self.moments.before_snapshot(), self.report


@pytest.fixture
def real(database: Database, tmp_path: Path) -> Orchestrator:
    return Orchestrator(database, tmp_path)


@pytest.fixture
def twin(sqlite_template: Path, tmp_path: Path) -> Iterator[Orchestrator]:
    path = tmp_path / "twin.db"
    shutil.copy(sqlite_template, path)
    database = Database(f"sqlite:///{path}")
    yield Orchestrator(database, tmp_path)
    database.close()


FATES = st.sampled_from(["well", "well", "well", "lost", "late", "twice", "reply lost"])
ANSWERS = st.tuples(st.integers(0, VMS - 1), st.sampled_from([VmState.RUNNING, VmState.STOPPED]))
# What the host becomes; a VM that it answers about; another life of the agent; another replica, or a quiet beat.
STEPS = st.one_of(reports(), reports(), ANSWERS, st.sampled_from(["agent anew", "replica", "quiet"]))


async def live(wire: Wire, steps: Sequence[Any]) -> None:
    source = wire.source
    reporter = Reporter(source, wire, ReportSettings())
    for step in (*steps, "quiet", "quiet", "quiet"):
        if isinstance(step, HostReport):
            source.report = step
            reporter.touch()
        elif isinstance(step, tuple):
            number, state = step
            said = VmResult(vm_id=UUID(int=number), name="v", changed=True, vm=vm(number, state))
            result = said.model_copy(update={"observed_at": source.moments.observed()})
            wire.real.answered(result)
            wire.twin.answered(result)
            reporter.touch()
        elif step == "agent anew":
            started = source.moments.started_at_unix_ms
            source.moments = Moments()
            source.moments.started_at_unix_ms = started + 1
            reporter = Reporter(source, wire, ReportSettings())
        elif step == "replica":
            wire.real.renew()
            wire.twin.renew()
        try:
            await reporter.beat()
        except PpecError:
            reporter.touch()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(steps=st.lists(STEPS, min_size=2, max_size=12), fates=st.lists(FATES, max_size=14))
def test_deltas_store_what_whole_reports_would_have(
    real: Orchestrator, twin: Orchestrator, steps: list[Any], fates: list[str]
) -> None:
    real.empty()
    twin.empty()
    wire = Wire(real, twin, Source())
    # The last beats are undisturbed.
    wire.fates = fates[: len(steps)]
    asyncio.run(live(wire, steps))
    wire.fates = []
    final = wire.source.report
    (host,) = real.state()["host"]
    assert (host["report"], host["report_digest"]) == (final.model_dump(mode="json"), final.digest())
    there = {one.vm_id: one.state.value for one in final.vms}
    for row in real.state()["vm"]:
        assert row["observed"] == there.get(row["id"], "unknown")


def test_most_changes_of_an_undisturbed_host_are_deltas(real: Orchestrator, twin: Orchestrator) -> None:
    wire = Wire(real, twin, Source())
    pictures = [report(vms=(vm(0, state),)) for state in (VmState.RUNNING, VmState.STOPPED, VmState.PAUSED)]
    asyncio.run(live(wire, [*pictures, (0, VmState.RUNNING), *pictures]))
    # All but the first message that is no heartbeat, and one that only says that the picture is true again.
    assert wire.deltas_taken == len(pictures) * 2


def said(sequence: int, before: HostReport, after: HostReport, **values: Any) -> ReportDelta:
    changes = changes_between(before, after)
    assert changes is not None
    known = {"agent_started_at_unix_ms": 1_000, "before": before.digest(), "after": after.digest(), "changes": changes}
    return ReportDelta(sequence=sequence, snapshot_tick=sequence, **known | values)


def first(real: Orchestrator, picture: HostReport) -> None:
    whole = ReportEnvelope(agent_started_at_unix_ms=1_000, sequence=1, report=picture, snapshot_tick=1)
    assert real.intake.report("h1", whole, now=NOW).takes_deltas


def test_a_delta_of_another_report_or_to_another_asks_for_the_whole(real: Orchestrator) -> None:
    one, two, three = (report(disk_free_mib=free) for free in range(3))
    assert real.intake.delta("h1", said(0, one, two), now=NOW).send_report
    first(real, one)
    before = real.state()
    for number, wrong in enumerate(({"before": three.digest()}, {"after": three.digest()}), start=2):
        delta = said(number, one, two).model_copy(update=wrong)
        assert real.intake.delta("h1", delta, now=NOW).send_report
        assert real.state() == before
    assert not real.intake.delta("h1", said(5, one, two), now=NOW).send_report
    # Late, and late again.
    assert not real.intake.delta("h1", said(4, two, three), now=NOW).send_report
    assert not real.intake.delta("h1", said(5, two, three), now=NOW).send_report
    assert real.state()["host"][0]["report_digest"] == two.digest()


def test_a_delta_of_before_the_clock_was_set_back_asks_for_the_whole(real: Orchestrator) -> None:
    one, two = report(), report(disk_free_mib=1)
    first(real, one)
    later = NOW.replace(minute=10)
    old = said(7, one, two, agent_started_at_unix_ms=500)
    assert real.intake.delta("h1", old, now=later).send_report
    assert real.state()["host"][0]["report_digest"] == one.digest()


def test_a_delta_writes_only_what_changed(real: Orchestrator) -> None:
    real.empty(vms=20)
    before = report(vms=tuple(vm(number, cells=(0,)) for number in range(20)))
    stopped = before.vms[7].model_copy(update={"state": VmState.STOPPED})
    after = before.model_copy(update={"vms": (*before.vms[:7], stopped, *before.vms[8:])})
    first(real, before)
    written: list[tuple[str, int]] = []

    def note(_conn: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, many: bool) -> None:
        verb, *words = statement.split()
        if verb in ("UPDATE", "INSERT", "DELETE"):
            written.append((f"{verb} {words[0]}", len(parameters) if many else 1))

    event.listen(Engine, "before_cursor_execute", note)
    assert not real.intake.delta("h1", said(2, before, after), now=NOW).send_report
    assert written == [("UPDATE host", 1), ("UPDATE vm", 1)]
    beat = Heartbeat(agent_started_at_unix_ms=1_000, sequence=3, digest=after.digest())
    assert not real.intake.heartbeat("h1", beat, now=NOW).send_report
    assert len(written) == 2
    event.remove(Engine, "before_cursor_execute", note)
    assert real.state()["vm"][7]["observed"] == "stopped"


def test_what_is_stored_and_can_not_be_read_is_asked_for(real: Orchestrator) -> None:
    one, two = report(), report(disk_free_mib=1)
    first(real, one)
    with real.database.write() as conn:
        conn.execute(update(tables.host).values(report={"of": "another time"}))
    assert real.intake.delta("h1", said(2, one, two), now=NOW).send_report


# What an agent knew before it reported the machine's parts and drift.
FIRST_FIELDS = {"cpu", "drives", "file_systems", "nics", "drift"}


def test_the_first_agents_are_not_asked_for_a_report_at_each_heartbeat(real: Orchestrator) -> None:
    """Their digest is of all their fields, with the defaults."""
    spoken = report(vms=(vm(0),)).model_dump(mode="json", exclude=FIRST_FIELDS)
    known = HostReport.model_validate(spoken)
    digest = known.digest_as_spoken()
    assert digest != known.digest()

    def asked(sequence: int, digest: str) -> bool:
        beat = Heartbeat(agent_started_at_unix_ms=1_000, sequence=sequence, digest=digest)
        return real.intake.heartbeat("h1", beat, now=NOW).send_report

    assert asked(1, digest)
    whole = ReportEnvelope(agent_started_at_unix_ms=1_000, sequence=2, report=known)
    assert not real.intake.report("h1", whole, now=NOW).send_report
    assert not asked(3, digest)
    real.renew()
    assert not asked(4, digest)
    assert asked(5, "0" * 64)
