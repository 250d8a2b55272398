# SPDX-License-Identifier: Apache-2.0
"""A host as the doctor sees it: plain values, which tests make up and `gather.py` reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ppec_agentd.nvme.drive import NvmeDrive
from ppec_agentd.settings import Settings
from ppec_contract.host import Architecture

PathKind = Literal["missing", "folder", "file", "socket", "device", "other"]


@dataclass(frozen=True, slots=True)
class PathFacts:
    """A path as stat(2) shows it. `mode` holds the permission bits alone; `device` and `inode` tell one file, or file
    system, from another."""

    path: Path
    kind: PathKind = "missing"
    mode: int = 0
    uid: int = 0
    gid: int = 0
    device: int = 0
    inode: int = 0


@dataclass(frozen=True, slots=True)
class UserFacts:
    """A user of the system, with all the groups it is in."""

    name: str
    uid: int
    gids: frozenset[int]


@dataclass(frozen=True, slots=True)
class CpuFacts:
    """`flags` are those that all CPUs show (x86). `smt` is the kernel's word for its state, empty if it says none."""

    model: str = ""
    flags: frozenset[str] = frozenset()
    online: int = 1
    smt: str = ""
    governors: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class KvmFacts:
    """`answers` whether the device speaks KVM's interface; `nested` None where the module doesn't say."""

    device: PathFacts
    answers: bool = False
    nested: bool | None = None


@dataclass(frozen=True, slots=True)
class CgroupFacts:
    """`layout` is v2, v1, hybrid (v1 beside a v2 tree without controllers) or none; `controllers` are those usable."""

    layout: Literal["v2", "v1", "hybrid", "none"] = "none"
    controllers: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class LibvirtFacts:
    """What libvirt answered; `problem` says in its words why it did not. Versions are empty then."""

    uri: str
    problem: str = ""
    libvirt_version: str = ""
    qemu_version: str = ""


@dataclass(frozen=True, slots=True)
class ClockFacts:
    """The kernel's clock. `problem` says why it could not be asked; `worst_error_s` is its own estimate."""

    synchronised: bool = False
    worst_error_s: float = 0.0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class FileSystemFacts:
    """The file system that holds `path`; `free_inodes_percent` is 100 where inodes are made as needed."""

    path: Path
    size_mib: int
    free_mib: int
    read_only: bool = False
    free_inodes_percent: int = 100


@dataclass(frozen=True, slots=True)
class HugePageFacts:
    """One NUMA cell's huge pages of one size."""

    cell: int
    size_kib: int
    total: int
    free: int


@dataclass(frozen=True, slots=True)
class CertificateFacts:
    """The host's certificate, tried as a TLS peer tries it. `problem` is why it is no good; empty if it is."""

    problem: str = ""
    identities: tuple[str, ...] = ()
    days_left: float = 0.0


@dataclass(frozen=True, slots=True)
class SocketFacts:
    """What is at the agent's socket path: nobody, a socket nobody serves, an agent, another program, or no socket."""

    holder: Literal["free", "stale", "agent", "stranger", "no-socket"] = "free"
    said: str = ""


@dataclass(frozen=True, slots=True)
class HostFactsSnapshot:
    """One look at a host. `paths` has every path that checks ask about, and all folders above it.

    `port_holders` maps a listened TCP port to the program that holds it; `groups` are the system's groups by name.
    `locked_memory_limit_mib` is libvirtd's, or this process's if libvirtd was not found; None is unlimited.
    """

    settings: Settings
    architecture: Architecture | None
    machine: str
    cpu: CpuFacts
    kvm: KvmFacts
    iommu_groups: int
    cgroups: CgroupFacts
    libvirt: LibvirtFacts | None
    clock: ClockFacts
    socket: SocketFacts
    certificate: CertificateFacts | None
    qemu_user: UserFacts | None
    programs: frozenset[str] = frozenset()
    groups: dict[str, int] = field(default_factory=dict)
    paths: dict[Path, PathFacts] = field(default_factory=dict)
    file_systems: tuple[FileSystemFacts, ...] = ()
    huge_pages: tuple[HugePageFacts, ...] = ()
    bridges: frozenset[str] = frozenset()
    nvme_drives: tuple[NvmeDrive, ...] = ()
    port_holders: dict[int, str] = field(default_factory=dict)
    memory_mib: int = 0
    locked_memory_limit_mib: int | None = None
