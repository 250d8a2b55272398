# SPDX-License-Identifier: Apache-2.0
"""Storage pools and NVMe drives for the hosts of the world, in the record and on the simulated hosts."""

from __future__ import annotations

from typing import Any

from cells_opened import announce
from sqlalchemy import insert, select, update

from ppec_orchestrator.store import tables

POOL = "ssd"


def give_storage(world: Any, *hosts: str, pool_mib: int = 0, drives: int = 0) -> None:
    """To these hosts a pool of that size, and near each of their cells so many drives. Their agents know of both."""
    announce(world, *hosts)
    with world.database.write() as conn:
        ids = conn.execute(select(tables.host.c.id).where(tables.host.c.name.in_(hosts))).scalars().all()
        conn.execute(update(tables.host_cell).where(tables.host_cell.c.host_id.in_(ids)).values(nvme=drives))
        if pool_mib:
            conn.execute(
                insert(tables.host_pool), [{"host_id": number, "name": POOL, "size_mib": pool_mib} for number in ids]
            )
        conn.execute(update(tables.host).where(tables.host.c.id.in_(ids)).values(report_sequence=1))
    world.fleet.cell_drives = drives
    world.fleet.pools_mib = {POOL: pool_mib}


def storage_used(world: Any) -> dict[str, tuple[int, int, int]]:
    """By host: MiB of its own disk, MiB of the pool, drives."""
    with world.database.read() as conn:
        hosts = conn.execute(select(tables.host)).all()
        pools = {row.host_id: row.used_mib for row in conn.execute(select(tables.host_pool))}
        drives = {row.host_id: row.nvme_used for row in conn.execute(select(tables.host_cell))}
    return {host.name: (host.disk_used_mib, pools.get(host.id, 0), drives[host.id]) for host in hosts}
