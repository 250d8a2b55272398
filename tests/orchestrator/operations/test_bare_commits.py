# SPDX-License-Identifier: Apache-2.0
"""The floor that accepting is measured beside writes what accepting writes: a cheaper one would be no floor of it."""

from __future__ import annotations

from typing import Any

from bench.bare_commits import BareCommits
from sqlalchemy import func, select

from ppec_orchestrator.ipdb.provider import BuiltIn
from ppec_orchestrator.operations.creation import Creation
from ppec_orchestrator.operations.planning import Planning
from ppec_orchestrator.store import tables
from ppec_orchestrator.store.database import Database


def rows(database: Database) -> dict[str, int]:
    with database.read() as conn:
        every = tables.metadata.sorted_tables
        counts = {table.name: conn.execute(select(func.count()).select_from(table)).scalar_one() for table in every}
        held = conn.execute(select(func.count()).where(tables.address.c.vm_id.is_not(None))).scalar_one()
        used = conn.execute(select(func.sum(tables.host_cell.c.cores_used))).scalar_one()
        bumped = conn.execute(select(func.sum(tables.host.c.generation))).scalar_one()
        return counts | {"addresses held": held, "vCPUs used": int(used), "generations": int(bumped)}


def more(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    return {name: count - before[name] for name, count in after.items() if count != before[name]}


def test_the_bare_loop_writes_as_many_rows_as_accepting(world: Any, database_url: str) -> None:
    database: Database = world.database
    planning = Planning(database, silent_after_s=3600, now=world.now)
    # Over the hosts, a VM each: as the bare loop does.
    asked = world.batch(3, policy="spread")
    empty = rows(database)
    Creation(database, planning, world.now, BuiltIn()).create(asked, world.ask)
    accepted = rows(database)
    bare = BareCommits(database_url)
    try:
        bare.rate(3, 1)
    finally:
        bare.close()
    written = more(accepted, rows(database))
    # Of smaller flavors than the bare loop's, but as many rows; a small VM has a core of two threads.
    assert {**written, "vCPUs used": 0} == {**more(empty, accepted), "vCPUs used": 0}
    assert written["vm"] == written["addresses held"] == written["address_event"] == 3
