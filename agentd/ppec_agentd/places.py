# SPDX-License-Identifier: Apache-2.0
"""Where VMs' files lie on this host: each VM has a folder in the own place and, if its disk is in a storage pool, one
there.

The own place is the agent's alone. A pool may hold what is not: there only what is named like a VM counts.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import structlog

from ppec_agentd.disks import VmFolder
from ppec_contract.errors import PpecError

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Pool:
    """A folder for VMs' disks. With `mounted` it counts only while a file system is mounted there: without one, disks
    would land on the file system below, unseen once it is mounted again."""

    name: str
    path: Path
    mounted: bool = False

    def problem(self) -> str:
        """Why it can't be used now; empty if it can. Blocking."""
        try:
            # Not its parent by name: the path may be a symbolic link.
            found, above = self.path.stat(), (self.path / "..").stat()
        except OSError as error:
            return f"{self.path}: {error.strerror or error}"
        if not stat.S_ISDIR(found.st_mode):
            return f"{self.path} is no folder"
        if self.mounted and found.st_dev == above.st_dev:
            return f"no file system is mounted at {self.path}"
        return ""


@dataclass(frozen=True, slots=True)
class Places:
    """`own` is where the host keeps VMs by itself; `pools` are by their names."""

    own: Path
    pools: Mapping[str, Pool] = field(default_factory=dict)

    @property
    def folders(self) -> tuple[Path, ...]:
        """Those that have folders of VMs, the own place first."""
        return (self.own, *(pool.path for pool in self.pools.values()))

    def folder(self, vm_id: UUID) -> VmFolder:
        """What of a VM is not its disk; the disk, too, of one that is in no pool."""
        return VmFolder(self.own, vm_id)

    def disk_folder(self, vm_id: UUID, pool: str) -> VmFolder | None:
        """Where its disk is; None if this host has no such pool."""
        if not pool:
            return self.folder(vm_id)
        found = self.pools.get(pool)
        return None if found is None else VmFolder(found.path, vm_id)

    def folders_of(self, vm_id: UUID) -> tuple[VmFolder, ...]:
        """All that a VM may have, the own place's first: once its domain is gone, nothing says which pool it was in."""
        return tuple(VmFolder(place, vm_id) for place in self.folders)

    def hold(self, vm_id: UUID) -> bool:
        """Whether anything of the VM is there. Blocking."""
        return any(os.path.lexists(folder.path) for folder in self.folders_of(vm_id))

    def remove(self, vm_id: UUID) -> bool:
        """Removes all of a VM; False if nothing was there, or nothing could be removed. Blocking.

        A pool that fails keeps its part, which is said, and the next recovery tries again: no VM waits for a broken
        drive. Raises what removing from the own place does.
        """
        removed = [_remove_from(pool, vm_id) for pool in self.pools.values()]
        return any([*removed, self.folder(vm_id).remove()])

    def names(self) -> dict[Path, tuple[str, ...]]:
        """What lies in each place, by name; of a place that can't be listed nothing. Blocking."""
        names: dict[Path, tuple[str, ...]] = {}
        for place in self.folders:
            with contextlib.suppress(OSError):
                names[place] = vm_names(place, alone=place == self.own)
        return names


def _remove_from(pool: Pool, vm_id: UUID) -> bool:
    try:
        return VmFolder(pool.path, vm_id).remove()
    except PpecError as error:
        log.warning("disk_left_in_pool", vm_id=str(vm_id), pool=pool.name, why=error.message)
        return False


def vm_names(place: Path, *, alone: bool = False) -> tuple[str, ...]:
    """What is named like a VM there, or all if the place is for them `alone`, in order. Raises OSError."""
    names = sorted(path.name for path in place.iterdir())
    return tuple(name for name in names if alone or vm_id_of(name) is not None)


def vm_id_of(name: str) -> UUID | None:
    """The VM whose folder has this name. None for any other name, also for an id written in another way."""
    try:
        vm_id = UUID(name)
    except ValueError:
        return None
    return vm_id if str(vm_id) == name else None
