# SPDX-License-Identifier: Apache-2.0
"""The VMs that hold room on hosts, as the planner knows them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import ColumnElement, Connection, Select, String, bindparam, select, type_coerce
from sqlalchemy import cast as sql_cast

from ppec_contract.api_vms import VmRecord
from ppec_contract.vm import CpuPolicy, NumaPolicy
from ppec_orchestrator.placement.fleet import SeatedVm
from ppec_orchestrator.placement.plan import Placement
from ppec_orchestrator.placement.request import Group, Profile, Shape, VmRequest, Where
from ppec_orchestrator.store.tables import allocation, allocation_cell, vm
from ppec_orchestrator.store.vm_groups import groups_on


class Home(NamedTuple):
    """What a host lends its VMs, and whether its agent `opens_cells`: only then any of them is movable."""

    architecture: str
    vrf: str
    opens_cells: bool


class SeatedVms:
    """Reads VMs by host. Profiles and cells are few beside VMs, so equal ones are one object."""

    def __init__(self) -> None:
        self._profiles: dict[tuple[Any, ...], Profile] = {}
        self._new: dict[Profile, Profile] = {}
        self._cells: dict[tuple[int, ...], tuple[int, ...]] = {}

    def read(
        self, conn: Connection, homes: Mapping[int, Home], host_ids: Collection[int] | None
    ) -> Mapping[int, list[SeatedVm]]:
        """The VMs of these hosts, or of all in `homes`, by host; in the order of their ids."""
        found: dict[int, list[SeatedVm]] = {}
        groups = groups_on(conn, host_ids)
        cells: list[int] = []
        last: Any = None
        statement = _STATEMENTS[conn.dialect.name]
        if host_ids is None:
            rows = conn.execute(statement)
        else:
            rows = conn.execute(_OF_SOME[conn.dialect.name], {"ids": host_ids})
        for row in rows:
            if row[0] not in homes:
                continue  # allocated on a host that came after the hosts were read
            vm_id = row[1]
            if last is not None and last[1] != vm_id:
                found.setdefault(last[0], []).append(self._seated(last, homes[last[0]], cells, groups))
                cells = []
            cells.append(row[-1])
            last = row
        if last is not None:
            found.setdefault(last[0], []).append(self._seated(last, homes[last[0]], cells, groups))
        return found

    def new(self, place: Placement, vm: VmRequest, vrf: str) -> SeatedVm:
        """As it will be read, once the placement is committed."""
        seated = Profile(vm.profile.shape, vm.profile.architecture, Where(vrf=vrf))
        return SeatedVm(
            place.vm_id,
            place.name,
            self._new.setdefault(seated, seated),
            self._cells.setdefault(place.cells, place.cells),
            tuple(sorted(vm.groups, key=lambda group: group.name)),
            movable=False,  # not made yet
        )

    def _seated(self, row: Any, home: Home, cells: list[int], groups: Mapping[UUID, tuple[Group, ...]]) -> SeatedVm:
        sat = tuple(cells)
        profile = self._profile((row[3:11], home.architecture, home.vrf))
        sits = self._cells.setdefault(sat, sat)
        movable = home.opens_cells and _movable(profile) and _stands(row)
        return SeatedVm(row[1], row[2], profile, sits, groups.get(row[1], ()), movable=movable)

    def _profile(self, key: tuple[Any, ...]) -> Profile:
        found = self._profiles.get(key)
        if found is None:
            (vcpus, memory_mib, held_vcpus, held_memory_mib, disk_mib, numa, pool, drives), architecture, vrf = key
            # What it holds is what the larger of both sizes takes (`sizes.py`).
            shape = Shape(
                max(vcpus, held_vcpus or 0),
                max(memory_mib, held_memory_mib or 0),
                disk_mib,
                NumaPolicy(**json.loads(numa)),
                pool or "",
                drives,
            )
            # Elsewhere it would have to stay in its VRF: its addresses are of there.
            found = self._profiles[key] = Profile(shape, architecture, Where(vrf=vrf))
        return found


def _movable(profile: Profile) -> bool:
    """Would its host move it to another cell? Drives are handed through whole and are near their cell; a VM that floats
    over shared CPUs has no cores of its own that a retune could give others for; and one that may span cells has a
    guest that knows of them."""
    numa = profile.shape.numa
    return not profile.shape.nvme and numa.cpus is CpuPolicy.DEDICATED and not numa.multi_cell


def _stands(row: Any) -> bool:
    """Whether the VM is made, and not about to be of another size: its host moves no other."""
    record, held_vcpus = row[11], row[5]
    return record == VmRecord.ACTIVE.value and held_vcpus is None


def _statement(numa: ColumnElement[str]) -> Select[Any]:
    return (
        select(
            allocation.c.host_id,
            vm.c.id,
            vm.c.name,
            vm.c.vcpus,
            vm.c.memory_mib,
            vm.c.held_vcpus,
            vm.c.held_memory_mib,
            allocation.c.disk_mib,
            numa,
            allocation.c.pool,
            vm.c.nvme_drives,
            vm.c.record,
            allocation_cell.c.cell,
        )
        .select_from(allocation)
        .join(vm, vm.c.id == allocation.c.vm_id)
        .join(allocation_cell, allocation_cell.c.vm_id == allocation.c.vm_id)
        .order_by(allocation.c.host_id, allocation.c.vm_id, allocation_cell.c.cell)
    )


# The policy as its text: it is parsed once for each profile, not for each VM.
_STATEMENTS = {
    "postgresql": _statement(sql_cast(vm.c.numa, String)),
    "sqlite": _statement(type_coerce(vm.c.numa, String)),
}
_OF_SOME = {
    name: statement.where(allocation.c.host_id.in_(bindparam("ids", expanding=True)))
    for name, statement in _STATEMENTS.items()
}
