# SPDX-License-Identifier: Apache-2.0
"""Reads what the kernel shows of the machine, below a root that tests make up. What can't be read counts as absent."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ppec_agentd.doctor.snapshot import CgroupFacts, ClockFacts, CpuFacts, HugePageFacts, KvmFacts, PathFacts
from ppec_agentd.kernel_clock import read_kernel_clock
from ppec_agentd.topology import parse_cpu_list

_KVM_GET_API_VERSION = 0xAE00
_KVM_API = 12
_V1_CONTROLLERS = frozenset({"cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "blkio", "pids", "hugetlb"})


def word(path: Path) -> str:
    """A file's text without its end of line; empty if it can't be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def read_cpu(root: Path) -> CpuFacts:
    cpuinfo = word(root / "proc/cpuinfo")
    flags: frozenset[str] | None = None
    model = ""
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            flags = frozenset(value.split()) if flags is None else flags & frozenset(value.split())
        elif name.strip() in ("model name", "cpu", "Processor") and not model:
            model = value.strip()
    cpus = root / "sys/devices/system/cpu"
    online = word(cpus / "online")
    return CpuFacts(
        model=model,
        flags=flags or frozenset(),
        online=len(parse_cpu_list(online)) if online else 1,
        smt=word(cpus / "smt/control"),
        governors=frozenset(word(path) for path in cpus.glob("cpu[0-9]*/cpufreq/scaling_governor")) - {""},
    )


def read_kvm(root: Path, device: PathFacts) -> KvmFacts:
    nested = [word(path) for path in sorted((root / "sys/module").glob("kvm_*/parameters/nested"))]
    return KvmFacts(
        device=device,
        answers=device.kind == "device" and _kvm_answers(root / "dev/kvm"),
        nested=any(value in ("1", "Y") for value in nested) if nested else None,
    )


def _kvm_answers(device: Path) -> bool:
    try:
        with device.open("rb", buffering=0) as kvm:
            return fcntl.ioctl(kvm, _KVM_GET_API_VERSION) == _KVM_API
    except OSError:
        return False


def count_iommu_groups(root: Path) -> int:
    return sum(1 for _ in (root / "sys/kernel/iommu_groups").glob("*"))


def read_cgroups(root: Path) -> CgroupFacts:
    """From this process's mounts (proc(5)): where each hierarchy is, and which controllers it has."""
    unified, v1 = None, set[str]()
    for line in word(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.partition(" ")
        if kind == "cgroup2" and unified is None:
            unified = root / before.split()[4].lstrip("/")
        elif kind == "cgroup":
            v1 |= _V1_CONTROLLERS & set(options.rpartition(" ")[2].split(","))
    if unified is not None and not v1:
        return CgroupFacts("v2", frozenset(word(unified / "cgroup.controllers").split()))
    if v1:
        return CgroupFacts("hybrid" if unified is not None else "v1", frozenset(v1))
    return CgroupFacts()


def read_clock() -> ClockFacts:
    try:
        clock = read_kernel_clock()
    except OSError as error:
        return ClockFacts(problem=error.strerror or str(error))
    return ClockFacts(clock.synchronised, clock.worst_error_s)


def read_huge_pages(root: Path) -> Iterator[HugePageFacts]:
    for sizes in sorted((root / "sys/devices/system/node").glob("node[0-9]*/hugepages/hugepages-*kB")):
        cell = int(sizes.parent.parent.name.removeprefix("node"))
        size_kib = int(sizes.name.removeprefix("hugepages-").removesuffix("kB"))
        total, free = (word(sizes / name) for name in ("nr_hugepages", "free_hugepages"))
        yield HugePageFacts(cell, size_kib, int(total or 0), int(free or 0))


def read_memory_mib(root: Path) -> int:
    found = re.search(r"^MemTotal:\s+(\d+) kB", word(root / "proc/meminfo"), re.MULTILINE)
    return int(found[1]) // 1024 if found else 0


def read_locked_memory_limit_mib(root: Path) -> int | None:
    """The hard limit of libvirtd (or of its QEMU daemon), else of this process; None is unlimited."""
    found = (path.parent for path in (root / "proc").glob("[0-9]*/comm") if word(path) in ("libvirtd", "virtqemud"))
    process = next(found, root / "proc" / "self")
    limits = re.search(r"^Max locked memory\s+\S+\s+(\S+)", word(process / "limits"), re.MULTILINE)
    return None if limits is None or limits[1] == "unlimited" else int(limits[1]) // 1024**2


def read_port_holders(root: Path, ports: tuple[int, ...]) -> dict[int, str]:
    """Which program listens on these TCP ports: its name, or "somebody" if it can't be found."""
    inodes: dict[str, int] = {}
    for table in ("tcp", "tcp6"):
        for line in word(root / "proc/net" / table).splitlines()[1:]:
            columns = line.split()
            port = int(columns[1].rpartition(":")[2], 16)
            if columns[3] == "0A" and port in ports:
                inodes[columns[9]] = port
    holders = dict.fromkeys(inodes.values(), "somebody")
    if inodes:
        holders.update((inodes[inode], name) for inode, name in _socket_holders(root) if inode in inodes)
    return holders


def _socket_holders(root: Path) -> Iterator[tuple[str, str]]:
    for process in (root / "proc").glob("[0-9]*"):
        try:
            targets = [os.readlink(link) for link in (process / "fd").iterdir()]  # noqa: PTH115 - no path at all
        except OSError:
            continue
        words = (process / "cmdline").read_text(errors="replace").split("\0") if targets else [""]
        # An interpreted program is named by its script.
        ours = next((Path(text).name for text in words if "ppec" in text), "")
        for target in targets:
            if target.startswith("socket:["):
                yield target[8:-1], ours or word(process / "comm")
