# SPDX-License-Identifier: Apache-2.0
"""Two transactions that grant at once, on PostgreSQL: SQLite has one writer at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_network

import pytest
from ipdb_site import NOW, make_vm
from sqlalchemy import Connection, event, text

from ppec_contract.api_ipdb import NetworkWanted
from ppec_contract.errors import PpecError
from ppec_lab.conditions import wait_until
from ppec_orchestrator.store import ipdb
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
            ipdb.grant(conn, {second: host_id}, wait=False, now=NOW)
            return [str(one.address.ip) for one in ipdb.addresses_of(conn, [second])[second]]

    with ThreadPoolExecutor(1) as pool:
        with database.write() as conn:
            ipdb.grant(conn, {first: host_id}, now=NOW)
            claimed = pool.submit(claim)
            wait_until(lambda: claimed.done() or bool(waiting(database)), "it waits", timeout_s=30)
        assert claimed.result(30) == ["10.0.0.3", "fd00::2"]


def test_of_two_that_use_up_a_prefix_neither_waits_for_ever(
    database: Database, postgres_url: str, host_id: int
) -> None:
    """Each wants 24 of 29: once each has 12 there is not enough left for both. One gets all it wants; the other loses
    at once, and learns that there are too few when it tries again. PostgreSQL has to end no deadlock."""
    each_has_some = threading.Barrier(2)
    networks = [NetworkWanted(prefix=ip_network("10.0.0.0/27"))] * 2
    lost: list[TransactionLostError] = []

    def drain(name: str) -> str:
        vms = [make_vm(database, f"{name}{n}") for n in range(12)]
        mine = Database(postgres_url, lock_timeout_s=5)
        try:
            for attempt in range(200):
                try:
                    with mine.write() as conn:
                        conn.exec_driver_sql("SET LOCAL deadlock_timeout = '60s'")
                        if attempt == 0:
                            _after_the_first_update(conn, each_has_some.wait)
                        ipdb.grant(conn, dict.fromkeys(vms, host_id), networks, now=NOW)
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
