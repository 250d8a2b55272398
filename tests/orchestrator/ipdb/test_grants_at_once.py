# SPDX-License-Identifier: Apache-2.0
"""Two transactions that grant at once, on PostgreSQL: SQLite has one writer at a time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from ipdb_site import NOW, make_vm
from sqlalchemy import text

from ppec_lab.conditions import wait_until
from ppec_orchestrator.store import ipdb
from ppec_orchestrator.store.database import Database

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
