# SPDX-License-Identifier: Apache-2.0
"""Storage pools and NVMe drives of simulated hosts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from ppec_contract.errors import PpecError
from ppec_contract.vm import VmInfo, VmSpec


def refuse_without_room(vms: Collection[VmInfo], spec: VmSpec, pools_mib: Mapping[str, int] | None) -> None:
    """Raises `host.pool_missing`, or `host.no_capacity` of a pool that is too full; None: every pool is there, and has
    room."""
    pool = spec.root_disk.pool
    if pool is None or pools_mib is None:
        return
    if pool not in pools_mib:
        raise PpecError("host.pool_missing", f"vm {spec.name} wants pool {pool}", subject=f"vm {spec.name}")
    free_mib = pools_mib.get(pool, 0) - sum(vm.disk_mib for vm in vms if vm.pool == pool)
    if free_mib < spec.root_disk.size_mib:
        raise PpecError(
            "host.no_capacity",
            f"vm {spec.name} wants {spec.root_disk.size_mib} MiB of pool {pool}, {free_mib} are free",
            subject=f"vm {spec.name}",
        )


def drives_for(vms: Collection[VmInfo], spec: VmSpec, of_each_cell: int | None) -> tuple[str, ...]:
    """The first free ones near the VM's cells, as many near each. Raises `host.no_capacity` where there are too few;
    None: there always are enough."""
    given = {drive for vm in vms for drive in vm.nvme_drives}
    near_each = -(-spec.nvme_drives // len(spec.cells))
    found: list[str] = []
    for cell in spec.cells:
        free = (drive for drive in _drives(cell, of_each_cell) if drive not in given)
        mine = [drive for drive, _ in zip(free, range(near_each), strict=False)]
        if len(mine) < near_each:
            raise PpecError(
                "host.no_capacity",
                f"vm {spec.name} wants {near_each} NVMe drives near cell {cell}, {len(mine)} are free",
                subject=f"vm {spec.name}",
            )
        found += mine
    return tuple(found)


def _drives(cell: int, count: int | None) -> Iterator[str]:
    """Each cell has PCI buses of its own, with 32 drives on a bus."""
    most = 16 * 32 if count is None else count
    return (f"{cell:04x}:{number // 32 + 1:02x}:{number % 32:02x}.0" for number in range(most))
