# SPDX-License-Identifier: Apache-2.0
"""Many rows by one statement that is as long for one row as for a thousand.

A `VALUES` list of a hundred VMs is a statement of 1,600 parameters. Nobody keeps such a one: psycopg, which takes it
apart in Python, remembers short ones only, and PostgreSQL reads and plans it anew each time. That took three times as
long as the same rows as one array for each column. SQLite's driver has no such arrays, and keeps the statement of a
single row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from sqlalchemy import ARRAY, Connection, Insert, String, Table, bindparam, func, insert, select
from sqlalchemy.types import TypeEngine


def insert_rows(conn: Connection, table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """All of the same columns; the others get what the database itself has for them."""
    if not rows:
        return
    if conn.dialect.name == "postgresql":
        columns = tuple(rows[0])
        conn.execute(_from_arrays(table, columns), {name: [row[name] for row in rows] for name in columns})
    else:
        conn.execute(insert(table), rows)


@cache
def _from_arrays(table: Table, columns: Sequence[str]) -> Insert:
    # Of one dimension: a JSON column's value may be a list itself.
    arrays = [bindparam(name, type_=ARRAY(_unbounded(table.c[name].type), dimensions=1)) for name in columns]
    rows = func.unnest(*arrays).table_valued(*columns).render_derived()
    return insert(table).from_select(columns, select(*(rows.c[name] for name in columns)), include_defaults=False)


def _unbounded(kind: TypeEngine[Any]) -> TypeEngine[Any]:
    """A text that is too long must be refused by its column. Cast to its length, it would be cut short."""
    return String() if isinstance(kind, String) else kind
