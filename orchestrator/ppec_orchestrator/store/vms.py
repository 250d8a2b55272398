# SPDX-License-Identifier: Apache-2.0
"""VM rows: the record of what was decided, and what hosts observe of it. `vm_views` shows them to callers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from sqlalchemy import Connection, bindparam, delete, or_, select, update

from ppec_contract.api_vms import VmRecord
from ppec_contract.errors import PpecError
from ppec_contract.vm import ImageSource, NumaPolicy, VmState
from ppec_orchestrator.store import ipdb
from ppec_orchestrator.store.labels import insert_vm_labels
from ppec_orchestrator.store.rows import insert_rows
from ppec_orchestrator.store.search import vm_text
from ppec_orchestrator.store.serving import GrantedAddress
from ppec_orchestrator.store.tables import allocation, allocation_cell, host, image, vm, vm_search


@dataclass(frozen=True, slots=True)
class NewVm:
    """A VM to record, made by an operation; `image_id` is the image's row."""

    vm_id: UUID
    name: str
    flavor: str
    image_id: int
    vcpus: int
    memory_mib: int
    disk_mib: int
    user_data: str
    labels: Mapping[str, str]
    operation_id: str
    max_vcpus: int | None = None
    max_memory_mib: int | None = None
    numa: NumaPolicy = field(default_factory=NumaPolicy)
    pool: str | None = None
    nvme_drives: int = 0


@dataclass(frozen=True, slots=True)
class PlacedVm:
    """All that decides a VM's spec: its row, where it stands, what it was granted."""

    vm_id: UUID
    name: str
    vcpus: int
    memory_mib: int
    disk_mib: int
    user_data: str
    image: ImageSource
    host: str
    cells: tuple[int, ...]
    addresses: tuple[GrantedAddress, ...]
    max_vcpus: int | None = None
    max_memory_mib: int | None = None
    numa: NumaPolicy = field(default_factory=NumaPolicy)
    pool: str | None = None
    nvme_drives: int = 0


@dataclass(frozen=True, slots=True)
class HostEndpoint:
    """Where a host's proxy listens."""

    address: str
    port: int


@dataclass(frozen=True, slots=True)
class KnownVm:
    """A VM as an action needs it. `host` None: it holds nothing anywhere."""

    vm_id: UUID
    name: str
    record: VmRecord
    host: str | None


_TAKEN = select(vm.c.name).where(
    vm.c.name.in_(bindparam("names", expanding=True)), vm.c.record != VmRecord.FAILED.value
)

_IMAGES = select(image.c.id, image.c.name).where(image.c.id.in_(bindparam("ids", expanding=True)))


def refuse_taken(conn: Connection, names: Sequence[str]) -> None:
    """Raises `vm.exists` naming the names that living VMs have."""
    if found := sorted(conn.execute(_TAKEN, {"names": names}).scalars()):
        raise exists(found)


def insert_vms(conn: Connection, new: Sequence[NewVm], now: datetime) -> None:
    """Raises what `refuse_taken` raises; the unique index decides what that look can't see."""
    refuse_taken(conn, [one.name for one in new])
    insert_rows(
        conn,
        vm,
        [
            {
                "id": one.vm_id,
                "name": one.name,
                "record": VmRecord.CREATING.value,
                "flavor": one.flavor,
                "image_id": one.image_id,
                "vcpus": one.vcpus,
                "memory_mib": one.memory_mib,
                "disk_mib": one.disk_mib,
                "max_vcpus": one.max_vcpus,
                "max_memory_mib": one.max_memory_mib,
                "numa": one.numa.model_dump(mode="json", exclude_defaults=True),
                "pool": one.pool,
                "nvme_drives": one.nvme_drives,
                "user_data": one.user_data,
                "labels": dict(one.labels),
                "created_at": now,
                "operation_id": one.operation_id,
                "observed": VmState.UNKNOWN.value,
            }
            for one in new
        ],
    )
    insert_vm_labels(conn, ((one.vm_id, one.name, one.labels) for one in new))
    images = {row.id: row.name for row in conn.execute(_IMAGES, {"ids": {one.image_id for one in new}})}
    insert_rows(
        conn,
        vm_search,
        [
            {
                "name": one.name,
                "vm_id": one.vm_id,
                "text": vm_text(one.name, images[one.image_id], one.flavor, one.labels),
            }
            for one in new
        ],
    )


def exists(names: Sequence[str]) -> PpecError:
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return PpecError(
        "vm.exists",
        f"the name {shown} is taken" if len(names) == 1 else f"the names {shown} are taken",
        hint="Choose other names, or delete the VMs that have them.",
        subject=f"vm {names[0]}",
        details={"names": list(names[:20]), "count": len(names)},
    )


def set_record(conn: Connection, vm_ids: Collection[UUID], record: VmRecord, operation_id: str | None = None) -> None:
    values = {"record": record.value} | ({"operation_id": operation_id} if operation_id else {})
    if vm_ids:
        conn.execute(update(vm).where(vm.c.id.in_(list(vm_ids))).values(**values))


