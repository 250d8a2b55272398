# SPDX-License-Identifier: Apache-2.0
"""The rows of free IPv4 addresses, made by the database itself: a statement for each run of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from sqlalchemy import BigInteger, ColumnElement, Connection, bindparam, func, insert, select
from sqlalchemy.sql.dml import Insert

from ppec_orchestrator.ipdb.ranges import Run
from ppec_orchestrator.store.tables import address


def insert_ipv4_runs(conn: Connection, prefix_id: int, runs: Iterable[Run]) -> None:
    """Free rows of these numbers."""
    terms = [{"which": prefix_id, "low": low, "high": high} for low, high in runs]
    if terms:
        conn.execute(_ON_SQLITE if conn.dialect.name == "sqlite" else _ON_POSTGRESQL, terms)


def _filling(written: Callable[[ColumnElement[int]], ColumnElement[str]]) -> Insert:
    """`written` makes the database's form of a number."""
    begin = select(bindparam("low", type_=BigInteger).label("number")).cte("numbers", recursive=True)
    numbers = begin.union_all(select(begin.c.number + 1).where(begin.c.number < bindparam("high", type_=BigInteger)))
    rows = select(bindparam("which", type_=BigInteger), written(numbers.c.number))
    return insert(address).from_select(("prefix_id", "address_hex"), rows)


_ON_SQLITE = _filling(lambda number: func.printf("%032x", number))
_ON_POSTGRESQL = _filling(lambda number: func.lpad(func.to_hex(number), 32, "0"))
