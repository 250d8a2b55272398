# SPDX-License-Identifier: Apache-2.0
"""Images that no VM here needs any more leave the cache. `evictable` and `names_in` decide, `ImageEviction` does it.

An image is in use when its sha256 stands in the metadata or a disk path of any domain, or in the backing file's name of
any disk: of those in the VMs' folders, whether a domain goes with them or not, and of the domains' disks elsewhere.
An image in use is stamped as used at every look, so that its time begins when the last VM is gone.

What a guest writes as it likes is never opened, for it may look like a disk that is built on anything: its console's
log, and what QEMU opens as raw. A raw disk is built on nothing, whatever it holds; its path alone counts.

A create that has its image and not yet its disk is in no such place. `ImageCache.held` covers it, and
`ImageCache.evict` takes nothing that is held, under way, or was in use at any moment since the look began.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import structlog

from ppec_agentd.disks import DISK_SUFFIX, VmFolder
from ppec_agentd.hypervisor import DiskFormat, Domain, Hypervisor
from ppec_agentd.image_files import KeptImage
from ppec_agentd.image_format import backing_file_name
from ppec_agentd.images import ImageCache
from ppec_contract.errors import PpecError

log = structlog.get_logger(__name__)
LONGEST_INTERVAL_S = 3600.0
# Of a disk in another format; the description that stands for a disk on a fake host is far shorter, too.
_HEAD_BYTES = 65536
_RAW: DiskFormat = "raw"
_SHA256 = re.compile(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")


def evictable(kept: Iterable[KeptImage], in_use: frozenset[str], now_s: float, keep_s: float) -> list[KeptImage]:
    """Those that nobody uses, nor used for `keep_s`. A last use in the future is a recent one: the clock was set."""
    return [image for image in kept if image.sha256 not in in_use and now_s - image.last_used_s > keep_s]


def names_in(text: str) -> frozenset[str]:
    """Every sha256 in a path or a disk's backing file name, however that is written (`json:`, `file:`, relative)."""
    return frozenset(_SHA256.findall(text))


class ImageEviction:
    """One look at most every `LONGEST_INTERVAL_S`, and no fewer than one per `keep_s`."""

    def __init__(self, images: ImageCache, hypervisor: Hypervisor, vms_dir: Path, keep_s: float) -> None:
        self._images = images
        self._hypervisor = hypervisor
        self._vms_dir = vms_dir
        self._keep_s = keep_s
        self._due_s = 0.0

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
            in_use = await asyncio.to_thread(images_in_use, domains, self._vms_dir)
            kept = await asyncio.to_thread(self._images.kept)
            await asyncio.to_thread(self._images.mark_used, [image for image in kept if image.sha256 in in_use])
        except OSError as error:
            # A disk that can't be read may be built on any of them.
            log.warning("images_not_evicted", why=str(error))
            return ()
        gone = []
        for image in evictable(kept, in_use, time.time(), self._keep_s):
            try:
                if await self._images.evict(image, began):
                    gone.append(image.sha256)
            except PpecError as error:
                log.warning("image_not_evicted", sha256=image.sha256, why=error.message)
        return tuple(gone)


def images_in_use(domains: Iterable[Domain], vms_dir: Path) -> frozenset[str]:
    """Raises OSError for a disk that can't be read or understood, unless it is gone."""
    found: set[str] = set()
    for domain in domains:
        if domain.metadata is not None:
            found.add(domain.metadata.image_sha256)
        folder = VmFolder(vms_dir, domain.vm_id)
        for disk in domain.disks:
            found |= names_in(disk.path)
            path = Path(disk.path)
            if disk.format != _RAW and path not in (folder.seed, folder.console_log):
                found |= _names_of_disk(path)
    for path in _disks_in(vms_dir):
        found |= _names_of_disk(path)
    return frozenset(found)


def _disks_in(vms_dir: Path) -> Iterator[Path]:
    """What is named like a root disk in the VMs' folders; a folder may go at any moment."""
    for folder in _entries(vms_dir):
        if folder.is_dir():
            yield from (path for path in _entries(folder) if path.suffix == DISK_SUFFIX)


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def _names_of_disk(path: Path) -> frozenset[str]:
    """The images that a disk's header names. What is no file (a device, say), or is gone, names none."""
    try:
        if not path.is_file():
            return frozenset()
        with path.open("rb") as file:
            name = backing_file_name(file)
            if name is None:
                # Where another format has the name matters not: any name in there counts.
                file.seek(0)
                name = file.read(_HEAD_BYTES)
    except FileNotFoundError:
        return frozenset()
    return names_in(name.decode("latin-1"))
