# SPDX-License-Identifier: Apache-2.0
"""Answers and reports about a VM arrive in any order; what stands is what its host saw last."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import permutations
from pathlib import Path
from uuid import UUID

import pytest
from sqlalchemy import insert, select, text

from ppec_contract.agent import VmResult
from ppec_contract.api_vms import VmRecord
from ppec_contract.host import Heartbeat, HostReport, ReportEnvelope
from ppec_contract.vm import Moment, VcpuPin, VmInfo, VmState
from ppec_lab.conditions import wait_until
from ppec_orchestrator.liveness import LivenessBook
from ppec_orchestrator.report_intake import ReportIntake
from ppec_orchestrator.settings import Settings
from ppec_orchestrator.store import tables
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.observations import record_observed

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
SILENT_S = 30.0
# Two lives of an agent.
FIRST, SECOND = 1_000, 2_000
RUNNING, STOPPED, PAUSED, CRASHED = VmState.RUNNING, VmState.STOPPED, VmState.PAUSED, VmState.CRASHED


@dataclass(frozen=True)
class Answer:
    """What an operation brings back; `tick` None: by an agent that gives no moments."""

    process: int
    tick: int | None
    state: VmState
    replayed: bool = False


@dataclass(frozen=True)
class Report:
    """What the host sends by itself; `state` None: it doesn't have the VM."""

    process: int
    tick: int | None
    state: VmState | None


Said = Answer | Report


@dataclass
class Fleet:
    """Hosts with one VM each, and the orchestrator's two ways of hearing of it."""

    database: Database
    intake: ReportIntake
    now: datetime = NOW
    hosts: int = 0

    def vm_on_a_host(self) -> tuple[str, UUID]:
        self.hosts += 1
        name, vm_id = f"h{self.hosts}", uuid.uuid4()
        with self.database.write() as conn:
            conn.execute(
                insert(tables.host).values(
                    id=self.hosts, name=name, rack_id=1, vrf_id=1, address="127.0.0.1", port=7443, enrolled_at=NOW
                )
            )
            conn.execute(
                insert(tables.vm).values(
                    id=vm_id, name=f"v{self.hosts}", record="creating", flavor="f", image_id=1, vcpus=2,
                    memory_mib=512, disk_mib=9, labels={}, created_at=NOW, operation_id="o",
                )
            )  # fmt: skip
            conn.execute(insert(tables.allocation).values(vm_id=vm_id, host_id=self.hosts, disk_mib=9))
        return name, vm_id

    def hear(self, host: str, vm_id: UUID, said: Said, sequence: int = 0) -> None:
        if isinstance(said, Answer):
            with self.database.write() as conn:
                record_observed(conn, [result_of(vm_id, said)], self.now, VmRecord.ACTIVE)
        else:
            self.report(host, vm_id, said, sequence)

    def report(self, host: str, vm_id: UUID, said: Report, sequence: int) -> None:
        envelope = ReportEnvelope(
            agent_started_at_unix_ms=said.process,
            sequence=sequence,
            snapshot_tick=said.tick,
            report=report_of(host, vm_id, said.state),
        )
        self.intake.report(host, envelope, now=self.now)

    def asked_for_report(self, host: str, vm_id: UUID, said: Report, sequence: int) -> bool:
        """By the answer to the heartbeat that stands for this report."""
        digest = report_of(host, vm_id, said.state).digest()
        beat = Heartbeat(agent_started_at_unix_ms=said.process, sequence=sequence, digest=digest)
        return self.intake.heartbeat(host, beat, now=self.now).send_report

    def seen(self, vm_id: UUID) -> tuple[VmState, list[VcpuPin] | None]:
        with self.database.read() as conn:
            row = conn.execute(select(tables.vm.c.observed, tables.vm.c.pins).where(tables.vm.c.id == vm_id)).one()
        return VmState(row.observed), None if row.pins is None else [VcpuPin.model_validate(pin) for pin in row.pins]


def info_of(vm_id: UUID, state: VmState) -> VmInfo:
    """Every state has pins of its own, so that a mixture of two shows."""
    pins = (VcpuPin(vcpu=0, pcpu=list(VmState).index(state)),)
    return VmInfo(vm_id=vm_id, name="v", state=state, managed=True, vcpus=2, memory_mib=512, pins=pins)


def result_of(vm_id: UUID, said: Answer) -> VmResult:
    at = None if said.tick is None else Moment(agent_started_at_unix_ms=said.process, tick=said.tick)
    info = info_of(vm_id, said.state)
    return VmResult(vm_id=vm_id, name="v", changed=True, vm=info, replayed=said.replayed, observed_at=at)


def report_of(host: str, vm_id: UUID, state: VmState | None) -> HostReport:
    return HostReport(
        host=host, boot_id="b", agent_version="1", api_version=1, capabilities=(), architecture="x86_64",
        domain_type="fake", libvirt_version="", qemu_version="", kernel_version="", cells=(), disk_mib=1,
        disk_free_mib=1, bridges=(), vms=() if state is None else (info_of(vm_id, state),),
    )  # fmt: skip


