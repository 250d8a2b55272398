# SPDX-License-Identifier: Apache-2.0
"""What hosts report, applied to the record: the host's facts, cells and pools, and what it observes of its VMs.

What is decided (VM records, their hosts and sizes) is never touched by a report. In which of its cells a VM sits is the
host's own matter: see `seats.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, bindparam, case, delete, insert, not_, or_, select, update

from ppec_contract.host import CellReport, HostReport, PoolReport
from ppec_contract.model import canonical_json
from ppec_contract.vm import VmState
from ppec_orchestrator.liveness import MessageId
from ppec_orchestrator.placement.demand import CELL_RESOURCES
from ppec_orchestrator.store import sizes
from ppec_orchestrator.store.catalogue import not_found
from ppec_orchestrator.store.cells import used_column
from ppec_orchestrator.store.seats import follow
from ppec_orchestrator.store.tables import allocation, host, host_cell, host_pool, vm

# The part of a report that host lists show.
FACTS = (
    "architecture",
    "domain_type",
    "agent_version",
    "libvirt_version",
    "qemu_version",
    "kernel_version",
    "capabilities",
    "bridges",
)


_NO_ROOM = dict.fromkeys((*CELL_RESOURCES, "cores_reserved", "memory_reserved_mib", "shared_cpus"), 0)


@dataclass(frozen=True, slots=True)
class StoredReport:
    """Which report of a host the database holds; `message` None means none yet. `tick`: see `NewReport`."""

    host_id: int
    message: MessageId | None
    digest: str | None
    last_seen_at: datetime | None
    tick: int | None


@dataclass(frozen=True, slots=True)
class NewReport:
    """A report accepted from the host. `after` is the message it was found to follow. `tick` is the moment before its
    snapshot, in the process that sent the message; None from agents that don't say."""

    host_id: int
    message: MessageId
    digest: str
    report: HostReport
    after: MessageId | None
    tick: int | None = None

    @property
    def clock_was_set_back(self) -> bool:
        """Then nothing that an earlier process said can be later, whatever its moment."""
        return self.after is not None and self.message.agent_started_at_unix_ms < self.after.agent_started_at_unix_ms


def stored_report(conn: Connection, host_name: str) -> StoredReport:
    """Raises `host.not_found`."""
    columns = (
        host.c.id,
        host.c.agent_started_at_unix_ms,
        host.c.report_sequence,
        host.c.report_digest,
        host.c.last_seen_at,
        host.c.report_tick,
    )
    row = conn.execute(select(*columns).where(host.c.name == host_name)).one_or_none()
    if row is None:
        raise not_found("host", "host", host_name)
    message = MessageId(row.agent_started_at_unix_ms, row.report_sequence) if row.report_digest else None
    return StoredReport(row.id, message, row.report_digest, row.last_seen_at, row.report_tick)


def stored_picture(conn: Connection, host_id: int) -> HostReport | None:
    """The report itself, as its agent spoke it. None also if it is of a time whose reports can't be read any more."""
    spoken = conn.execute(select(host.c.report).where(host.c.id == host_id)).scalar_one_or_none()
    try:
        return None if spoken is None else HostReport.model_validate_json(canonical_json(spoken))
    except ValueError:
        return None


def apply_report(conn: Connection, new: NewReport, *, now: datetime) -> bool:
    """False, and nothing changed, when another report was stored meanwhile."""
    report = new.report
    dumped = report.model_dump(mode="json")
    unchanged_since = MessageId(0, 0) if new.after is None else new.after
    updated = conn.execute(
        update(host)
        .where(
            host.c.id == new.host_id,
            host.c.agent_started_at_unix_ms == unchanged_since.agent_started_at_unix_ms,
            host.c.report_sequence == unchanged_since.sequence,
        )
        .values(
            agent_started_at_unix_ms=new.message.agent_started_at_unix_ms,
            report_sequence=new.message.sequence,
            report_tick=new.tick,
            report_digest=new.digest,
            # Without the fields that an older agent doesn't know: their digest is of what they spoke.
            report=report.as_spoken(),
            facts={name: dumped[name] for name in FACTS} | {"drift_count": len(report.drift)},
            disk_mib=report.disk_mib,
            generation=host.c.generation + case((host.c.disk_mib != report.disk_mib, 1), else_=0),
            last_seen_at=now,
        )
    )
    if updated.rowcount != 1:
        return False
    # Of other room than was counted on for a loss, a plan that relies on the host has to be told.
    if _apply_cells(conn, new.host_id, report.cells) | _apply_pools(conn, new.host_id, report.pools):
        conn.execute(update(host).where(host.c.id == new.host_id).values(generation=host.c.generation + 1))
    if new.clock_was_set_back:
        forgotten = {"seen_started_at_unix_ms": None, "seen_tick": None}
        conn.execute(update(allocation).where(allocation.c.host_id == new.host_id).values(forgotten))
    _apply_vms(conn, new, now)
    return True


