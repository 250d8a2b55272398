# SPDX-License-Identifier: Apache-2.0
"""Reads the figures of health from /proc and /sys, below a root that tests make up. No daemon is asked, none needed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from ppec_agentd.health import (
    ClockFigures,
    DriveFigures,
    EccFigures,
    FileSystemFigures,
    HealthFigures,
    LibvirtFigures,
    MemoryFigures,
    PoolFigures,
)
from ppec_agentd.inventory import file_systems
from ppec_agentd.kernel_clock import read_kernel_clock
from ppec_agentd.places import Pool
from ppec_agentd.smart_reader import SMART_FILE
from ppec_agentd.smart_reader import read_figures as read_smart_figures

_MIB = 1024 * 1024


def read_figures(
    folders: tuple[Path, ...],
    libvirt: LibvirtFigures,
    root: Path = Path("/"),
    smart_file: Path = SMART_FILE,
    pools: Iterable[Pool] = (),
) -> HealthFigures:
    """Blocking: some dozens of small files."""
    return HealthFigures(
        file_systems=tuple(read_file_systems(folders)),
        memory=read_memory(root),
        ecc=read_ecc(root),
        drives=tuple(read_drives(root)),
        clock=read_clock(),
        libvirt=libvirt,
        smart=read_smart_figures(smart_file),
        pools=tuple(PoolFigures(pool.name, pool.problem()) for pool in pools),
    )


def read_file_systems(folders: tuple[Path, ...]) -> Iterator[FileSystemFigures]:
    for path, figures in file_systems(folders):
        size_mib, free_mib = (blocks * figures.f_frsize // _MIB for blocks in (figures.f_blocks, figures.f_bavail))
        yield FileSystemFigures(str(path), size_mib, free_mib)


def read_memory(root: Path) -> MemoryFigures:
    """/proc/meminfo, and the kernel's pressure stall information where it has it."""
    sizes = dict(re.findall(r"^(MemTotal|MemAvailable):\s+(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE))
    full = re.search(r"^full .*\bavg60=([\d.]+)", _text(root / "proc/pressure/memory"), re.MULTILINE)
    return MemoryFigures(
        total_mib=int(sizes.get("MemTotal", 0)) // 1024,
        available_mib=int(sizes.get("MemAvailable", 0)) // 1024,
        stalled_percent=float(full[1]) if full else None,
    )


def read_ecc(root: Path) -> EccFigures | None:
    """Summed over the memory controllers; None without any."""
    controllers = sorted((root / "sys/devices/system/edac/mc").glob("mc[0-9]*"))
    if not controllers:
        return None
    corrected, uncorrected = (
        sum(_number(controller / name) for controller in controllers) for name in ("ce_count", "ue_count")
    )
    return EccFigures(corrected, uncorrected)


def read_drives(root: Path) -> Iterator[DriveFigures]:
    """NVMe controllers by their state and sensor; other drives of the machine by their state."""
    for controller in sorted((root / "sys/class/nvme").glob("nvme*")):
        sensor = next((path.parent for path in sorted(controller.glob("hwmon*/temp1_input"))), None)
        yield DriveFigures(
            name=controller.name,
            state=_text(controller / "state").strip(),
            temperature=_degrees(sensor, "temp1_input"),
            critical_temperature=_degrees(sensor, "temp1_crit"),
        )
    for block in sorted((root / "sys/block").glob("*")):
        state = _text(block / "device/state").strip()
        if state and not block.name.startswith("nvme"):
            yield DriveFigures(name=block.name, state=state)


def read_clock() -> ClockFigures:
    try:
        clock = read_kernel_clock()
    except OSError as error:
        return ClockFigures(problem=error.strerror or str(error))
    return ClockFigures(clock.synchronised, clock.worst_error_s)


def _degrees(sensor: Path | None, name: str) -> float | None:
    """The kernel's thousandths of a degree (hwmon)."""
    text = "" if sensor is None else _text(sensor / name).strip()
    return int(text) / 1000 if text.lstrip("-").isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int:
    text = _text(path).strip()
    return int(text) if text.isdigit() else 0
