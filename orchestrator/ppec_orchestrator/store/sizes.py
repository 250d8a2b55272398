# SPDX-License-Identifier: Apache-2.0
"""The sizes of VMs while they change, and the room for them.

A VM's row has the size it is to have. From the accepting of a resize until its host has no use for another one the row
has that too (`held_…`), and the VM's share of its cells is what the larger of both takes, by vCPUs and by memory. Only
of such VMs the record follows what the host says: what an interrupted resize came to, nobody else knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, select, update

from ppec_contract.errors import PpecError
from ppec_contract.vm import NumaPolicy, Size, VmInfo
from ppec_orchestrator.placement.demand import (
    CellResource,
    cpu_part,
    cpu_resource,
    memory_part,
    memory_resource,
)
from ppec_orchestrator.placement.request import Shape
from ppec_orchestrator.store.cells import used_column, whole_column
from ppec_orchestrator.store.operations import RESIZE, under_way
from ppec_orchestrator.store.reservations import lock_hosts
from ppec_orchestrator.store.tables import allocation, allocation_cell, host, host_cell, operation, vm


def larger(one: Size, other: Size | None) -> Size:
    """By vCPUs and by memory."""
    if other is None:
        return one
    return Size(vcpus=max(one.vcpus, other.vcpus), memory_mib=max(one.memory_mib, other.memory_mib))


def size_of(row: Row[Any]) -> Size:
    return Size(vcpus=row.vcpus, memory_mib=row.memory_mib)


def held_of(row: Row[Any]) -> Size | None:
    return None if row.held_vcpus is None else Size(vcpus=row.held_vcpus, memory_mib=row.held_memory_mib)


def lock_host_of(conn: Connection, vm_id: UUID) -> None:
    """To be called before the VM's own row is locked: takes turns with its host's reports."""
    host_id = conn.execute(select(allocation.c.host_id).where(allocation.c.vm_id == vm_id)).scalar()
    if host_id is not None:
        lock_hosts(conn, {host_id})


def begin(conn: Connection, vm_id: UUID, wanted: Size) -> None:
    """Takes the room that the VM needs for this size as well, on its host. Raises `host.no_capacity` with what is
    wanted and free; the caller's transaction must then be rolled back."""
    row = _row(conn, vm_id)
    if row is not None:
        _keep(conn, row, size_of(row), larger(wanted, held_of(row)), checked=True)


def take_back(conn: Connection, vm_id: UUID, held: Size | None) -> None:
    """The resize changed nothing: the record is as it was before `begin`, when `held` was held besides."""
    row = _row(conn, vm_id)
    if row is not None:
        _keep(conn, row, size_of(row), held)


def follow(conn: Connection, infos: Mapping[UUID, VmInfo]) -> None:
    """Of VMs between two sizes: the record, and the room, become what the host says that they have and will have."""
    for vm_id in sorted(infos):
        row, info = _row(conn, vm_id), infos[vm_id]
        if row is None or row.held_vcpus is None:
            continue
        now = Size(vcpus=info.vcpus, memory_mib=info.memory_mib)
        later = _later(info)
        _keep(conn, row, later, None if now == later else now)


def follow_report(conn: Connection, infos: Mapping[UUID, VmInfo]) -> None:
    """As `follow`, but for VMs that an operation is at work on: the report may be from before it.

    Not if it shows the size that is asked for: then the host has gone that far. Its answer may be lost, and a host that
    changes no more sends no report that could be heard after the operation's end.
    """
    busy = under_way(conn, list(infos))
    asked = _asked(conn, busy)
    follow(conn, {vm_id: i for vm_id, i in infos.items() if vm_id not in busy or _later(i) == asked.get(vm_id)})


def _asked(conn: Connection, busy: Mapping[UUID, str]) -> dict[UUID, Size]:
    """The sizes that these VMs' resizes under way ask for."""
    if not busy:
        return {}
    rows = conn.execute(
        select(operation.c.id, operation.c.input).where(
            operation.c.id.in_(set(busy.values())), operation.c.kind == RESIZE
        )
    )
    sizes = {row.id: Size.model_validate(row.input["size"]) for row in rows}
    return {vm_id: sizes[operation_id] for vm_id, operation_id in busy.items() if operation_id in sizes}


