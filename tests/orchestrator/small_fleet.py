# SPDX-License-Identifier: Apache-2.0
"""A fleet of a few equal hosts in the database, and what its tables say is in use."""

from __future__ import annotations

from datetime import UTC, datetime
from ipaddress import ip_network
from uuid import UUID

from sqlalchemy import Connection, func, insert, select

from ppec_orchestrator.ipdb.ranges import usable_range
from ppec_orchestrator.placement.request import Shape
from ppec_orchestrator.store import tables as t
from ppec_orchestrator.store.ipdb import insert_ipv4_rows

# As the clock of the fixtures has it.
NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
SHAPE = Shape(vcpus=2, memory_mib=1024, disk_mib=1000)


def make_fleet(
    conn: Connection,
    hosts: int = 2,
    cores: int = 4,
    addresses: str = "10.0.0.0/26",
    *,
    pool_mib: int = 0,
    drives: int = 0,
) -> None:
    """`hosts` hosts of one cell each in one rack, served by one prefix whose addresses do not rest. Of the storage pool
    `ssd`, if any, each has as much, and near its cell as many NVMe drives."""
    conn.execute(insert(t.datacentre).values(id=1, name="d1", region="r"))
    conn.execute(insert(t.cluster).values(id=1, name="c1", datacentre_id=1, architecture="x86_64"))
    conn.execute(insert(t.rack).values(id=1, name="r1", cluster_id=1))
    conn.execute(insert(t.vrf).values(id=1, name="red", description=""))
    usable = usable_range(ip_network(addresses))
    conn.execute(
        insert(t.prefix).values(
            id=1, vrf_id=1, cidr=addresses, family=4, bridge="br0", cluster_id=1, nameservers=[],
            first=str(usable.first), last=str(usable.last), quarantine_s=0,
        )
    )  # fmt: skip
    insert_ipv4_rows(conn, 1, usable)
    conn.execute(
        insert(t.image).values(
            id=1, name="i", format="raw", architecture="x86_64", sha256="0" * 64, size_bytes=1, virtual_size_mib=1
        )
    )
    for n in range(1, hosts + 1):
        conn.execute(
            insert(t.host).values(
                id=n, name=f"h{n}", rack_id=1, vrf_id=1, address="192.0.2.1", port=7443, enrolled_at=NOW,
                last_seen_at=NOW, disk_mib=1_000_000,
            )
        )  # fmt: skip
        conn.execute(
            insert(t.host_cell).values(
                host_id=n, cell=0, socket=0, threads_per_core=1, cores=cores, memory_mib=65536, nvme=drives
            )
        )
        if pool_mib:
            conn.execute(insert(t.host_pool).values(host_id=n, name="ssd", size_mib=pool_mib))


def add_vms(conn: Connection, vm_ids: list[UUID], shape: Shape = SHAPE) -> None:
    conn.execute(
        insert(t.vm),
        [
            {
                "id": vm_id, "name": f"v{vm_id.hex[:12]}", "record": "creating", "flavor": "f", "image_id": 1,
                "vcpus": shape.vcpus, "memory_mib": shape.memory_mib, "disk_mib": shape.disk_mib,
                "pool": shape.pool or None, "nvme_drives": shape.nvme,
                "user_data": "", "labels": {}, "created_at": NOW,
                "operation_id": "op",
            }
            for vm_id in vm_ids
        ],
    )  # fmt: skip


def held(conn: Connection) -> dict[str, int]:
    """What every table says is in use."""
    return {
        "cores": conn.execute(select(func.sum(t.host_cell.c.cores_used))).scalar_one(),
        "memory_mib": int(conn.execute(select(func.sum(t.host_cell.c.memory_used_mib))).scalar_one()),
        "disk_mib": int(conn.execute(select(func.sum(t.host.c.disk_used_mib))).scalar_one()),
        "pools_mib": int(conn.execute(select(func.sum(t.host_pool.c.used_mib))).scalar_one() or 0),
        "drives": int(conn.execute(select(func.sum(t.host_cell.c.nvme_used))).scalar_one()),
        "allocations": conn.execute(select(func.count()).select_from(t.allocation)).scalar_one(),
        "cells": conn.execute(select(func.count()).select_from(t.allocation_cell)).scalar_one(),
        "addresses": conn.execute(
            select(func.count()).select_from(t.address).where(t.address.c.vm_id.is_not(None))
        ).scalar_one(),
    }
