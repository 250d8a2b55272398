# SPDX-License-Identifier: Apache-2.0
"""What befell one VM's or one prefix's addresses is found by an index, however long the history is."""

from __future__ import annotations

from typing import Any

import pytest
from ipdb_site import NOW
from sqlalchemy import Connection, event, insert

from ppec_orchestrator.store import address_events, tables
from ppec_orchestrator.store.address_events import EventFilter
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.paging import Slice


@pytest.fixture
def long_history(database: Database) -> Database:
    """6000 lines, of 2000 VMs and 60 prefixes."""
    lines = [
        {
            "at": NOW, "action": "granted", "vrf": "red", "prefix_id": n % 60, "cidr": f"10.0.{n % 60}.0/24",
            "address_hex": f"{n:032x}", "vm": f"vm-{n % 2000}",
        }
        for n in range(6000)
    ]  # fmt: skip
    with database.write() as conn:
        conn.execute(insert(tables.address_event), lines)
        if conn.dialect.name == "postgresql":
            # As it does by itself after a while.
            conn.exec_driver_sql("ANALYZE")
    return database


def how_it_is_read(conn: Connection, chosen: EventFilter) -> tuple[int, str]:
    """How many lines a page has, and how the database finds them, in its own words."""
    asked: list[tuple[str, Any]] = []

    def remember(_conn: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        asked.append((statement, parameters))

    event.listen(conn, "before_cursor_execute", remember)
    found = address_events.page_of_events(conn, Slice(500), chosen)
    event.remove(conn, "before_cursor_execute", remember)
    ((statement, parameters),) = asked
    explain = "EXPLAIN QUERY PLAN" if conn.dialect.name == "sqlite" else "EXPLAIN"
    plan = conn.exec_driver_sql(f"{explain} {statement}", parameters)
    return len(found.items), "\n".join(str(row) for row in plan)


@pytest.mark.parametrize(
    ("chosen", "lines", "index"),
    [
        (EventFilter(vm="vm-77"), 3, "ix_address_event_name"),
        (EventFilter(prefix_id=7), 100, "ix_address_event_prefix"),
        (EventFilter(vm="vm-77", vrf="red"), 3, "ix_address_event_name"),
    ],
)
def test_a_vms_or_a_prefixs_history_is_found_by_an_index(
    long_history: Database, chosen: EventFilter, lines: int, index: str
) -> None:
    with long_history.read() as conn:
        found, plan = how_it_is_read(conn, chosen)
    assert found == lines
    assert index in plan
