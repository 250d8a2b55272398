# SPDX-License-Identifier: Apache-2.0
"""VMs as the API shows them: the record, and what their hosts last observed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, Select, and_, or_, select

from ppec_contract.api import Page, VmRecord, VmView
from ppec_contract.api_ipdb import AddressView
from ppec_contract.errors import PpecError
from ppec_contract.vm import VcpuPin, VmState
from ppec_orchestrator.store import ipdb
from ppec_orchestrator.store.paging import Slice, page_of
from ppec_orchestrator.store.sizes import held_of
from ppec_orchestrator.store.tables import allocation, host, image, prefix, vm, vrf
from ppec_orchestrator.store.vms import cells_of, find


@dataclass(frozen=True, slots=True)
class VmFilter:
    """Which VMs to list; None means any. `silent_before`: a host last seen earlier is silent, its VMs unknown."""

    silent_before: datetime
    host: str | None = None
    name: str | None = None
    record: VmRecord | None = None


def page(conn: Connection, wanted: Slice, chosen: VmFilter) -> Page[VmView]:
    """VMs by name, then id."""
    query = _views().order_by(vm.c.name, vm.c.id).limit(wanted.limit + 1)
    if chosen.host is not None:
        query = query.where(host.c.name == chosen.host)
    if chosen.name is not None:
        query = query.where(vm.c.name == chosen.name)
    if chosen.record is not None:
        query = query.where(vm.c.record == chosen.record.value)
    if wanted.after is not None:
        name, vm_id = _position(str(wanted.after))
        query = query.where(or_(vm.c.name > name, and_(vm.c.name == name, vm.c.id > vm_id)))
    rows = conn.execute(query).all()
    views = _as_views(conn, rows, chosen.silent_before)
    return page_of(views, wanted.limit, lambda view: view, lambda view: f"{view.name}/{view.vm_id}")


def _position(after: str) -> tuple[str, UUID]:
    name, _, vm_id = after.partition("/")
    try:
        return name, UUID(vm_id)
    except ValueError as error:
        raise PpecError(
            "request.invalid",
            "cursor: it is not one that this list answered",
            hint="Pass next_cursor of the page before, unchanged.",
            subject="cursor",
        ) from error


def show(conn: Connection, ref: str, silent_before: datetime) -> VmView:
    """One VM by name or id. Raises `vm.not_found`."""
    known = find(conn, [ref])[0]
    rows = conn.execute(_views().where(vm.c.id == known.vm_id)).all()
    return _as_views(conn, rows, silent_before)[0]


def _views() -> Select[Any]:
    return (
        select(
            vm,
            image.c.name.label("image_name"),
            host.c.name.label("host_name"),
            host.c.last_seen_at,
            vrf.c.name.label("vrf_name"),
        )
        .join(image, image.c.id == vm.c.image_id)
        .outerjoin(allocation, allocation.c.vm_id == vm.c.id)
        .outerjoin(host, host.c.id == allocation.c.host_id)
        .outerjoin(vrf, vrf.c.id == host.c.vrf_id)
    )


def _as_views(conn: Connection, rows: Sequence[Row[Any]], silent_before: datetime) -> tuple[VmView, ...]:
    ids = [row.id for row in rows]
    cells = cells_of(conn, ids)
    addresses = address_views(conn, ids, {row.id: row.name for row in rows})
    return tuple(
        VmView(
            vm_id=row.id,
            name=row.name,
            record=VmRecord(row.record),
            observed=_observed(row, silent_before),
            observed_at=row.observed_at,
            flavor=row.flavor,
            image=row.image_name,
            vcpus=row.vcpus,
            memory_mib=row.memory_mib,
            disk_mib=row.disk_mib,
            host=row.host_name,
            cells=cells.get(row.id, ()),
            pins=tuple(VcpuPin.model_validate(pin) for pin in row.pins or ()),
            vrf=row.vrf_name,
            addresses=addresses.get(row.id, ()),
            tags=row.tags,
            created_at=row.created_at,
            operation_id=row.operation_id,
            held=held_of(row),
        )
        for row in rows
    )


def _observed(row: Row[Any], silent_before: datetime) -> VmState:
    """A silent host's VMs are unknown, whatever it said last; what a VM without a host is doing, nobody can say."""
    silent = row.last_seen_at is None or row.last_seen_at < silent_before
    return VmState.UNKNOWN if silent else VmState(row.observed)


def address_views(
    conn: Connection, vm_ids: Collection[UUID], names: Mapping[UUID, str]
) -> dict[UUID, tuple[AddressView, ...]]:
    granted = ipdb.addresses_of(conn, vm_ids)
    if not granted:
        return {}
    named = conn.execute(select(prefix.c.id, vrf.c.name).join(vrf, vrf.c.id == prefix.c.vrf_id))
    vrfs = {row.id: row.name for row in named}
    return {
        vm_id: tuple(
            AddressView(
                address=one.address.ip,
                prefix=one.address.network,
                vrf=vrfs[one.prefix_id],
                vm=names.get(vm_id),
                vm_id=vm_id,
            )
            for one in addresses
        )
        for vm_id, addresses in granted.items()
    }
