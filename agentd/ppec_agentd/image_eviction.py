# SPDX-License-Identifier: Apache-2.0
"""Images that no VM here needs any more leave the cache. `evictable` decides, `ImageEviction` does it.

An image is in use when its sha256 stands in the metadata of any domain, or anywhere in the backing chain of any disk
(`image_chains`): of those in the VMs' folders, storage pools' among them, whether a domain goes with them or not, and
of the domains' disks elsewhere. If a chain can't be followed to its end, or a pool can't be seen, all images stay. An
image in use is stamped as used at every look, so that its time begins when the last VM is gone.

What a guest writes as it likes is never opened, for it may look like a disk that is built on anything: its console's
log, and what QEMU opens as raw.

A create that has its image and not yet its disk is in no such place. `ImageCache.held` covers it, and
`ImageCache.evict` takes nothing that is held, under way, or was in use at any moment since the look began. What all
that has missed, `image_guard` sees: nothing is removed that a process has open.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import structlog

from ppec_agentd.disks import DISK_SUFFIX
from ppec_agentd.hypervisor import Domain, Hypervisor, ObservedDisk
from ppec_agentd.image_chains import Chains, names_in, read_disk
from ppec_agentd.image_files import KeptImage
from ppec_agentd.images import ImageCache
from ppec_agentd.places import Places, Pool, vm_names
from ppec_contract.errors import PpecError

log = structlog.get_logger(__name__)
LONGEST_INTERVAL_S = 3600.0
# More of them say nothing new.
_REASONS_LOGGED = 10


def evictable(kept: Iterable[KeptImage], in_use: frozenset[str], now_s: float, keep_s: float) -> list[KeptImage]:
    """Those that nobody uses, nor used for `keep_s`. A last use in the future is a recent one: the clock was set."""
    return [image for image in kept if image.sha256 not in in_use and now_s - image.last_used_s > keep_s]


class ImageEviction:
    """One look at most every `LONGEST_INTERVAL_S`, and no fewer than one per `keep_s`."""

    def __init__(self, images: ImageCache, hypervisor: Hypervisor, places: Places, keep_s: float) -> None:
        self._images = images
        self._hypervisor = hypervisor
        self._places = places
        self._keep_s = keep_s
        self._due_s = 0.0
        self._untold: frozenset[str] = frozenset()

    async def once_due(self) -> None:
        """Does nothing until the next look is due. Raises `hypervisor.unavailable`; it is due still then."""
        if time.monotonic() >= self._due_s:
            await self.once()
            self._due_s = time.monotonic() + min(self._keep_s, LONGEST_INTERVAL_S)

    async def once(self) -> tuple[str, ...]:
        """Evicts what can go; the sha256 of each. Raises `hypervisor.unavailable`, and evicts nothing then."""
        began = self._images.uses()
        domains = await self._hypervisor.domains()
        try:
            chains = await asyncio.to_thread(chains_of, domains, self._places)
            kept = await asyncio.to_thread(self._images.kept)
            named = [image for image in kept if image.sha256 in chains.named]
            await asyncio.to_thread(self._images.mark_used, named)
        except OSError as error:
            self._say({str(error)})
            return ()
        self._say(chains.untold)
        if chains.untold:
            # Such a disk may be built on any of them.
            return ()
        gone = []
        for image in evictable(kept, frozenset(chains.named), time.time(), self._keep_s):
            try:
                if await self._images.evict(image, began):
                    gone.append(image.sha256)
            except PpecError as error:
                log.warning("image_not_evicted", sha256=image.sha256, why=error.message)
        return tuple(gone)

    def _say(self, untold: set[str]) -> None:
        """Once for the same reasons: a look an hour would say them for as long as the disk is there."""
        if untold and untold != self._untold:
            log.warning("images_not_evicted", why=sorted(untold)[:_REASONS_LOGGED], reasons=len(untold))
        self._untold = frozenset(untold)


def chains_of(domains: Iterable[Domain], places: Places) -> Chains:
    """What all disks are built on. Raises OSError if the VMs' folders can't be listed."""
    chains = Chains(read_disk)
    for domain in domains:
        if domain.metadata is not None:
            chains.named.add(domain.metadata.image_sha256)
        folders = places.folders_of(domain.vm_id)
        known = {path for folder in folders for path in (folder.root_disk, folder.seed, folder.console_log)}
        for disk in domain.disks:
            if Path(disk.path) in known:
                # The first is read below, the others never.
                chains.named |= names_in(disk.path)
            else:
                chains.follow(disk)
    _follow_disks(chains, _entries(places.own))
    for pool in places.pools.values():
        problem = _follow_pool(chains, pool)
        if problem:
            chains.untold.add(f"the disks of pool {pool.name} can't be seen: {problem}")
    return chains


def _follow_pool(chains: Chains, pool: Pool) -> str:
    """Why not all of its disks were seen; empty if they were."""
    try:
        _follow_disks(chains, (pool.path / name for name in vm_names(pool.path)))
    except OSError as error:
        return str(error)
    # Asked last: one whose file system goes meanwhile must not look empty.
    return pool.problem()


def _follow_disks(chains: Chains, folders: Iterable[Path]) -> None:
    for path in _disks_in(folders):
        # As QEMU opens it. The VM may be deleted at this moment.
        chains.follow(ObservedDisk(str(path), "qcow2"), may_be_gone=True)


def _disks_in(folders: Iterable[Path]) -> Iterator[Path]:
    """What is named like a root disk in VMs' folders; a folder may go at any moment."""
    for folder in folders:
        if folder.is_dir():
            yield from (path for path in _entries(folder) if path.suffix == DISK_SUFFIX)


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []
