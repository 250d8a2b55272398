# SPDX-License-Identifier: Apache-2.0
"""The storage pools of the settings: there, safe, mounted, and each counted once. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ppec_agentd.doctor.findings import Finding, Level
from ppec_agentd.doctor.snapshot import HostFactsSnapshot, PathFacts
from ppec_agentd.settings import PoolSettings

_WRITABLE_BY_OTHERS = 0o022


def pools(host: HostFactsSnapshot) -> Iterator[Finding]:
    for name, pool in host.settings.storage.pools.items():
        subject, facts = f"storage pool {name}, {pool.path}", host.paths[pool.path]
        faults = list(_faults(host, name, pool, facts))
        yield from (Finding("pools", level, subject, *words) for level, *words in faults)
        if not faults:
            yield Finding("pools", Level.OK, subject, "there, and nobody else's")


def _faults(
    host: HostFactsSnapshot, name: str, pool: PoolSettings, facts: PathFacts
) -> Iterator[tuple[Level, str, str, str]]:
    if facts.kind == "missing":
        yield Level.ERROR, "not there", "a folder", f"Mount it, or make it: install -d -m 0711 {pool.path}"
        return
    if facts.kind != "folder":
        yield Level.ERROR, "is no folder", "a folder", "Move what is there away."
        return
    if pool.mounted and facts.device == host.paths[pool.path / ".."].device:
        advice = f"mount {pool.path}, and have it mounted at boot; or take mounted off the pool"
        yield Level.ERROR, "no file system is mounted there", "one of its own", advice
    if facts.uid != 0 or facts.mode & _WRITABLE_BY_OTHERS:
        found = f"mode {facts.mode:04o}, owner {facts.uid}:{facts.gid}: others than root can replace disks"
        advice = f"chown root:root {pool.path} && chmod 0711 {pool.path}"
        yield Level.ERROR, found, "root's, and writable by root alone", advice
    others = _others(host, name)
    for other, (path, _) in others.items():
        if (facts.device, facts.inode) == (host.paths[path].device, host.paths[path].inode):
            yield Level.ERROR, f"the same folder as that of {other}", "a folder of its own", "Give it another path."
            return
    for other, (path, sized) in others.items():
        if facts.device == _device(host, path) and not (sized and pool.disk_mib is not None):
            found = f"on the file system of {other}: what is free there is counted twice"
            advice = "Set disk_mib of both, or give the pool a file system of its own."
            yield Level.WARNING, found, "each with a size of its own", advice
            return


def _others(host: HostFactsSnapshot, name: str) -> dict[str, tuple[Path, bool]]:
    """Where else disks are, and whether how much of it is set."""
    storage = host.settings.storage
    pools = {f"pool {n}": (p.path, p.disk_mib is not None) for n, p in storage.pools.items() if n != name}
    return {"the VMs' own place": (storage.vms, storage.disk_mib is not None), **pools}


def _device(host: HostFactsSnapshot, path: Path) -> int:
    """Of the file system that it is on, or will be on once it is made."""
    return next(host.paths[step].device for step in (path, *path.parents) if host.paths[step].kind != "missing")
