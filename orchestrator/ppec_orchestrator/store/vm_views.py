# SPDX-License-Identifier: Apache-2.0
"""VMs as the API shows them: the record, and what their hosts last observed.

Lists are made as plain dicts of the shape of `VmView`, because building and checking a model for each of a hundred
thousand VMs takes several times as long as to read and write them; a test holds the two together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Select, select

from ppec_contract.api import VmView
from ppec_contract.vm import VmState
from ppec_orchestrator.ipdb.ranges import from_hex
from ppec_orchestrator.store import vm_lists
from ppec_orchestrator.store.paging import Documents, Slice
from ppec_orchestrator.store.tables import address, allocation, allocation_cell, host, image, prefix, vm, vrf
from ppec_orchestrator.store.vm_lists import VmFilter
from ppec_orchestrator.store.vms import find

Document = dict[str, Any]


def show(conn: Connection, ref: str, silent_before: datetime) -> VmView:
    """One VM by name or id. Raises `vm.not_found`."""
    known = find(conn, [ref])[0]
    return VmView.model_validate(documents(conn, [known.vm_id], silent_before)[0])


def page(conn: Connection, wanted: Slice, chosen: VmFilter) -> Documents:
    found = vm_lists.keys(conn, wanted, chosen)
    shown = found[: wanted.limit]
    last = f"{shown[-1].name}/{shown[-1].id}" if len(found) > wanted.limit else None
    return Documents(documents(conn, [row.id for row in shown], chosen.silent_before), last)


def documents(conn: Connection, vm_ids: Sequence[UUID], silent_before: datetime) -> list[Document]:
    """These VMs, in this order, in three statements; one that is there no longer is left out."""
    if not vm_ids:
        return []
    rows = {row.id: row for row in conn.execute(_ROWS.where(vm.c.id.in_(vm_ids)))}
    cells = _cells(conn, vm_ids)
    addresses = _addresses(conn, vm_ids)
    return [
        _document(row, cells.get(vm_id, ()), addresses.get(vm_id, ()), silent_before)
        for vm_id in vm_ids
        if (row := rows.get(vm_id)) is not None
    ]


_ROWS: Select[Any] = (
    select(
        vm.c.id,
        vm.c.name,
        vm.c.record,
        vm.c.observed,
        vm.c.observed_at,
        vm.c.flavor,
        image.c.name.label("image_name"),
        vm.c.vcpus,
        vm.c.memory_mib,
        vm.c.disk_mib,
        host.c.name.label("host_name"),
        host.c.last_seen_at,
        vm.c.pins,
        vrf.c.name.label("vrf_name"),
        vm.c.labels,
        vm.c.created_at,
        vm.c.operation_id,
        vm.c.held_vcpus,
        vm.c.held_memory_mib,
    )
    .join(image, image.c.id == vm.c.image_id)
    .outerjoin(allocation, allocation.c.vm_id == vm.c.id)
    .outerjoin(host, host.c.id == allocation.c.host_id)
    .outerjoin(vrf, vrf.c.id == host.c.vrf_id)
)


def _document(
    row: Sequence[Any], cells: Sequence[int], addresses: Sequence[Document], silent_before: datetime
) -> Document:
    (
        vm_id, name, record, observed, observed_at, flavor, image_name, vcpus, memory_mib, disk_mib, host_name,
        last_seen_at, pins, vrf_name, labels, created_at, operation_id, held_vcpus, held_memory_mib,
    ) = row  # fmt: skip
    shown_id = str(vm_id)
    # Of a silent host's VMs nothing is known, whatever it said last, nor of a VM without a host.
    silent = last_seen_at is None or last_seen_at < silent_before
    for one in addresses:
        one["vm"], one["vm_id"] = name, shown_id
    return {
        "vm_id": shown_id,
        "name": name,
        "record": record,
        "observed": VmState.UNKNOWN.value if silent else observed,
        "observed_at": observed_at,
        "flavor": flavor,
        "image": image_name,
        "vcpus": vcpus,
        "memory_mib": memory_mib,
        "disk_mib": disk_mib,
        "host": host_name,
        "cells": cells,
        "pins": pins or (),
        "vrf": vrf_name,
        "addresses": addresses,
        "labels": labels,
        "created_at": created_at,
        "operation_id": operation_id,
        "held": None if held_vcpus is None else {"vcpus": held_vcpus, "memory_mib": held_memory_mib},
    }


def _cells(conn: Connection, vm_ids: Sequence[UUID]) -> dict[UUID, list[int]]:
    columns = select(allocation_cell.c.vm_id, allocation_cell.c.cell)
    found: dict[UUID, list[int]] = defaultdict(list)
    for vm_id, cell in conn.execute(
        columns.where(allocation_cell.c.vm_id.in_(vm_ids)).order_by(allocation_cell.c.cell)
    ):
        found[vm_id].append(cell)
    return found


def _addresses(conn: Connection, vm_ids: Sequence[UUID]) -> dict[UUID, list[Document]]:
    """IPv4 first."""
    rows = conn.execute(
        select(address.c.vm_id, address.c.address_hex, prefix.c.family, prefix.c.cidr, vrf.c.name)
        .join(prefix, prefix.c.id == address.c.prefix_id)
        .join(vrf, vrf.c.id == prefix.c.vrf_id)
        .where(address.c.vm_id.in_(vm_ids))
        .order_by(prefix.c.family, address.c.address_hex)
    )
    found: dict[UUID, list[Document]] = defaultdict(list)
    for vm_id, number, family, cidr, vrf_name in rows:
        text = str(from_hex(number, family))
        found[vm_id].append({"address": text, "prefix": cidr, "vrf": vrf_name, "vm": None, "vm_id": None})
    return found