def shown(state: VmState | None) -> tuple[VmState, list[VcpuPin] | None]:
    return (VmState.UNKNOWN, None) if state is None else (state, list(info_of(uuid.uuid4(), state).pins))


@pytest.fixture
def fleet(database: Database, tmp_path: Path) -> Fleet:
    return fleet_on(database, tmp_path)


def fleet_on(database: Database, folder: Path) -> Fleet:
    with database.write() as conn:
        conn.execute(insert(tables.datacentre).values(id=1, name="dc1", region="r"))
        conn.execute(insert(tables.cluster).values(id=1, name="c1", datacentre_id=1, architecture="x86_64"))
        conn.execute(insert(tables.rack).values(id=1, name="r1", cluster_id=1))
        conn.execute(insert(tables.vrf).values(id=1, name="v1", description=""))
        conn.execute(
            insert(tables.image).values(
                id=1, name="i", format="raw", architecture="x86_64", sha256="0" * 64, size_bytes=1, virtual_size_mib=1
            )
        )
    liveness = LivenessBook(lambda seen: (), silent_after_s=SILENT_S)
    return Fleet(database, ReportIntake(database, liveness, Settings(state_dir=folder)))


STORIES: dict[str, Sequence[Said]] = {
    "a VM that is made while a report is under way": (
        Report(FIRST, 1, None),
        Answer(FIRST, 2, RUNNING),
        Report(FIRST, 3, RUNNING),
        Report(FIRST, 4, CRASHED),
    ),
    "operations and reports in turn": (
        Report(FIRST, 1, STOPPED),
        Answer(FIRST, 2, RUNNING),
        Report(FIRST, 3, PAUSED),
        Answer(FIRST, 4, STOPPED),
        Report(FIRST, 5, RUNNING),
    ),
    "what is true again is the picture of before": (
        Report(FIRST, 1, STOPPED),
        Answer(FIRST, 2, RUNNING),
        Report(FIRST, 3, STOPPED),
        Answer(FIRST, 4, PAUSED),
    ),
    "an agent that was started anew counts anew": (
        Report(FIRST, 700, STOPPED),
        Answer(FIRST, 800, RUNNING),
        Answer(SECOND, 1, PAUSED),
        Report(SECOND, 2, CRASHED),
    ),
    "an answer of an earlier life is replayed": (
        Answer(FIRST, 800, RUNNING),
        Report(SECOND, 1, STOPPED),
        Answer(FIRST, 800, RUNNING, replayed=True),
    ),
}


def moment(said: Said) -> tuple[int, int]:
    assert said.tick is not None
    return said.process, said.tick


@pytest.mark.parametrize("story", STORIES.values(), ids=STORIES.keys())
def test_what_the_host_saw_last_stands_whatever_the_order(fleet: Fleet, story: Sequence[Said]) -> None:
    sequences = {said: number for number, said in enumerate(sorted(story, key=moment), start=1)}
    orders = set(permutations(story))
    assert len(orders) >= 6
    for order in orders:
        host, vm_id = fleet.vm_on_a_host()
        for number, said in enumerate(order, start=1):
            fleet.hear(host, vm_id, said, sequences[said])
            latest = max(order[:number], key=moment)
            assert fleet.seen(vm_id) == shown(latest.state), order[:number]


def test_what_an_answer_decides_stands_even_if_it_was_overtaken(fleet: Fleet) -> None:
    host, vm_id = fleet.vm_on_a_host()
    fleet.hear(host, vm_id, Report(FIRST, 2, CRASHED), 1)
    fleet.hear(host, vm_id, Answer(FIRST, 1, RUNNING))
    with fleet.database.read() as conn:
        record = conn.execute(select(tables.vm.c.record).where(tables.vm.c.id == vm_id)).scalar_one()
    assert (record, fleet.seen(vm_id)[0]) == ("active", CRASHED)


def test_only_the_vm_that_was_answered_about_is_left_aside(fleet: Fleet) -> None:
    host, vm_id = fleet.vm_on_a_host()
    other = uuid.uuid4()
    with fleet.database.write() as conn:
        values = dict(conn.execute(select(tables.vm).where(tables.vm.c.id == vm_id)).one()._mapping)
        conn.execute(insert(tables.vm).values(values | {"id": other, "name": "other"}))
        conn.execute(insert(tables.allocation).values(vm_id=other, host_id=1, disk_mib=9))
    fleet.hear(host, vm_id, Answer(FIRST, 2, RUNNING))
    report = report_of(host, vm_id, STOPPED)
    report = report.model_copy(update={"vms": (info_of(vm_id, STOPPED), info_of(other, STOPPED))})
    envelope = ReportEnvelope(agent_started_at_unix_ms=FIRST, sequence=1, snapshot_tick=1, report=report)
    fleet.intake.report(host, envelope, now=NOW)
    assert (fleet.seen(vm_id)[0], fleet.seen(other)[0]) == (RUNNING, STOPPED)


