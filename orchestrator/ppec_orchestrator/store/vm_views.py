# SPDX-License-Identifier: Apache-2.0
"""VMs as the API shows them: the record, and what their hosts last observed.

They are made as the JSON of `VmView`, without the model: to build and check one for each of a hundred thousand VMs
takes several times as long as to read and write them. What is JSON in the database (labels, pins) goes into the answer
as it is, without being read in between. A test holds this and the model together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from operator import itemgetter
from typing import Any

from sqlalchemy import ColumnElement, Connection, FromClause, Select, Text, case, cast, func, literal_column, select

from ppec_contract.api_vms import VmView
from ppec_contract.vm import VmState
from ppec_orchestrator.store import vm_lists
from ppec_orchestrator.store.json_text import JsonTime, address_text, quoted, quoted_or_null
from ppec_orchestrator.store.paging import Documents, Slice
from ppec_orchestrator.store.tables import address, allocation, allocation_cell, host, image, prefix, vm, vrf
from ppec_orchestrator.store.vm_groups import rules_of
from ppec_orchestrator.store.vm_lists import BOUNDS, Bounds, Keys, VmFilter
from ppec_orchestrator.store.vms import find

_UUID_LENGTH = 36
_NO_PINS = (None, "null")
# By names of their own: a query of keys looks into the same tables.
_allocation, _host = allocation.alias("placed"), host.alias("placed_on")


@dataclass(frozen=True, slots=True)
class _Names:
    """What VMs refer to, by its row and as JSON: of each there is little. A prefix has its family, and the members that
    tell of it."""

    images: Mapping[int, str]
    vrfs: Mapping[int | None, str]
    prefixes: Mapping[int, tuple[int, str]]


def show(conn: Connection, ref: str, silent_before: datetime) -> VmView:
    """One VM by name or id. Raises `vm.not_found`."""
    known = find(conn, [ref])[0]
    one = Keys(select(vm.c.name, vm.c.id).where(vm.c.id == known.vm_id), in_order=True)
    row = conn.execute(_rows(one, silent_before)).one()
    view = VmView.model_validate_json(_document(row, _names(conn)))
    return view.model_copy(update={"groups": rules_of(conn, known.vm_id), "drives": _drives(conn, view)})


def _drives(conn: Connection, view: VmView) -> tuple[str, ...]:
    """As its host last reported: which drives it gives, it alone decides."""
    if not view.nvme_drives or view.host is None:
        return ()
    report = conn.execute(select(host.c.report).where(host.c.name == view.host)).scalar_one_or_none() or {}
    mine = (vm.get("nvme_drives", ()) for vm in report.get("vms", ()) if vm["vm_id"] == str(view.vm_id))
    return tuple(next(mine, ()))


def page(conn: Connection, wanted: Slice, chosen: VmFilter, bounds: Bounds = BOUNDS) -> Documents:
    """In four statements; in five if VMs are chosen by place, label or text, in six if by what is unknown of them."""
    rows = conn.execute(_rows(vm_lists.keys(conn, wanted, chosen, bounds), chosen.silent_before)).all()
    shown, names = rows[: wanted.limit], _names(conn)
    last = f"{shown[-1].name}/{shown[-1].id}" if len(rows) > wanted.limit else None
    return Documents([_document(row, names) for row in shown], last)


def _names(conn: Connection) -> _Names:
    vrfs = {row.id: quoted(row.name) for row in conn.execute(select(vrf.c.id, vrf.c.name))}
    images = {row.id: quoted(row.name) for row in conn.execute(select(image.c.id, image.c.name))}
    prefixes = conn.execute(select(prefix.c.id, prefix.c.family, prefix.c.cidr, prefix.c.vrf_id))
    told = {row.id: (row.family, _prefix(row.cidr, vrfs[row.vrf_id])) for row in prefixes}
    return _Names(images, vrfs, told)


def _prefix(cidr: str, vrf_name: str) -> str:
    """Of an address that stands with its VM, its state is not told."""
    return f'"prefix":{quoted(cidr)},"vrf":{vrf_name},"state":null,"until":null,"reserved_for":null'


def _rows(keys: Keys, silent_before: datetime) -> Select[Any]:
    """A row for each VM, in which its cells are a text, and its addresses are: asked for in a statement of their own,
    each would name its VM again, and what comes from a database costs as much as what is done with it."""
    cells = select(func.aggregate_strings(cast(allocation_cell.c.cell, Text), " "))
    addresses = select(
        func.aggregate_strings(
            cast(address.c.prefix_id, Text)
            + literal_column("':'")
            + address.c.address_hex
            + literal_column("':'")
            + cast(address.c.position, Text),
            " ",
        )
    )
    # Of a silent host's VMs nothing is known, whatever it said last, nor of a VM without a host.
    observed = case((_host.c.last_seen_at >= silent_before, vm.c.observed), else_=VmState.UNKNOWN.value)
    columns: tuple[ColumnElement[Any], ...] = (
        cast(vm.c.id, Text),
        vm.c.name,
        vm.c.record,
        observed,
        JsonTime(vm.c.observed_at),
        vm.c.flavor,
        vm.c.image_id,
        vm.c.vcpus,
        vm.c.memory_mib,
        vm.c.disk_mib,
        vm.c.pool,
        vm.c.nvme_drives,
        _host.c.name,
        cells.where(allocation_cell.c.vm_id == vm.c.id).scalar_subquery(),
        cast(vm.c.pins, Text),
        _host.c.vrf_id,
        addresses.where(address.c.vm_id == vm.c.id).scalar_subquery(),
        cast(vm.c.labels, Text),
        JsonTime(vm.c.created_at),
        vm.c.operation_id,
        vm.c.held_vcpus,
        vm.c.held_memory_mib,
    )
    if keys.in_order:
        return keys.query.with_only_columns(*columns).select_from(_placed(vm))
    wanted = keys.query.subquery()
    found = select(*columns).select_from(_placed(wanted.join(vm, vm.c.id == wanted.c.id)))
    return found.order_by(wanted.c.name, wanted.c.id)


def _placed(vms: FromClause) -> FromClause:
    held = vms.outerjoin(_allocation, _allocation.c.vm_id == vm.c.id)
    return held.outerjoin(_host, _host.c.id == _allocation.c.host_id)


def _document(row: Sequence[Any], names: _Names) -> bytes:
    (
        number, name, record, observed, observed_at, flavor, image_id, vcpus, memory_mib, disk_mib, pool, nvme_drives,
        host_name, cells, pins, vrf_id, addresses, labels, created_at, operation_id, held_vcpus, held_memory_mib,
    ) = row  # fmt: skip
    vm_id = number if len(number) == _UUID_LENGTH else _dashed(number)
    known = f'"vm":{quoted(name)},"vm_id":"{vm_id}"'
    held = "null" if held_vcpus is None else f'{{"vcpus":{held_vcpus},"memory_mib":{held_memory_mib}}}'
    # Groups, use and which drives it has are told of one VM alone.
    return (
        f'{{"vm_id":"{vm_id}","name":{quoted(name)},"record":"{record}","observed":"{observed}",'
        f'"observed_at":{quoted_or_null(observed_at)},"flavor":{quoted_or_null(flavor or None)},'
        f'"image":{names.images[image_id]},"vcpus":{vcpus},"memory_mib":{memory_mib},"disk_mib":{disk_mib},'
        f'"pool":{quoted_or_null(pool)},"nvme_drives":{nvme_drives},'
        f'"host":{quoted_or_null(host_name)},"cells":[{_cells(cells) if cells else ""}],'
        f'"pins":{"[]" if pins in _NO_PINS else pins},"vrf":{names.vrfs.get(vrf_id, "null")},'
        f'"addresses":[{_addresses(addresses, names, known) if addresses else ""}],"labels":{labels},'
        f'"created_at":"{created_at}","operation_id":{quoted(operation_id)},"held":{held},'
        '"groups":[],"use":null,"drives":[]}'
    ).encode()


def _dashed(number: str) -> str:
    """SQLite keeps a UUID's 32 digits alone."""
    return f"{number[:8]}-{number[8:12]}-{number[12:16]}-{number[16:20]}-{number[20:]}"


def _cells(text: str) -> str:
    return ",".join(sorted(text.split(), key=int)) if " " in text else text


def _addresses(text: str, names: _Names, owner: str) -> str:
    """IPv4 first, then as asked for: `GrantedAddress.order`."""
    held = []
    for one in text.split():
        prefix_id, number, position = one.split(":")
        family, of = names.prefixes[int(prefix_id)]
        held.append((family, int(position), number, of))
    if len(held) > 1:
        held.sort(key=_ORDER)
    return ",".join(f'{{"address":"{address_text(number, family)}",{of},{owner}}}' for family, _, number, of in held)


_ORDER = itemgetter(0, 1, 2)