def _later(info: VmInfo) -> Size:
    return info.pending or Size(vcpus=info.vcpus, memory_mib=info.memory_mib)


def _row(conn: Connection, vm_id: UUID) -> Row[Any] | None:
    return conn.execute(select(vm).where(vm.c.id == vm_id)).first()


def _keep(conn: Connection, row: Row[Any], size: Size, held: Size | None, *, checked: bool = False) -> None:
    _take(conn, row, larger(size, held), checked=checked)
    conn.execute(
        update(vm)
        .where(vm.c.id == row.id)
        .values(
            vcpus=size.vcpus,
            memory_mib=size.memory_mib,
            held_vcpus=held.vcpus if held else None,
            held_memory_mib=held.memory_mib if held else None,
        )
    )


def _take(conn: Connection, row: Row[Any], size: Size, *, checked: bool) -> None:
    """Makes the VM's share of each of its cells what this size takes."""
    host_id = conn.execute(select(allocation.c.host_id).where(allocation.c.vm_id == row.id)).scalar()
    if host_id is None:
        return
    # Before the shares are read: a retune moves them from cell to cell.
    lock_hosts(conn, {host_id})
    shares = conn.execute(
        select(allocation_cell, host_cell.c.threads_per_core)
        .join(host_cell, host_cell.c.cell == allocation_cell.c.cell)
        .where(allocation_cell.c.vm_id == row.id, host_cell.c.host_id == host_id)
        .order_by(allocation_cell.c.cell)
    ).all()
    shape = Shape(size.vcpus, size.memory_mib, 0, NumaPolicy(**row.numa))
    for share in shares:
        wanted = {
            cpu_resource(shape): cpu_part(shape, share.threads_per_core, len(shares)),
            memory_resource(shape): memory_part(shape, len(shares)),
        }
        # Its drives, which are no part of its size, it keeps.
        more = {each: part - share._mapping[each] for each, part in wanted.items()}
        _change(conn, row, host_id, share.cell, {each: change for each, change in more.items() if change}, checked)
    conn.execute(update(host).where(host.c.id == host_id).values(generation=host.c.generation + 1))


def _change(
    conn: Connection, row: Row[Any], host_id: int, cell: int, more: Mapping[CellResource, int], checked: bool
) -> None:
    if not more:
        return
    mine = (host_cell.c.host_id == host_id, host_cell.c.cell == cell)
    fits = [used_column(each) + n <= whole_column(each) for each, n in more.items() if n > 0] if checked else []
    changed = conn.execute(
        update(host_cell)
        .where(*mine, *fits)
        .values({used_column(each): used_column(each) + n for each, n in more.items()})
    )
    if changed.rowcount != 1:
        raise _no_capacity(conn, row, host_id, cell, more)
    conn.execute(
        update(allocation_cell)
        .where(allocation_cell.c.vm_id == row.id, allocation_cell.c.cell == cell)
        .values({allocation_cell.c[each]: allocation_cell.c[each] + n for each, n in more.items()})
    )


def _no_capacity(
    conn: Connection, row: Row[Any], host_id: int, cell: int, more: Mapping[CellResource, int]
) -> PpecError:
    name = conn.execute(select(host.c.name).where(host.c.id == host_id)).scalar_one()
    room = conn.execute(select(host_cell).where(host_cell.c.host_id == host_id, host_cell.c.cell == cell)).one()
    free = {each: room._mapping[whole_column(each).name] - room._mapping[used_column(each).name] for each in more}
    short = next((each for each, n in more.items() if n > max(free[each], 0)), next(iter(more)))
    return PpecError(
        "host.no_capacity",
        f"vm {row.name} wants {more[short]} more of {short} in cell {cell} of host {name}, "
        f"{max(free[short], 0)} are free",
        hint="Ask for less, or make room there: `ppec host retune` moves VMs to other cells.",
        subject=f"vm {row.name}",
        details={"host": name, "cell": cell, "resource": short, "wanted": more[short], "free": max(free[short], 0)},
    )