def _apply_cells(conn: Connection, host_id: int, cells: tuple[CellReport, ...]) -> bool:
    """Whether any is another one than before."""
    changed = False
    known = {row.cell: row for row in conn.execute(select(host_cell).where(host_cell.c.host_id == host_id))}
    for cell in cells:
        values = _cell_values(cell)
        row = known.pop(cell.cell, None)
        if row is not None and all(row._mapping[name] == value for name, value in values.items()):
            continue
        changed = True
        if row is None:
            conn.execute(insert(host_cell).values(host_id=host_id, cell=cell.cell, **values))
        else:
            conn.execute(_cell(update(host_cell), host_id, cell.cell).values(values))
    for number, row in known.items():
        # A cell that is gone but still holds VMs by the record stays, with no room: what it holds must be released.
        if not any(row._mapping[used_column(resource).name] for resource in CELL_RESOURCES):
            conn.execute(_cell(delete(host_cell), host_id, number))
        elif any(row._mapping[name] != value for name, value in _NO_ROOM.items()):
            conn.execute(_cell(update(host_cell), host_id, number).values(_NO_ROOM))
        else:
            continue
        changed = True
    return changed


def _apply_pools(conn: Connection, host_id: int, pools: tuple[PoolReport, ...]) -> bool:
    """Whether any is another one than before."""
    changed = False
    known = {row.name: row for row in conn.execute(select(host_pool).where(host_pool.c.host_id == host_id))}
    # A name that is there twice would be one pool of the record.
    for name, size_mib in {pool.name: pool.size_mib for pool in pools}.items():
        row = known.pop(name, None)
        if row is not None and row.size_mib == size_mib:
            continue
        changed = True
        if row is None:
            conn.execute(insert(host_pool).values(host_id=host_id, name=name, size_mib=size_mib))
        else:
            conn.execute(_pool(update(host_pool), host_id, name).values(size_mib=size_mib))
    for name, row in known.items():
        # As with a cell that is gone.
        if not row.used_mib:
            conn.execute(_pool(delete(host_pool), host_id, name))
        elif row.size_mib:
            conn.execute(_pool(update(host_pool), host_id, name).values(size_mib=0))
        else:
            continue
        changed = True
    return changed


def _pool(statement: Any, host_id: int, name: str) -> Any:
    return statement.where(host_pool.c.host_id == host_id, host_pool.c.name == name)


def _answered_after(new: NewReport) -> ColumnElement[bool]:
    """Of an agent that doesn't give moments only what an older process said is older."""
    process, tick = allocation.c.seen_started_at_unix_ms, allocation.c.seen_tick
    started = new.message.agent_started_at_unix_ms
    later = process > started
    if new.tick is not None:
        later = or_(later, and_(process == started, tick > new.tick))
    return and_(process.is_not(None), later)


def _cell(statement: Any, host_id: int, number: int) -> Any:
    return statement.where(host_cell.c.host_id == host_id, host_cell.c.cell == number)


def _cell_values(cell: CellReport) -> dict[str, int]:
    return {
        "socket": cell.socket,
        "threads_per_core": cell.threads_per_core,
        "cores": max(cell.cores - cell.cores_reserved, 0),
        "memory_mib": max(cell.memory_mib - cell.memory_reserved_mib, 0),
        "cores_reserved": min(cell.cores_reserved, cell.cores),
        "memory_reserved_mib": min(cell.memory_reserved_mib, cell.memory_mib),
        "shared_cpus": cell.cores_shared * cell.threads_per_core,
        "shared_vcpus": cell.shared_vcpus,
        "pages_2m": _pages(cell, 2048),
        "pages_1g": _pages(cell, 1024 * 1024),
        "nvme": cell.nvme_drives,
    }


def _pages(cell: CellReport, size_kib: int) -> int:
    return sum(pages.pages for pages in cell.huge_pages if pages.size_kib == size_kib)


def _apply_vms(conn: Connection, new: NewReport, now: datetime) -> None:
    """Only VMs allocated on this host: a host may say nothing of another's. Rows that stay the same aren't written.

    An allocated VM that the host doesn't have is unknown: it may be under way. Reconciliation decides what it means.
    A VM of which the host answered after it began to look is left as it is: an agent reports anew after every
    answer. The host's row is written already, so no answer is being recorded meanwhile (`observations.py`).
    """
    seen = {info.vm_id: info for info in new.report.vms if info.managed}
    rows = conn.execute(
        select(vm.c.id, vm.c.observed, vm.c.pins, vm.c.held_vcpus)
        .join(allocation, allocation.c.vm_id == vm.c.id)
        .where(allocation.c.host_id == new.host_id, not_(_answered_after(new)))
        .order_by(vm.c.id)
    )
    changes, seats, resized = [], {}, {}
    for row in rows:
        info = seen.get(row.id)
        if info is not None:
            seats[row.id] = info.cells
            if row.held_vcpus is not None:
                resized[row.id] = info
        state = info.state if info is not None else VmState.UNKNOWN
        pins = [pin.model_dump() for pin in info.pins] if info is not None else None
        if (row.observed, row.pins) != (state.value, pins):
            at = None if state is VmState.UNKNOWN else now
            changes.append({"row": row.id, "state": state.value, "at": at, "pinned": pins})
    if changes:
        statement = (
            update(vm)
            .where(vm.c.id == bindparam("row"))
            .values(observed=bindparam("state"), observed_at=bindparam("at"), pins=bindparam("pinned"))
        )
        conn.execute(statement, changes)
    follow(conn, seats)
    if resized:
        sizes.follow_report(conn, resized)
