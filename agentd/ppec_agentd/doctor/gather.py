# SPDX-License-Identifier: Apache-2.0
"""Takes the snapshot of a host: thin reads, and nothing decided. Nothing is changed on the host, either."""

from __future__ import annotations

import asyncio
import contextlib
import grp
import json
import os
import platform
import pwd
import re
import shutil
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from ppec_agentd.assembly import make_hypervisor
from ppec_agentd.doctor import gather_machine as machine
from ppec_agentd.doctor.snapshot import (
    FileSystemFacts,
    HostFactsSnapshot,
    LibvirtFacts,
    PathFacts,
    PathKind,
    SocketFacts,
    UserFacts,
)
from ppec_agentd.doctor.tls_trial import try_certificate
from ppec_agentd.local_host import ARCHITECTURES
from ppec_agentd.nvme.sysfs import read_drive
from ppec_agentd.settings import Settings
from ppec_contract.agent import INTERFACE, PROXY_PORT
from ppec_contract.errors import PpecError

# The call may be what starts libvirtd, which ends when idle and first asks QEMU what it can do: 20 s on a slow machine.
LIBVIRT_TIMEOUT_S = 60.0
SOCKET_TIMEOUT_S = 3.0
_LONGEST_ANSWER = 64 * 1024
_QEMU_USERS = ("libvirt-qemu", "qemu")


def take_snapshot(settings: Settings, root: Path = Path("/")) -> HostFactsSnapshot:
    """Below `root` the kernel's files and the settings' paths; users, programs and libvirt are always this system's."""
    storage, tls = settings.storage, settings.tls
    locks = root / storage.drives.relative_to("/")
    pools = tuple(pool.path for pool in storage.pools.values())
    # Not pools' parents by name: a pool may be a symbolic link.
    above = (pool / ".." for pool in pools)
    asked = (storage.vms, storage.images, *pools, *above, settings.socket.path.parent, tls.key_path, Path("/dev/kvm"))
    paths = {path: look(root, path) for wanted in asked for path in (wanted, *wanted.parents)}
    return HostFactsSnapshot(
        settings=settings,
        architecture=ARCHITECTURES.get(platform.machine()),
        machine=platform.machine(),
        cpu=machine.read_cpu(root),
        kvm=machine.read_kvm(root, paths[Path("/dev/kvm")]),
        iommu_groups=machine.count_iommu_groups(root),
        cgroups=machine.read_cgroups(root),
        libvirt=None if settings.hypervisor == "fake" else asyncio.run(_ask_libvirt(settings)),
        clock=machine.read_clock(),
        socket=ask_socket(root / settings.socket.path.relative_to("/")),
        certificate=try_certificate(tls, root) if settings.reports.orchestrator_url else None,
        qemu_user=read_qemu_user(root),
        programs=frozenset(name for name in ("qemu-img", "nvme") if shutil.which(name)),
        groups={entry.gr_name: entry.gr_gid for entry in grp.getgrall()},
        paths=paths,
        file_systems=tuple(_file_systems(root, (storage.state_dir, storage.images, *pools))),
        huge_pages=tuple(machine.read_huge_pages(root)),
        bridges=frozenset(path.parent.name for path in (root / "sys/class/net").glob("*/bridge")),
        nvme_drives=tuple(read_drive(address, root, locks) for address in settings.nvme.drives),
        port_holders=machine.read_port_holders(root, (PROXY_PORT,)),
        memory_mib=machine.read_memory_mib(root),
        locked_memory_limit_mib=machine.read_locked_memory_limit_mib(root),
    )


def look(root: Path, path: Path) -> PathFacts:
    try:
        found = (root / path.relative_to("/")).stat()
    except OSError:
        return PathFacts(path)
    mode = stat.S_IMODE(found.st_mode)
    return PathFacts(path, _kind(found.st_mode), mode, found.st_uid, found.st_gid, found.st_dev, found.st_ino)


