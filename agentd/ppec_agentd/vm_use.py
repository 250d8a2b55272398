# SPDX-License-Identifier: Apache-2.0
"""What each VM uses now: from its QEMU process and from its folders.

libvirt is not asked: its statistics queue behind whatever else it does, and the kernel knows the same.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from uuid import UUID

from ppec_agentd.places import vm_id_of
from ppec_contract.host import VmUse

_MIB = 1024 * 1024
_HELD = re.compile(r"^(?:VmRSS|HugetlbPages):\s+(\d+) kB", re.MULTILINE)


def read_vm_use(places: Iterable[Path], root: Path = Path("/")) -> tuple[VmUse, ...]:
    """Of every VM that runs or has a folder in any of the places, ordered by id. Blocking."""
    processes = dict(_processes(root))
    folders = Counter[UUID]()
    for place in places:
        folders.update(dict(_blocks(place)))
    return tuple(
        VmUse(
            vm_id=vm_id,
            cpu_time_ms=processes.get(vm_id, (0, 0))[0],
            memory_mib=processes.get(vm_id, (0, 0))[1],
            disk_mib=folders[vm_id] * 512 // _MIB,
        )
        for vm_id in sorted(processes.keys() | folders.keys())
    )


def _processes(root: Path) -> Iterator[tuple[UUID, tuple[int, int]]]:
    """Each QEMU's CPU time in milliseconds and memory in MiB (proc(5)), by the uuid on its command line. Huge pages
    are no part of what the kernel calls resident, and are counted beside it."""
    tick_ms = 1000 / os.sysconf("SC_CLK_TCK")
    for process in (root / "proc").glob("[0-9]*"):
        try:
            # The name is in parentheses and may hold anything but is cut to 15 bytes: "qemu-system-x86".
            name, _, rest = (process / "stat").read_text(errors="replace").rpartition(")")
            if "(qemu" not in name:
                continue
            words = (process / "cmdline").read_bytes().split(b"\0")
            vm_id = UUID(words[words.index(b"-uuid") + 1].decode())
            fields = rest.split()
            cpu_ms = (int(fields[11]) + int(fields[12])) * tick_ms
            status = (process / "status").read_text(errors="replace")
            held_kib = sum(map(int, _HELD.findall(status)))
        except (OSError, ValueError, IndexError):
            # It ended meanwhile, or is a QEMU that libvirt didn't start.
            continue
        yield vm_id, (round(cpu_ms), held_kib // 1024)


def _blocks(place: Path) -> Iterator[tuple[UUID, int]]:
    """What each VM's files take up on the disk, in blocks of 512 bytes."""
    try:
        entries = list(os.scandir(place))
    except OSError:
        return
    for entry in entries:
        try:
            if (vm_id := vm_id_of(entry.name)) is not None:
                yield vm_id, sum(file.stat(follow_symlinks=False).st_blocks for file in os.scandir(entry))
        except OSError:
            continue
