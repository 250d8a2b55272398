# SPDX-License-Identifier: Apache-2.0
"""What the kernel shows of an NVMe drive, below a root that tests make up; and whether the host itself needs it."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from ppec_agentd.nvme.drive import HOST_DRIVER, NvmeDrive

_NVME_CLASS = "0x010802"
_BRIDGE_CLASS = "0x0604"
_NAMESPACE = re.compile(r"nvme\d+n\d+")
_ANY_NAMESPACE = re.compile(r"nvme\d+(c\d+)?n\d+")
BEING_ERASED = "it is being erased"
_CLAIMED = "is in use by the host"
# Who asks the same question claims the device for a moment as well: a use lasts longer.
_CLAIM_TRIES, _CLAIM_AGAIN_S = 3, 0.05


def read_drive(address: str, root: Path = Path("/"), locks: Path | None = None) -> NvmeDrive:
    """Blocking: some dozens of small files. Opens block devices to ask whose they are, and reads nothing of them.

    `locks` is where those who erase drives hold their locks: what one of them has is in no use of the host's.
    """
    device = root / "sys/bus/pci/devices" / address
    if not device.exists():
        return NvmeDrive(address, problem="this host has no PCI device there")
    found = _word(device / "class")
    if found != _NVME_CLASS:
        return NvmeDrive(address, problem=f"the PCI device there is no NVMe drive: its class is {found or 'unknown'}")
    driver = (device / "driver").resolve().name if (device / "driver").exists() else ""
    cell = int(_word(device / "numa_node") or -1)
    controller = next(iter(_entries(device / "nvme", "nvme*")), None) if driver == HOST_DRIVER else None
    names = _namespaces(controller)
    group = _group_problem(device)
    use = "" if group else next(_uses(names, root), "") or _claim(names, root)
    erased = use.endswith(_CLAIMED) and locks is not None and being_erased(address, locks)
    return NvmeDrive(
        address=address,
        cell=None if cell < 0 else cell,
        driver=driver,
        serial="" if controller is None else _word(controller / "serial"),
        namespaces=tuple(name for name in names if _NAMESPACE.fullmatch(name)),
        problem=BEING_ERASED if erased else group or use,
        used_by_host=bool(use) and not erased and not _by_paths(names),
    )


def _namespaces(controller: Path | None) -> list[str]:
    if controller is None:
        return []
    return [entry.name for entry in _entries(controller) if _ANY_NAMESPACE.fullmatch(entry.name)]


def _group_problem(device: Path) -> str:
    """VFIO hands over whole IOMMU groups: what else is in the drive's would go along."""
    if not (device / "iommu_group").exists():
        return "it has no IOMMU group: the IOMMU is off, or there is none"
    members = _entries(device / "iommu_group/devices")
    if not members:
        return "it is going: the kernel is taking its device away"
    others = [
        path.name
        for path in members
        if path.name != device.name and not _word(path / "class").startswith(_BRIDGE_CLASS)
    ]
    return f"its IOMMU group has other devices: {', '.join(others)}" if others else ""


def _uses(names: list[str], root: Path) -> Iterator[str]:
    """What files show of what the host does with the drive."""
    for name in _by_paths(names):
        yield f"{name} is one of several paths to a drive"
    namespaces = [name for name in names if _NAMESPACE.fullmatch(name)]
    blocks = [block for name in namespaces for block in _with_partitions(root / "sys/class/block" / name)]
    for block in blocks:
        holders = [path.name for path in _entries(block / "holders")]
        if holders:
            yield f"{block.name} is part of {', '.join(holders)}"
    mounted, swaps = _mounted(root), _swaps(root)
    for block in blocks:
        for key in (_word(block / "dev"), f"/dev/{block.name}"):
            if key in mounted:
                yield f"{block.name} is mounted on {mounted[key]}"
        if f"/dev/{block.name}" in swaps:
            yield f"{block.name} holds swap"


def _claim(names: list[str], root: Path) -> str:
    """The kernel's own answer, which has the last word: it knows of what no file shows, in whatever namespace it is."""
    claimed = (name for name in names if is_claimed(root / "dev" / name))
    return next((f"{name} {_CLAIMED}" for name in claimed), "")


def being_erased(address: str, locks: Path) -> bool:
    """Whether a program that erases the drive holds its lock, be it of this agent, or left over from one before."""
    try:
        lock = os.open(lock_path(address, locks), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def lock_path(address: str, locks: Path) -> Path:
    return locks / f"{address}.lock"


def _by_paths(names: list[str]) -> list[str]:
    return [name for name in names if not _NAMESPACE.fullmatch(name)]


def _with_partitions(block: Path) -> list[Path]:
    parts = [entry for entry in _entries(block, f"{block.name}p*") if (entry / "partition").exists()]
    return [block, *parts]


def _mounted(root: Path) -> dict[str, str]:
    """Where block devices are mounted, by number and by path. The first process has the host's own mounts, of which the
    agent's unit doesn't see all. See proc_pid_mountinfo(5)."""
    found: dict[str, str] = {}
    for line in _word(root / "proc/1/mountinfo").splitlines():
        fields, _, rest = line.partition(" - ")
        number, place = fields.split()[2], fields.split()[4]
        source = rest.split()[1] if len(rest.split()) > 1 else ""
        for key in (number, source):
            found.setdefault(key, place)
    return found


def _swaps(root: Path) -> set[str]:
    return {line.split()[0] for line in _word(root / "proc/swaps").splitlines()[1:]}


def is_claimed(device: Path) -> bool:
    """Whether somebody has the block device, or a partition of it, for himself: open(2), O_EXCL without O_CREAT."""
    for tried in range(_CLAIM_TRIES):
        if tried:
            time.sleep(_CLAIM_AGAIN_S)
        try:
            os.close(os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
        except OSError as error:
            if error.errno == errno.EBUSY:
                continue
        return False
    return True


def _entries(folder: Path, pattern: str = "*") -> list[Path]:
    """None of a folder that is not there: the kernel may be taking it away at this moment."""
    try:
        return sorted(entry for entry in folder.iterdir() if fnmatch(entry.name, pattern))
    except OSError:
        return []


def _word(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
