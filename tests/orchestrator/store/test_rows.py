# SPDX-License-Identifier: Apache-2.0
"""Many rows by one statement: what is read back is what was given, on both databases."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Connection, event, func, select

from ppec_contract.errors import PpecError
from ppec_orchestrator.store import tables as t
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.rows import insert_rows

NOW = datetime(2026, 11, 29, 12, 0, 0, 123456, tzinfo=UTC)


def operation(operation_id: str, **more: Any) -> dict[str, Any]:
    return {
        "id": operation_id, "kind": "vm.create", "state": "queued", "created_by": "somebody", "created_at": NOW,
        "input": {}, "counters": {}, "priority": 0, "cancel_requested": False, "fence": 0, **more,
    }  # fmt: skip


def item(vm_id: UUID, position: int, **more: Any) -> dict[str, Any]:
    return {
        "operation_id": "op-1", "vm_id": vm_id, "position": position, "name": f"v{position}", "state": "pending",
        "host": None, "attempt": 1, "excluded_hosts": [], "stage_ms": {}, "problem": None, **more,
    }  # fmt: skip


def written(conn: Connection, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    insert_rows(conn, t.operation_item, items)
    rows = conn.execute(select(t.operation_item).order_by(t.operation_item.c.position))
    return [dict(row._mapping) for row in rows]


def test_rows_come_back_as_they_were_given(database: Database) -> None:
    """Whatever may be in a row: lists and objects, quotes, backslashes and braces, and nothing at all."""
    text = """a "quoted" 'text', {with} \\ NULL, \n and ü"""
    items = [
        item(uuid4(), 0),
        item(uuid4(), 1, host="h1", excluded_hosts=["h2", "h3"], stage_ms={"define": 7}),
        item(
            uuid4(),
            2,
            excluded_hosts=["h4"],
            problem={"detail": text, "details": {"of": [1, [2]]}},
        ),
    ]
    with database.write() as conn:
        insert_rows(conn, t.operation, [operation("op-1", created_by=text)])
        assert written(conn, items) == [{**one, "stage": None} for one in items]
        row = conn.execute(select(t.operation)).one()
        nothing = select(func.count()).where(t.operation_item.c.problem.is_(None))
        assert conn.execute(nothing.select_from(t.operation_item)).scalar_one() == 2
    assert (row.created_by, row.created_at, row.cancel_requested, row.problem) == (text, NOW, False, None)


def test_no_rows_are_no_statement(database: Database) -> None:
    with database.write() as conn:
        insert_rows(conn, t.operation_item, [])
        assert conn.execute(select(func.count()).select_from(t.operation_item)).scalar_one() == 0


@pytest.mark.postgres
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_text_that_is_too_long_is_refused_not_cut(database: Database) -> None:
    """SQLite has no lengths."""
    with pytest.raises(PpecError) as refused, database.write() as conn:
        insert_rows(conn, t.operation, [operation("op-1", created_by="x" * 1000)])
    assert refused.value.code == "request.invalid"


@pytest.mark.postgres
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_statement_is_as_long_for_one_row_as_for_many(database: Database) -> None:
    statements: list[str] = []

    @event.listens_for(database._writer, "after_cursor_execute")
    def remember(_conn: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    with database.write() as conn:
        insert_rows(conn, t.operation, [operation("op-1")])
        statements.clear()
        insert_rows(conn, t.operation_item, [item(uuid4(), 0)])
        insert_rows(conn, t.operation_item, [item(uuid4(), position) for position in range(1, 300)])
    assert len(statements) == 2
    assert len(set(statements)) == 1
