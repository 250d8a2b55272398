# SPDX-License-Identifier: Apache-2.0
"""What a running VM's QEMU process really is on its host: read from the host's kernel, not from whom it was asked of.

The reading is one Python program that runs on the host and prints raw files; all understanding is here and pure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

# Prints {"pid", "stat", "files", "maps", "threads": [[comm, status], ...]} of the domain named by argument 1.
READER = """
import json, os, pathlib, sys
pid = pathlib.Path("/run/libvirt/qemu", sys.argv[1] + ".pid").read_text().strip()
proc = pathlib.Path("/proc", pid)
tasks = [[(task / name).read_text() for name in ("comm", "status")] for task in (proc / "task").iterdir()]
files = [os.readlink(path) for path in (proc / "fd").iterdir() if path.is_symlink()]
print(json.dumps({"pid": int(pid), "stat": (proc / "stat").read_text(), "files": files,
                  "maps": (proc / "numa_maps").read_text(), "threads": tasks}))
"""
_VCPU = re.compile(r"^CPU (\d+)/(KVM|TCG)$")


@dataclass(frozen=True)
class GuestMemory:
    """The guest's RAM: the policy of its mapping (``bind:1``), its pages' size, and KiB present by NUMA cell."""

    policy: str
    page_kib: int
    kib_by_cell: Mapping[int, int]


@dataclass(frozen=True)
class GuestProcess:
    """`started` is in clock ticks after boot: with the pid it is the process's identity.

    `allowed_cpus` are by vCPU, as the kernel's own lists (``4``, ``0-3``); `kvm` is true if KVM runs its vCPUs.
    """

    pid: int
    started: int
    kvm: bool
    allowed_cpus: Mapping[int, str]
    memory: GuestMemory

    @property
    def identity(self) -> tuple[int, int]:
        return self.pid, self.started


def read_guest_process(read: Callable[[Sequence[str]], str], domain: str) -> GuestProcess:
    """The process of the running `domain`; `read` runs a command on its host and returns what it prints."""
    return parse_guest_process(read(("python3", "-I", "-c", READER, domain)))


def parse_guest_process(printed: str) -> GuestProcess:
    """Understand what `READER` printed."""
    raw = json.loads(printed)
    vcpus = {}
    for name, status in raw["threads"]:
        if found := _VCPU.match(name.strip()):
            allowed = re.search(r"^Cpus_allowed_list:\s*(\S+)$", status, re.MULTILINE)
            vcpus[int(found[1])] = allowed[1] if allowed else ""
    return GuestProcess(
        pid=raw["pid"],
        # The second field, the name, may itself hold spaces and parentheses.
        started=int(raw["stat"].rpartition(")")[2].split()[19]),
        kvm="/dev/kvm" in raw["files"] and any("kvm-vcpu" in file for file in raw["files"]),
        allowed_cpus=dict(sorted(vcpus.items())),
        memory=largest_memory(raw["maps"]),
    )


def largest_memory(numa_maps: str) -> GuestMemory:
    """The mapping of /proc/<pid>/numa_maps that holds most memory of its own: the guest's RAM."""
    found = []
    for line in numa_maps.splitlines():
        _, policy, *words = line.split()
        values = dict(word.split("=", 1) for word in words if "=" in word)
        # Programs and libraries are neither anonymous nor on huge pages.
        if "anon" not in values and "huge" not in words:
            continue
        page_kib = int(values["kernelpagesize_kB"])
        cells = {int(key[1:]): int(pages) * page_kib for key, pages in values.items() if re.fullmatch(r"N\d+", key)}
        found.append(GuestMemory(policy, page_kib, cells))
    return max(found, key=lambda memory: sum(memory.kib_by_cell.values()))
