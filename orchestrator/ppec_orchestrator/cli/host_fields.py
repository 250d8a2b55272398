# SPDX-License-Identifier: Apache-2.0
"""What a host says of itself, in lines for a reader: `ppec host show`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ppec_orchestrator.cli import lists

if TYPE_CHECKING:
    from ppec_contract.api_hosts import HostView
    from ppec_contract.host import CellReport, CpuReport, Drift, DriveReport, HostUse, HugePagesReport, NicReport, VmUse

_KIB_PER_MIB = 1024


def of_cell(cell: CellReport) -> str:
    return _of(
        f"cell {cell.cell} of socket {cell.socket}",
        (
            _free(cell.cores_free, cell.cores, "cores") + f" ({cell.cores_reserved} reserved)",
            f"{cell.threads_per_core} thread{'s' * (cell.threads_per_core > 1)} per core",
            _free(cell.memory_free_mib, cell.memory_mib, "MiB of memory") + f" ({cell.memory_reserved_mib} reserved)",
            *map(_huge_pages, cell.huge_pages),
            cell.cores_shared and f"{cell.cores_shared} cores shared",
            cell.shared_vcpus and _free(cell.shared_vcpus_free, cell.shared_vcpus, "sharing vCPUs"),
            cell.nvme_drives and _free(cell.nvme_drives_free, cell.nvme_drives, "NVMe drives"),
        ),
    )


def of_cpu(cpu: CpuReport) -> str:
    return _of(cpu.model, (f"{cpu.sockets} sockets", f"{cpu.cores} cores", f"{cpu.threads} threads"))


def of_drive(drive: DriveReport) -> str:
    return _of(
        drive.name,
        (
            f"{drive.size_mib} MiB",
            "rotational" if drive.rotational else "",
            drive.model,
            drive.serial and f"serial number {drive.serial}",
            _near(drive.cell),
        ),
    )


def of_nic(nic: NicReport) -> str:
    speed = "" if nic.speed_mbit is None else f"{nic.speed_mbit} Mbit/s"
    return _of(nic.name, (nic.state, speed, nic.mac, nic.master and f"of {nic.master}", _near(nic.cell)))


def of_drift(drift: Drift) -> str:
    whose = drift.name or str(drift.vm_id or "")
    was, now = drift.before and f"{drift.before} before", drift.after and f"{drift.after} now"
    return _of(drift.kind.value.replace("_", " ") + (f" ({whose})" if whose else ""), (was, now))


def of_use(use: HostUse) -> list[str]:
    free = [f"{path}: {free_mib} MiB free" for path, free_mib in use.free_mib.items()]
    return [f"{use.memory_available_mib} MiB of memory available", *free, *map(of_vm_use, use.vms)]


def of_vm_use(use: VmUse) -> str:
    cpu_time = f"{use.cpu_time_ms / 1000:.1f} s of CPU time"
    return f"vm {use.vm_id}: {cpu_time}, {use.memory_mib} MiB of memory, {use.disk_mib} MiB of disk"


# By the fields' names.
HOST_FIELDS: Mapping[str, Callable[[HostView], Sequence[str]]] = {
    "labels": lambda host: [lists.shown_labels(host)],
    "cells": lambda host: [of_cell(cell) for cell in host.cells],
    "cpu": lambda host: [of_cpu(host.cpu)] if host.cpu else [],
    "drives": lambda host: [of_drive(drive) for drive in host.drives],
    "file_systems": lambda host: [
        f"{one.path}: {_free(one.free_mib, one.size_mib, 'MiB')}" for one in host.file_systems
    ],
    "nics": lambda host: [of_nic(nic) for nic in host.nics],
    "pools": lambda host: [f"{pool.name}: {_free(pool.free_mib, pool.size_mib, 'MiB')}" for pool in host.pools],
    "health": lambda host: [f"{one.check}: {one.level.value}, {one.found}" for one in host.health],
    "drift": lambda host: [of_drift(drift) for drift in host.drift],
    "use": lambda host: of_use(host.use) if host.use else [],
}


def _of(what: str, parts: Iterable[str | int]) -> str:
    """Without the parts that say nothing."""
    said = ", ".join(str(part) for part in parts if part)
    return ": ".join(part for part in (what, said) if part)


def _free(free: int, whole: int, of: str) -> str:
    return f"{free} of {whole} {of} free"


def _huge_pages(pages: HugePagesReport) -> str:
    size = f"{pages.size_kib // _KIB_PER_MIB} MiB" if pages.size_kib >= _KIB_PER_MIB else f"{pages.size_kib} KiB"
    return _free(pages.pages_free, pages.pages, f"huge pages of {size}")


def _near(cell: int | None) -> str:
    return "" if cell is None else f"near cell {cell}"
