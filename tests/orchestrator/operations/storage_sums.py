# SPDX-License-Identifier: Apache-2.0
"""What hosts have given of disks, pools and drives is what their VMs hold."""

from __future__ import annotations

from collections import Counter

from sqlalchemy import Connection, select

from ppec_orchestrator.store import tables


def assert_storage_summed(conn: Connection) -> None:
    """Of its own disk, its pools and its drives a host has given what VMs hold, and no more than it has."""
    held = Counter[tuple[int, str | None]]()
    for row in conn.execute(select(tables.allocation)):
        held[row.host_id, row.pool] += row.disk_mib
    hosts, pools = conn.execute(select(tables.host)).all(), conn.execute(select(tables.host_pool)).all()
    given = {(row.id, None): row.disk_used_mib for row in hosts} | {(p.host_id, p.name): p.used_mib for p in pools}
    assert {key: mib for key, mib in given.items() if mib} == held
    assert all(row.disk_used_mib <= row.disk_mib for row in hosts)
    assert all(pool.used_mib <= pool.size_mib for pool in pools)
    drives = Counter[tuple[int, int]]()
    of_vms = select(tables.allocation.c.host_id, tables.allocation_cell.c.cell, tables.allocation_cell.c.nvme)
    for host_id, cell, nvme in conn.execute(of_vms.join(tables.allocation_cell)):
        drives[host_id, cell] += nvme
    cells = conn.execute(select(tables.host_cell)).all()
    assert {(cell.host_id, cell.cell): cell.nvme_used for cell in cells if cell.nvme_used} == +drives
    assert all(cell.nvme_used <= cell.nvme for cell in cells)
