# SPDX-License-Identifier: Apache-2.0
"""A host whose VMs have to change cells before a large one fits, and what must hold whatever becomes of that."""

from __future__ import annotations

from typing import Any

from engine_crashes import QUICK
from sqlalchemy import insert, select, true, update

from ppec_contract.api_operations import OperationState
from ppec_contract.api_placement import Policy, VmSize
from ppec_contract.api_vms import VmAction, VmsAction, VmsCreate
from ppec_contract.version import Capability
from ppec_orchestrator.store import tables

# A whole cell's cores.
WIDE = VmSize(vcpus=16, memory_mib=8192, disk_mib=8192)
# Seven of them.
SEVEN = VmSize(vcpus=14, memory_mib=8192, disk_mib=8192)


def split_host(world: Any) -> Any:
    """h1 has two cells: four cores free beside `left` in the first, six beside `right` in the second. The other hosts
    have one cell each, which is in use."""
    world.settings(**QUICK)
    announce(world)
    with world.database.write() as conn:
        first = conn.execute(select(tables.host_cell).where(tables.host_cell.c.host_id == 1)).mappings().one()
        conn.execute(insert(tables.host_cell), [{**first, "cell": 1}])
    with world.running(name="maker") as maker:

        def made(name: str, vcpus: int, memory_mib: int = 1024, **more: Any) -> None:
            size = VmSize(vcpus=vcpus, memory_mib=memory_mib, disk_mib=8192)
            asked = VmsCreate(image="debian", name=name, size=size, policy=Policy.PACK, **more)
            assert world.ended(maker.create(asked, world.ask).operation_id).state is OperationState.SUCCEEDED

        made("left", 8, 4096, host="h1")
        made("filler", 8, host="h1")
        made("right", 4, host="h1")
        made("busy-2", 2, host="h2")
        made("busy-3", 2, host="h3")
        world.ended(maker.act(VmsAction(action=VmAction.DELETE, vms=("filler",)), world.ask).operation_id)
    assert [world.vm(name).cells for name in ("left", "right")] == [(0,), (1,)]
    world.dispatcher.started.clear()
    return world


def announce(world: Any, *hosts: str, capabilities: tuple[str, ...] = tuple(Capability)) -> None:
    """As the first report of an agent would: of these hosts, or of all."""
    facts = {"capabilities": list(capabilities)}
    mine = tables.host.c.name.in_(hosts) if hosts else true()
    with world.database.write() as conn:
        conn.execute(update(tables.host).where(mine).values(facts=facts))


def resize_cell(world: Any, host_id: int, cell: int, cores: int) -> None:
    """As a report of the host would."""
    with world.database.write() as conn:
        mine = (tables.host_cell.c.host_id == host_id, tables.host_cell.c.cell == cell)
        conn.execute(update(tables.host_cell).where(*mine).values(cores=cores))
        conn.execute(update(tables.host).where(tables.host.c.id == host_id).values(report_digest=f"{cores}"))


def wide(**more: Any) -> VmsCreate:
    return VmsCreate(**{"image": "debian", "name": "wide", "size": WIDE, "policy": Policy.PACK, "max_moves": 1, **more})


def created(world: Any, asked: VmsCreate) -> Any:
    with world.running(name="creator") as replica:
        view = world.ended(replica.create(asked, world.ask).operation_id)
        world.wait_cleaned()
    return view


def assert_exact(world: Any) -> None:
    """Each VM is in the cells that its host has it in, and cells hold what is in them, and no more than they have."""
    there = {vm.vm_id: vm.cells for mine in world.fleet.vms.values() for vm in mine.values()}
    with world.database.read() as conn:
        rows = conn.execute(select(tables.allocation_cell, tables.allocation.c.host_id).join(tables.allocation)).all()
        cells = {(row.host_id, row.cell): row for row in conn.execute(select(tables.host_cell))}
    assert {row.vm_id: (row.cell,) for row in rows} == there
    for (host_id, cell), row in cells.items():
        mine = [each for each in rows if (each.host_id, each.cell) == (host_id, cell)]
        assert row.cores_used == sum(each.cores for each in mine) <= row.cores
        assert row.memory_used_mib == sum(each.memory_mib for each in mine) <= row.memory_mib


def actions(world: Any) -> list[str]:
    return [request.action for request in world.dispatcher.started]