def _kind(mode: int) -> PathKind:
    kinds: tuple[tuple[bool, PathKind], ...] = (
        (stat.S_ISDIR(mode), "folder"),
        (stat.S_ISREG(mode), "file"),
        (stat.S_ISSOCK(mode), "socket"),
        (stat.S_ISCHR(mode), "device"),
    )
    return next((kind for holds, kind in kinds if holds), "other")


def read_qemu_user(root: Path) -> UserFacts | None:
    """Whom qemu.conf names, else the distribution's own; None if there is none of them."""
    named = re.search(r'^\s*user\s*=\s*"([^"]+)"', machine.word(root / "etc/libvirt/qemu.conf"), re.MULTILINE)
    for name in (named[1].lstrip("+"),) if named else _QEMU_USERS:
        with contextlib.suppress(KeyError):
            entry = pwd.getpwuid(int(name)) if name.isdigit() else pwd.getpwnam(name)
            gids = frozenset(os.getgrouplist(entry.pw_name, entry.pw_gid))
            return UserFacts(entry.pw_name, entry.pw_uid, gids)
    return None


def _file_systems(root: Path, folders: tuple[Path, ...]) -> Iterator[FileSystemFacts]:
    """Of each folder, or of the nearest above it that is there; each file system once."""
    seen: set[int] = set()
    for folder in folders:
        below = (root / path.relative_to("/") for path in (folder, *folder.parents))
        there = next(path for path in below if path.is_dir())
        figures, device = os.statvfs(there), there.stat().st_dev
        if device not in seen:
            seen.add(device)
            yield FileSystemFacts(
                path=folder,
                size_mib=figures.f_blocks * figures.f_frsize // 1024**2,
                free_mib=figures.f_bavail * figures.f_frsize // 1024**2,
                read_only=bool(figures.f_flag & os.ST_RDONLY),
                free_inodes_percent=100 * figures.f_ffree // figures.f_files if figures.f_files else 100,
            )


def ask_socket(path: Path) -> SocketFacts:
    """Who answers there, asked as any client would ask."""
    if not path.exists():
        return SocketFacts("free")
    if not path.is_socket():
        return SocketFacts("no-socket")
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(SOCKET_TIMEOUT_S)
        try:
            peer.connect(str(path))
        except ConnectionRefusedError:
            return SocketFacts("stale")
        except OSError:
            return SocketFacts("stranger")
        try:
            peer.sendall(json.dumps({"method": f"{INTERFACE}.GetVersion"}).encode() + b"\0")
            answer = json.loads(_first_frame(peer))
            said = answer["parameters"]
            return SocketFacts("agent", f"version {said['agent_version']} of host {said['host']}")
        except (OSError, ValueError, LookupError, TypeError):
            return SocketFacts("stranger")


def _first_frame(peer: socket.socket) -> bytes:
    received = b""
    while b"\0" not in received and len(received) < _LONGEST_ANSWER:
        part = peer.recv(4096)
        if not part:
            break
        received += part
    return received.partition(b"\0")[0]


async def _ask_libvirt(settings: Settings) -> LibvirtFacts:
    uri = settings.libvirt.uri
    try:
        hypervisor = make_hypervisor(settings)
    except ImportError as error:
        return LibvirtFacts(uri, problem=f"no Python module for it: {error}")
    try:
        async with asyncio.timeout(LIBVIRT_TIMEOUT_S):
            await hypervisor.open()
            facts = await hypervisor.facts()
    except TimeoutError:
        return LibvirtFacts(uri, problem=f"no answer within {LIBVIRT_TIMEOUT_S:g} s")
    except PpecError as error:
        reason = error.details.get("reason")
        return LibvirtFacts(uri, problem=f"{error.message}: {reason}" if reason else error.message)
    finally:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SOCKET_TIMEOUT_S):
                await hypervisor.close()
    return LibvirtFacts(uri, libvirt_version=facts.libvirt_version, qemu_version=facts.qemu_version)
