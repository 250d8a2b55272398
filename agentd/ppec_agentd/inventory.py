# SPDX-License-Identifier: Apache-2.0
"""The machine's own parts, for the report: CPUs, drives, NICs, and the file systems that VMs live on.

All from /sys and /proc, below a root that tests make up; what can't be read is left empty. Only what belongs to the
machine counts: no loop device, no device mapper, no NIC of a VM, for those come and go with what is not reported here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ppec_contract.host import CpuReport, DriveReport, FileSystemReport, NicReport
from ppec_contract.words import short

_SECTOR = 512
_MIB = 1024 * 1024
_LONGEST = 128
# What is free counts as moved when it has moved by this share of the size.
_STEPS = 32


@dataclass(frozen=True, slots=True)
class MachineParts:
    """Each list is ordered by name."""

    cpu: CpuReport | None = None
    drives: tuple[DriveReport, ...] = ()
    file_systems: tuple[FileSystemReport, ...] = ()
    nics: tuple[NicReport, ...] = ()


NO_PARTS = MachineParts()


class Inventory:
    """Reads the parts; remembers what it said was free, so as to say the same until it has moved (`steady`)."""

    def __init__(self, folders: tuple[Path, ...], root: Path = Path("/")) -> None:
        self._folders = folders
        self._root = root
        self._said: dict[Path, int] = {}

    def read(self) -> MachineParts:
        """Blocking: some dozens of small files."""
        return MachineParts(
            cpu=read_cpu(self._root),
            drives=tuple(read_drives(self._root)),
            file_systems=tuple(self._file_systems()),
            nics=tuple(read_nics(self._root)),
        )

    def _file_systems(self) -> Iterator[FileSystemReport]:
        for folder, figures in file_systems(self._folders):
            size_mib, free_mib = (blocks * figures.f_frsize // _MIB for blocks in (figures.f_blocks, figures.f_bavail))
            said = self._said[folder] = steady(self._said.get(folder), free_mib, size_mib)
            yield FileSystemReport(path=short(str(folder)), size_mib=size_mib, free_mib=said)


def file_systems(folders: tuple[Path, ...]) -> Iterator[tuple[Path, os.statvfs_result]]:
    """Each file system once, by the first folder that is on it."""
    seen: set[int] = set()
    for folder in folders:
        try:
            device, figures = folder.stat().st_dev, os.statvfs(folder)
        except OSError:
            continue
        if device not in seen:
            seen.add(device)
            yield folder, figures


def steady(said_mib: int | None, free_mib: int, size_mib: int) -> int:
    """What to say is free: what was said, unless the truth is further from it than a step.

    Rounding alone would not do: a figure near a boundary goes back and forth over it.
    """
    step = max(1, size_mib // _STEPS)
    if said_mib is not None and abs(free_mib - said_mib) < step:
        return said_mib
    return free_mib // step * step


def read_cpu(root: Path) -> CpuReport:
    model = next((v for n, v in _cpuinfo(root) if n in ("model name", "cpu", "Processor")), "")
    threads, cores, sockets = 0, set[tuple[str, str, str]](), set[str]()
    for topology in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/topology"):
        package, die, core = (_word(topology / name) for name in ("physical_package_id", "die_id", "core_id"))
        threads += 1
        sockets.add(package)
        cores.add((package, die, core))
    return CpuReport(model=model[:_LONGEST], sockets=len(sockets), cores=len(cores), threads=threads)


def _cpuinfo(root: Path) -> Iterator[tuple[str, str]]:
    for line in _word(root / "proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        yield name.strip(), value.strip()


def read_drives(root: Path) -> Iterator[DriveReport]:
    """Block devices with a device of the machine behind them; partitions and what is built on drives have none."""
    for block in sorted((root / "sys/block").glob("*")):
        device = block / "device"
        if not device.exists():
            continue
        yield DriveReport(
            name=short(block.name),
            size_mib=_number(block / "size", 0) * _SECTOR // _MIB,
            rotational=_word(block / "queue/rotational") == "1",
            model=_word(device / "model")[:_LONGEST],
            serial=(_word(device / "serial") or _word(block / "serial") or _word(device / "wwid"))[:_LONGEST],
            cell=_cell(device),
        )


def read_nics(root: Path) -> Iterator[NicReport]:
    for nic in sorted((root / "sys/class/net").glob("*")):
        if not ((nic / "device").exists() or (nic / "bonding").exists()):
            continue
        speed = _number(nic / "speed", -1)
        master = nic / "master"
        yield NicReport(
            name=short(nic.name),
            mac=_word(nic / "address")[:_LONGEST],
            state=_word(nic / "operstate")[:_LONGEST] or "unknown",
            speed_mbit=speed if speed > 0 else None,
            master=short(master.resolve().name) if master.exists() else "",
            cell=_cell(nic / "device"),
        )


def _cell(device: Path) -> int | None:
    """The NUMA cell of the device, or of the nearest device above it that has one (an NVMe namespace has none)."""
    try:
        resolved = device.resolve(strict=True)
    except OSError:
        return None
    for above in (resolved, *resolved.parents):
        if above.name == "devices":
            break
        cell = _number(above / "numa_node", -1)
        if cell >= 0:
            return cell
    return None


def _word(path: Path) -> str:
    """A file's printable text, stripped."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return ""
    return "".join(c for c in text if c.isprintable() or c == "\n").strip()


def _number(path: Path, otherwise: int) -> int:
    try:
        return int(_word(path))
    except ValueError:
        return otherwise