def leave_to_operator(conn: Connection, operation_id: str) -> None:
    """The VMs that this operation was making or deleting, when it can do no more for them: those that hold something
    on a host count as there, so that they can be deleted; the others have failed."""
    mine = (
        vm.c.operation_id == operation_id,
        vm.c.record.in_((VmRecord.CREATING.value, VmRecord.DELETING.value)),
    )
    held = vm.c.id.in_(select(allocation.c.vm_id))
    conn.execute(update(vm).where(*mine, held).values(record=VmRecord.ACTIVE.value))
    conn.execute(update(vm).where(*mine).values(record=VmRecord.FAILED.value))


def forget(conn: Connection, vm_ids: Collection[UUID]) -> None:
    """The rows themselves. What the VMs held must have been released before."""
    if vm_ids:
        conn.execute(delete(vm).where(vm.c.id.in_(list(vm_ids))))


# --- reading ---------------------------------------------------------------------------------------------------------


def placed(conn: Connection, vm_ids: Collection[UUID], image_url: Callable[[str], str]) -> list[PlacedVm]:
    """Those of the VMs that stand somewhere; `image_url` says where hosts fetch an image of a given sha256."""
    ids = list(vm_ids)
    rows = conn.execute(
        select(vm, image.c.name.label("image_name"), image.c.sha256, image.c.size_bytes, image.c.format)
        .add_columns(host.c.name.label("host_name"))
        .join(image, image.c.id == vm.c.image_id)
        .join(allocation, allocation.c.vm_id == vm.c.id)
        .join(host, host.c.id == allocation.c.host_id)
        .where(vm.c.id.in_(ids))
    ).all()
    cells = cells_of(conn, ids)
    addresses = ipdb.addresses_of(conn, ids)
    return [
        PlacedVm(
            vm_id=row.id,
            name=row.name,
            vcpus=row.vcpus,
            memory_mib=row.memory_mib,
            disk_mib=row.disk_mib,
            user_data=row.user_data,
            image=ImageSource(
                name=row.image_name,
                sha256=row.sha256,
                size_bytes=row.size_bytes,
                format=row.format,
                url=image_url(row.sha256),
            ),
            host=row.host_name,
            cells=cells.get(row.id, ()),
            addresses=addresses.get(row.id, ()),
            max_vcpus=row.max_vcpus,
            max_memory_mib=row.max_memory_mib,
            numa=NumaPolicy(**row.numa),
            pool=row.pool,
            nvme_drives=row.nvme_drives,
        )
        for row in rows
    ]


def endpoints(conn: Connection, hosts: Collection[str]) -> dict[str, HostEndpoint]:
    rows = conn.execute(select(host.c.name, host.c.address, host.c.port).where(host.c.name.in_(list(hosts))))
    return {row.name: HostEndpoint(row.address, row.port) for row in rows}


def cells_of(conn: Connection, vm_ids: Collection[UUID]) -> dict[UUID, tuple[int, ...]]:
    rows = conn.execute(
        select(allocation_cell.c.vm_id, allocation_cell.c.cell)
        .where(allocation_cell.c.vm_id.in_(list(vm_ids)))
        .order_by(allocation_cell.c.cell)
    )
    found: dict[UUID, list[int]] = defaultdict(list)
    for row in rows:
        found[row.vm_id].append(row.cell)
    return {vm_id: tuple(cells) for vm_id, cells in found.items()}


def find(conn: Connection, refs: Iterable[str]) -> list[KnownVm]:
    """Each VM once, in the order named, by name or id. Raises `vm.not_found` naming what isn't there."""
    wanted = list(dict.fromkeys(refs))
    ids = {ref: parsed for ref in wanted if (parsed := _uuid(ref)) is not None}
    # A failed VM's name may belong to a newer one: by name, only the living count, unless there is no other.
    rows = conn.execute(
        select(vm.c.id, vm.c.name, vm.c.record, host.c.name.label("host"))
        .outerjoin(allocation, allocation.c.vm_id == vm.c.id)
        .outerjoin(host, host.c.id == allocation.c.host_id)
        .where(or_(vm.c.name.in_(wanted), vm.c.id.in_(list(ids.values()))))
        .order_by(vm.c.record == VmRecord.FAILED.value, vm.c.created_at.desc())
    ).all()
    known = [KnownVm(row.id, row.name, VmRecord(row.record), row.host) for row in rows]
    by_id = {one.vm_id: one for one in known}
    by_name: dict[str, KnownVm] = {}
    for one in known:
        by_name.setdefault(one.name, one)
    found: dict[UUID, KnownVm] = {}
    missing = []
    for ref in wanted:
        match = by_id.get(ids[ref]) if ref in ids else None
        match = match or by_name.get(ref)
        if match is None:
            missing.append(ref)
        else:
            found[match.vm_id] = match
    if missing:
        raise not_found(missing)
    return list(found.values())


def not_found(refs: Sequence[str]) -> PpecError:
    shown = ", ".join(refs[:5]) + (f" and {len(refs) - 5} more" if len(refs) > 5 else "")
    return PpecError(
        "vm.not_found",
        f"there is no VM {shown}",
        hint="`ppec vm list` shows the VMs there are; names and ids both work.",
        subject=f"vm {refs[0]}",
        details={"missing": list(refs[:20]), "count": len(refs)},
    )


def _uuid(text: str) -> UUID | None:
    try:
        return UUID(text) if len(text) == 36 else None
    except ValueError:
        return None
