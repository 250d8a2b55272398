# SPDX-License-Identifier: Apache-2.0
"""Two transactions that grant at once, on PostgreSQL: SQLite has one writer at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from ipaddress import ip_address, ip_network

import pytest
from ipdb_site import NOW, fixed, granted, make_vm, released
from sqlalchemy import Connection, event, select, text, update

from ppec_contract.api_ipdb import HoldCreate, NetworkWanted
from ppec_contract.errors import PpecError
from ppec_lab.conditions import wait_until
from ppec_orchestrator.store import holds, ipdb, tables
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.faults import TransactionLostError

pytestmark = pytest.mark.postgres


@pytest.fixture
def database_url(postgres_url: str) -> str:
    return postgres_url


def waiting(database: Database) -> int:
    """How many transactions wait for locks."""
    theirs = "FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    with database.read() as conn:
        return int(conn.execute(text(f"SELECT count(*) {theirs}")).scalar_one())


def test_who_waits_for_no_row_waits_for_the_counter_of_a_prefix(
    database: Database, open_database: Callable[[], Database], host_id: int
) -> None:
    """Else every other grant under way would make a /64 look as if it were used up."""
    first, second = (make_vm(database, name) for name in "ab")
    others = open_database()

    def claim() -> list[str]:
        with others.write() as conn:
            ipdb.grant(conn, {second: host_id}, wait=False, now=lambda: NOW)
            return [str(one.address.ip) for one in ipdb.addresses_of(conn, [second])[second]]

    with ThreadPoolExecutor(1) as pool:
        with database.write() as conn:
            ipdb.grant(conn, {first: host_id}, now=lambda: NOW)
            claimed = pool.submit(claim)
            wait_until(lambda: claimed.done() or bool(waiting(database)), "it waits", timeout_s=30)
        assert claimed.result(30) == ["10.0.0.3", "fd00::2"]


class HandClock:
    """Shows what it is set to."""

    def __init__(self) -> None:
        self.after_s = 0.0

    def __call__(self) -> datetime:
        return NOW + timedelta(seconds=self.after_s)


@pytest.mark.parametrize("wanted", [NetworkWanted(), fixed("fd00::1")], ids=["any", "by number"])
def test_who_waited_grants_at_the_time_after_the_wait(
    database: Database, open_database: Callable[[], Database], host_id: int, wanted: NetworkWanted
) -> None:
    """What came out of quarantine meanwhile is not said to have been granted before."""
    *before, waited_for, waiter = (make_vm(database, name) for name in "abcdefghi")
    with database.write() as conn:
        conn.execute(update(tables.prefix).values(quarantine_s=10))
    assert granted(database, host_id, before)[-1][-1] == "fd00::7"
    released(database, before[0])
    clock = HandClock()

    def grant() -> str:
        with open_database().write() as conn:
            ipdb.grant(conn, {waiter: host_id}, {waiter: [wanted]}, now=clock)
            return str(ipdb.addresses_of(conn, [waiter])[waiter][-1].address.ip)

    with ThreadPoolExecutor(1) as pool:
        with database.write() as conn:
            conn.execute(select(tables.prefix).order_by(tables.prefix.c.id).with_for_update())
            later = pool.submit(grant)
            wait_until(lambda: later.done() or bool(waiting(database)), "it waits", timeout_s=30)
            clock.after_s = 20
            ipdb.grant(conn, {waited_for: host_id}, now=clock)
        assert later.result(30) == "fd00::1"
    with database.read() as conn:
        granted_at = select(tables.address_event.c.at).where(tables.address_event.c.vm_id == waiter)
        assert set(conn.execute(granted_at).scalars()) == {clock()}


def test_who_waited_finds_what_came_out_of_quarantine_meanwhile(
    database: Database, open_database: Callable[[], Database], host_id: int
) -> None:
    """Of 29 all but one are taken, and one rests. While another transaction takes the last one, its rest ends."""
    *before, waited_for, waiter = (make_vm(database, f"vm-{number}") for number in range(30))
    with database.write() as conn:
        conn.execute(update(tables.prefix).values(quarantine_s=10))
    only_ipv4 = NetworkWanted(prefix=ip_network("10.0.0.0/27"))
    granted(database, host_id, before, only_ipv4)
    (last,) = granted(database, host_id, [waited_for], only_ipv4)
    with database.write() as conn:
        ipdb.release(conn, [before[0], waited_for], now=lambda: NOW)
        conn.execute(update(tables.address).where(tables.address.c.last_vm_id == waited_for).values(free_from=None))
    clock = HandClock()

    def grant() -> str:
        with open_database().write() as conn:
            ipdb.grant(conn, {waiter: host_id}, {waiter: [only_ipv4]}, now=clock)
            return str(ipdb.addresses_of(conn, [waiter])[waiter][0].address.ip)

    with ThreadPoolExecutor(1) as pool:
        with database.write() as conn:
            ipdb.grant(conn, {waited_for: host_id}, {waited_for: [only_ipv4]}, now=clock)
            assert [str(one.address.ip) for one in ipdb.addresses_of(conn, [waited_for])[waited_for]] == last
            later = pool.submit(grant)
            wait_until(lambda: later.done() or bool(waiting(database)), "it waits", timeout_s=30)
            clock.after_s = 20
        assert later.result(30) == "10.0.0.2"


def test_who_waited_holds_back_and_opens_at_the_time_after_the_wait(
    database: Database, open_database: Callable[[], Database], host_id: int
) -> None:
    """The history has what the other transaction did before it."""
    vm_id, clock = make_vm(database, "a"), HandClock()
    prefix_id = 2  # the IPv6 one, whose grants have its lock

    def hold_back() -> int:
        wanted = HoldCreate(kind="reserved", first=ip_address("fd00::7"))
        with open_database().write() as conn:
            return holds.create_hold(conn, prefix_id, wanted, "me", clock).hold_id

    def open_again(hold_id: int) -> int:
        with open_database().write() as conn:
            holds.delete_hold(conn, prefix_id, hold_id, "me", clock)
        return hold_id

    def while_another_has_it(act: Callable[[], int], after_s: float) -> int:
        with ThreadPoolExecutor(1) as pool:
            with database.write() as conn:
                conn.execute(select(tables.prefix).order_by(tables.prefix.c.id).with_for_update())
                later = pool.submit(act)
                wait_until(lambda: later.done() or bool(waiting(database)), "it waits", timeout_s=30)
                clock.after_s = after_s
            return later.result(30)

    hold_id = while_another_has_it(hold_back, 20)
    while_another_has_it(lambda: open_again(hold_id), 40)
    assert granted(database, host_id, [vm_id])
    at = select(tables.address_event.c.at).where(tables.address_event.c.action.in_(("reserved", "opened")))
    with database.read() as conn:
        assert list(conn.execute(at.order_by(tables.address_event.c.id)).scalars()) == [
            NOW + timedelta(seconds=20),
            NOW + timedelta(seconds=40),
        ]


def test_who_waited_releases_at_the_time_after_the_wait(
    database: Database, open_database: Callable[[], Database], host_id: int
) -> None:
    """Else the address would rest for less than it has to."""
    vm = make_vm(database, "a")
    granted(database, host_id, [vm])
    clock = HandClock()

    def release() -> int:
        with open_database().write() as conn:
            return ipdb.release(conn, [vm], now=clock)

    with ThreadPoolExecutor(1) as pool:
        with database.write() as conn:
            conn.execute(select(tables.address).where(tables.address.c.vm_id == vm).with_for_update())
            gone = pool.submit(release)
            wait_until(lambda: gone.done() or bool(waiting(database)), "it waits", timeout_s=30)
            clock.after_s = 20
        assert gone.result(30) == 2
    with database.read() as conn:
        events = select(tables.address_event.c.at).where(tables.address_event.c.action == "released")
        assert set(conn.execute(events).scalars()) == {clock()}


def test_of_two_that_use_up_a_prefix_neither_waits_for_ever(
    database: Database, postgres_url: str, host_id: int
) -> None:
    """Each wants 24 of 29: once each has 12 there is not enough left for both. One gets all it wants; the other loses
    at once, and learns that there are too few when it tries again. PostgreSQL has to end no deadlock."""
    each_has_some = threading.Barrier(2, timeout=30)
    vms_of = {name: [make_vm(database, f"{name}{n}") for n in range(12)] for name in "ab"}
    networks = [NetworkWanted(prefix=ip_network("10.0.0.0/27"))] * 2
    lost: list[TransactionLostError] = []

    def drain(name: str) -> str:
        vms = vms_of[name]
        mine = Database(postgres_url, lock_timeout_s=5)
        try:
            for attempt in range(200):
                try:
                    with mine.write() as conn:
                        conn.exec_driver_sql("SET LOCAL deadlock_timeout = '60s'")
                        if attempt == 0:
                            _after_the_first_update(conn, each_has_some.wait)
                        ipdb.grant(conn, dict.fromkeys(vms, host_id), dict.fromkeys(vms, networks), now=lambda: NOW)
                        return str(sum(len(got) for got in ipdb.addresses_of(conn, vms).values()))
                except TransactionLostError as error:
                    lost.append(error)
                except PpecError as error:
                    return error.code
            return "lost again and again"
        finally:
            mine.close()

    with ThreadPoolExecutor(2) as pool:
        ends = sorted(pool.map(drain, "ab"))
    assert ends == ["24", "address.exhausted"]
    assert lost
    # None of them was PostgreSQL's word.
    assert all(error.__cause__ is None for error in lost)


def _after_the_first_update(conn: Connection, wait: Callable[[], object]) -> None:
    waited: list[str] = []

    def after(_conn: object, _cursor: object, statement: str, *_: object) -> None:
        if statement.startswith("UPDATE address") and not waited:
            waited.append(statement)
            wait()

    event.listen(conn, "after_cursor_execute", after)