def test_agents_that_give_no_moments_are_believed_as_they_come(fleet: Fleet) -> None:
    host, vm_id = fleet.vm_on_a_host()
    spoken = [Answer(FIRST, None, RUNNING), Report(FIRST, None, STOPPED), Answer(FIRST, None, PAUSED, replayed=True)]
    for sequence, said in enumerate(spoken, start=1):
        fleet.hear(host, vm_id, said, sequence)
        assert fleet.seen(vm_id) == shown(said.state)


def test_an_upgraded_agent_is_not_contradicted_by_what_its_elder_left(fleet: Fleet) -> None:
    host, vm_id = fleet.vm_on_a_host()
    fleet.hear(host, vm_id, Answer(SECOND, 1, RUNNING))
    # Sent before the upgrade, and late.
    fleet.hear(host, vm_id, Report(FIRST, None, STOPPED), 9)
    assert fleet.seen(vm_id) == shown(RUNNING)
    # From the journal that the upgraded agent found.
    fleet.hear(host, vm_id, Answer(FIRST, None, PAUSED, replayed=True))
    assert fleet.seen(vm_id) == shown(RUNNING)
    fleet.hear(host, vm_id, Report(SECOND, 2, CRASHED), 1)
    assert fleet.seen(vm_id) == shown(CRASHED)


def test_a_host_whose_clock_was_set_back_is_believed_again_after_a_silence(fleet: Fleet) -> None:
    host, vm_id = fleet.vm_on_a_host()
    fleet.hear(host, vm_id, Report(SECOND, 5, STOPPED), 5)
    fleet.hear(host, vm_id, Answer(SECOND, 6, RUNNING))
    fleet.hear(host, vm_id, Report(FIRST, 1, STOPPED), 1)
    assert fleet.seen(vm_id) == shown(RUNNING)
    fleet.now += timedelta(seconds=SILENT_S + 1)
    # Its agent takes that report for known. The picture is the stored one; its moment is not.
    assert fleet.asked_for_report(host, vm_id, Report(FIRST, 1, STOPPED), 2)
    fleet.hear(host, vm_id, Report(FIRST, 2, STOPPED), 3)
    assert fleet.seen(vm_id) == shown(STOPPED)
    assert not fleet.asked_for_report(host, vm_id, Report(FIRST, 2, STOPPED), 4)
    # From there on the order is the new process's.
    fleet.hear(host, vm_id, Answer(FIRST, 4, PAUSED))
    fleet.hear(host, vm_id, Report(FIRST, 3, STOPPED), 5)
    assert fleet.seen(vm_id) == shown(PAUSED)
    fleet.hear(host, vm_id, Report(FIRST, 5, STOPPED), 6)
    assert fleet.seen(vm_id) == shown(STOPPED)


def test_a_vm_on_another_host_is_of_that_hosts_order(fleet: Fleet) -> None:
    host, vm_id = fleet.vm_on_a_host()
    fleet.hear(host, vm_id, Answer(SECOND, 9, RUNNING))
    elsewhere, _ = fleet.vm_on_a_host()
    with fleet.database.write() as conn:
        conn.execute(tables.allocation.delete().where(tables.allocation.c.vm_id == vm_id))
        conn.execute(insert(tables.allocation).values(vm_id=vm_id, host_id=2, disk_mib=9))
    fleet.hear(elsewhere, vm_id, Report(FIRST, 1, STOPPED), 1)
    assert fleet.seen(vm_id) == shown(STOPPED)


@pytest.fixture
def shared(postgres_url: str, tmp_path: Path) -> Iterator[Fleet]:
    """On the database whose writers don't wait for one another by themselves."""
    database = Database(postgres_url)
    yield fleet_on(database, tmp_path)
    database.close()


@pytest.mark.postgres
def test_an_answer_and_a_report_at_the_same_time_take_turns(shared: Fleet) -> None:
    host, vm_id = shared.vm_on_a_host()
    shared.hear(host, vm_id, Report(FIRST, 1, STOPPED), 1)

    def blocked() -> bool:
        with shared.database.read() as conn:
            return bool(conn.execute(text("SELECT count(*) FROM pg_locks WHERE NOT granted")).scalar_one())

    with ThreadPoolExecutor(1) as pool:
        with shared.database.write() as conn:
            record_observed(conn, [result_of(vm_id, Answer(FIRST, 3, RUNNING))], NOW)
            late = pool.submit(shared.hear, host, vm_id, Report(FIRST, 2, PAUSED), 2)
            wait_until(lambda: blocked() or late.done(), "the report has to wait", timeout_s=60)
        late.result(60)
    assert shared.seen(vm_id) == shown(RUNNING)
