# SPDX-License-Identifier: Apache-2.0
"""Somebody in psql holds rows of hosts, or of an operation: who needs them is refused in time, nobody else is held up,
and nothing that was begun is lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection, select

from ppec_contract.api_operations import OperationState
from ppec_contract.api_placement import GroupRule
from ppec_contract.api_vms import BatchMode
from ppec_contract.errors import PpecError
from ppec_orchestrator.dispatch.simulated import Fault
from ppec_orchestrator.liveness import Heard, LivenessBook, MessageId
from ppec_orchestrator.store import hosts
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.hosts import flush_last_seen
from ppec_orchestrator.store.tables import host

pytestmark = pytest.mark.postgres
SHORT_S = 0.1
TOGETHER = GroupRule(name="pair", apart=False)


@pytest.fixture
def database_url(postgres_url: str) -> str:
    """Only there do rows have locks."""
    return postgres_url


@pytest.fixture
def database(postgres_url: str) -> Iterator[Database]:
    """One that waits for a short while only."""
    made = Database(postgres_url, lock_timeout_s=SHORT_S)
    yield made
    made.close()


@pytest.fixture
def person(postgres_url: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(postgres_url) as connection:
        yield connection


class CountingDatabase(Database):
    """Counts the write transactions that were begun."""

    begun = 0

    @contextmanager
    def write(self) -> Iterator[Connection]:
        self.begun += 1
        with super().write() as conn:
            yield conn


def hold_hosts(person: psycopg.Connection, which: str = "true") -> None:
    # He goes home, so that who would wait for ever fails a test and doesn't hang in it.
    person.execute("SET idle_in_transaction_session_timeout = '30s'")
    person.execute(f"SELECT id FROM host WHERE {which} FOR UPDATE")


def test_create_that_needs_them_is_refused_and_leaves_nothing(
    world: Any, database: Database, person: psycopg.Connection
) -> None:
    accepting = world.replica(database=database, start=False)
    hold_hosts(person)
    for count in (1, 4):
        with pytest.raises(PpecError) as refused:
            accepting.create(world.batch(count), world.ask)
        assert (refused.value.code, refused.value.retryable) == ("store.unavailable", True)
    world.assert_empty()
    person.rollback()
    accepting.create(world.batch(4), world.ask)


@pytest.mark.parametrize("count", [1, 4])
def test_create_goes_to_another_host_when_the_best_one_is_held(
    world: Any, database: Database, person: psycopg.Connection, count: int
) -> None:
    accepting = world.replica(database=database, start=False)
    best = accepting.show_plan(world.batch(1), "tester").placed[0].host
    hold_hosts(person, f"name = '{best}'")
    view = accepting.create(world.batch(count), world.ask)
    assert len(view.items) == count
    assert best not in {item.host for item in view.items}
    person.rollback()
    with world.running():
        assert world.ended(view.operation_id).state is OperationState.SUCCEEDED
    world.assert_consistent()


@pytest.mark.parametrize(
    "more",
    [
        {"count": 1, "host": "h1"},
        {"count": 17},
        {"count": 17, "mode": BatchMode.BEST_EFFORT},
        {"count": 2, "host": "h1", "groups": (TOGETHER,)},
    ],
)
def test_create_that_does_not_fit_without_it_is_told_what_holds_it_up(
    world: Any, database: Database, person: psycopg.Connection, more: dict[str, Any]
) -> None:
    """Each host has room for eight."""
    accepting = world.replica(database=database, start=False)
    hold_hosts(person, "name = 'h1'")
    with pytest.raises(PpecError) as refused:
        accepting.create(world.batch(**more), world.ask)
    assert (refused.value.code, refused.value.retryable) == ("store.unavailable", True)
    assert "pg_blocking_pids()" in refused.value.hint
    world.assert_empty()
    person.rollback()
    assert len(accepting.create(world.batch(**more), world.ask).items) == more["count"]


def test_who_shares_a_transaction_waits_once(world: Any, postgres_url: str, person: psycopg.Connection) -> None:
    """The second transaction waits for nobody, and there is no third one for this request alone."""
    database = CountingDatabase(postgres_url, lock_timeout_s=SHORT_S)
    accepting = world.replica(database=database, start=False)
    hold_hosts(person, "name = 'h1'")
    with pytest.raises(PpecError, match="kept the database's rows"):
        accepting.create(world.batch(1, host="h1"), world.ask)
    assert database.begun == 2
    database.close()


@pytest.mark.parametrize("at_least", [None, 1])
def test_create_is_refused_while_somebody_locks_the_table_of_hosts(
    world: Any, database: Database, person: psycopg.Connection, at_least: int | None
) -> None:
    """Who waits for no row still waits for the table, and finds no other host by asking again."""
    accepting = world.replica(database=database, start=False)
    hold_hosts(person, "false")
    person.execute("LOCK TABLE host IN EXCLUSIVE MODE")  # all may read it still
    asked = world.batch(2, mode=BatchMode.BEST_EFFORT, at_least=at_least)
    with pytest.raises(PpecError) as refused:
        accepting.create(asked, world.ask)
    assert (refused.value.code, refused.value.retryable) == ("store.unavailable", True)
    world.assert_empty()
    person.rollback()
    assert len(accepting.create(asked, world.ask).items) == 2


def test_a_plan_that_needs_a_held_host_stands(world: Any, database: Database, person: psycopg.Connection) -> None:
    accepting = world.replica(database=database, start=False)
    plan = accepting.show_plan(world.batch(1), "tester")
    hold_hosts(person)
    with pytest.raises(PpecError) as refused:
        accepting.execute(plan.plan_id, world.ask)
    assert refused.value.code == "store.unavailable"
    person.rollback()
    accepting.execute(plan.plan_id, world.ask)


def held_once_a_host_fails(world: Any, person: psycopg.Connection, which: str) -> list[str]:
    """The first host asked fails, and at that moment somebody holds the hosts that `which` says, with its name for
    `{host}`. Returns who was asked, as it happens."""
    asked: list[str] = []

    def faults(action: str, host: str, vm_id: Any) -> Fault | None:
        asked.append(host)
        if len(asked) > 1:
            return None
        hold_hosts(person, which.format(host=host))
        return Fault.of("host.no_capacity")

    world.fleet.faults = faults
    return asked


def test_a_vm_that_its_host_failed_is_tried_on_one_that_nobody_holds(
    world: Any, database: Database, person: psycopg.Connection
) -> None:
    asked = held_once_a_host_fails(world, person, "id = (SELECT min(id) FROM host WHERE name != '{host}')")
    with world.running(database=database) as replica:
        view = world.ended(replica.create(world.batch(1), world.ask).operation_id)
    assert view.state is OperationState.SUCCEEDED, view.problem
    failed, made = asked
    assert made == max({"h1", "h2", "h3"} - {failed})
    person.rollback()
    world.assert_consistent()


def test_a_vm_that_fits_only_on_a_held_host_waits_for_it(
    world: Any, database: Database, person: psycopg.Connection
) -> None:
    """It is accepted, so it isn't failed for somebody's stay in psql."""
    world.settings(renewal_s=0.1, poll_s=0.05)
    asked = held_once_a_host_fails(world, person, "name != '{host}'")
    with world.running(database=database) as replica:
        accepted = replica.create(world.batch(1), world.ask)
        world.wait_until(lambda: asked and not replica.engine.running, "its owner has let go")
        assert not world.show(accepted.operation_id).state.ended
        person.rollback()
        world.end_leases(replica.engine._replica.owner)
        view = world.ended(accepted.operation_id)
    assert view.state is OperationState.SUCCEEDED, view.problem
    world.assert_consistent()


def test_what_hosts_have_done_is_written_down_once_they_are_free(
    world: Any, database: Database, person: psycopg.Connection
) -> None:
    world.settings(renewal_s=0.1, poll_s=0.05)
    world.dispatcher.gate.clear()
    with world.running(database=database) as replica:
        accepted = replica.create(world.batch(4), world.ask)
        world.wait_until(lambda: world.dispatcher.started, "the run has started")
        hold_hosts(person)
        world.dispatcher.gate.set()
        world.wait_until(lambda: not replica.engine.running, "its owner has let go")
        assert not world.show(accepted.operation_id).state.ended
        person.rollback()
        world.end_leases(replica.engine._replica.owner)
        view = world.ended(accepted.operation_id)
    assert view.state is OperationState.SUCCEEDED
    assert len(world.fleet.deeds) == 4, "nothing was made twice"
    world.assert_consistent()


def test_a_held_operation_puts_no_others_lease_at_risk(
    world: Any, database: Database, person: psycopg.Connection
) -> None:
    world.settings(renewal_s=0.1, poll_s=0.05)
    world.dispatcher.gate.clear()
    with world.running(database=database) as replica:
        held, other = (replica.create(world.batch(1), world.ask).operation_id for _ in range(2))
        world.wait_until(lambda: len(world.dispatcher.started) == 2, "both runs have started")
        person.execute("SET idle_in_transaction_session_timeout = '30s'")
        person.execute("SELECT id FROM operation WHERE id = %s FOR UPDATE", [held])
        before = world.lease(held)
        world.ahead = timedelta(seconds=300)
        world.wait_until(lambda: world.lease(other) > before + timedelta(seconds=200), "the other one's is renewed")
        assert world.lease(held) == before
        person.rollback()
        world.wait_until(lambda: world.lease(held) > before + timedelta(seconds=200), "and its own, once it can be")
        world.dispatcher.gate.set()
        assert {world.ended(one).state for one in (held, other)} == {OperationState.SUCCEEDED}
        assert [world.fence(one) for one in (held, other)] == [1, 1], "nobody took them over"


def test_heartbeats_hold_few_hosts_at_a_time(
    world: Any, database: Database, monkeypatch: pytest.MonkeyPatch, person: psycopg.Connection
) -> None:
    """Or whoever does not wait, as with `at_least`, finds all of a fleet's hosts held."""
    monkeypatch.setattr(hosts, "FLUSHED_AT_ONCE", 2)
    hold_hosts(person, "name = 'h2'")
    at, before = world.now() + timedelta(seconds=5), database.commits
    assert flush_last_seen(database, dict.fromkeys((1, 2, 3), at)) == {2}
    assert database.commits == before + 2
    with database.read() as conn:
        heard = conn.execute(select(host.c.name).where(host.c.last_seen_at == at).order_by(host.c.id)).scalars()
        assert list(heard) == ["h1", "h3"]


def test_all_other_hosts_are_written_down_as_heard_and_a_held_one_later(
    world: Any, database: Database, person: psycopg.Connection
) -> None:
    """Who plans takes a host for dead that was not written down as heard."""
    book = LivenessBook(partial(flush_last_seen, database), silent_after_s=30)
    at = world.now() + timedelta(seconds=5)
    for host_id in (1, 2, 3, 4):
        heard = Heard(host_id, MessageId(1, 1), frozenset(), at)
        book.note(f"h{host_id}", heard)

    def written() -> list[int]:
        with database.read() as conn:
            return list(conn.execute(select(host.c.id).where(host.c.last_seen_at == at).order_by(host.c.id)).scalars())

    hold_hosts(person, "name = 'h2'")
    assert book.flush() == 3, "of which one is no host any more"
    assert written() == [1, 3]
    assert book.flush() == 0
    person.rollback()
    assert book.flush() == 1
    assert written() == [1, 2, 3]
