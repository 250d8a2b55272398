# SPDX-License-Identifier: Apache-2.0
"""The image cache: each image once, under its sha256, checked before anything is built on it.

An image is fetched aside, hashed while it streams, looked into (`image_format`), fsynced and renamed into place with a
*stamp*: the size, time and inode it had when its hash was right. A later use compares the stamp; a file that no longer
fits it is hashed again, and fetched again if it is wrong. The path stays the same then, so disks built on it heal.

A fetch survives its source being away for a while (`image_source`): it is tried again, from the first byte.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import structlog

from ppec_agentd.files import os_errors, sync_directory
from ppec_agentd.image_files import KeptImage, kept_images, mark_used, remove_image, sha256_of, stamp, stamped
from ppec_agentd.image_format import virtual_size_bytes
from ppec_agentd.image_source import SourceAwayError, image_chunks, unfetched
from ppec_agentd.settings import TlsSettings
from ppec_contract.errors import PpecError
from ppec_contract.vm import ImageSource

log = structlog.get_logger(__name__)
CONCURRENT_FETCHES = 4
CONCURRENT_LOOKS = 2


@dataclass(frozen=True, slots=True)
class CachedImage:
    """A checked image file; `virtual_size_bytes` is the disk the guest would see."""

    path: Path
    format: str
    virtual_size_bytes: int


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """`timeout_s`: one fetch, all its tries and pauses. `away_s`: no further try so long after the first that failed.

    Pauses double from the first to the longest; each is shortened at random by up to a half, lest all hosts of a fleet
    come back in the same moment.
    """

    timeout_s: float = 1800.0
    away_s: float = 120.0
    first_pause_s: float = 0.25
    longest_pause_s: float = 5.0


class ImageCache:
    """`ensure` fetches at most once per image at a time, however many VMs wait for it."""

    def __init__(self, directory: Path, tls: TlsSettings, limits: FetchLimits) -> None:
        self._directory = directory
        self._tls = tls
        self._limits = limits
        self._flights: dict[str, asyncio.Task[CachedImage]] = {}
        self._evictions: dict[str, asyncio.Task[bool]] = {}
        self._holds: Counter[str] = Counter()
        # How often each was asked for, held or let go of.
        self._uses: Counter[str] = Counter()
        # Threads of its own: downloads that crawl must not hold up the journal's. A fetch keeps its thread while it
        # waits for a source that is away: the others that would need it come from the same orchestrator and could but
        # wait with it. Images that are here already need no source, so they are looked at on threads of their own.
        self._fetches = ThreadPoolExecutor(CONCURRENT_FETCHES, thread_name_prefix="image")
        self._looks = ThreadPoolExecutor(CONCURRENT_LOOKS, thread_name_prefix="image-look")
        self._closing = threading.Event()

    @property
    def directory(self) -> Path:
        return self._directory

    def close(self) -> None:
        """Fetches under way end at their next chunk, those that wait for their next try at once."""
        self._closing.set()
        for threads in (self._fetches, self._looks):
            threads.shutdown(wait=False, cancel_futures=True)

    async def ensure(self, image: ImageSource) -> CachedImage:
        """The cached image, fetched if need be.

        Raises `image.fetch_failed`, `image.checksum_mismatch`, `image.invalid`, `disk.full`.
        """
        self._uses[image.sha256] += 1
        while (eviction := self._evictions.get(image.sha256)) is not None:
            await asyncio.wait([eviction])
        flight = self._flights.get(image.sha256)
        if flight is None:
            flight = asyncio.create_task(self._ensure(image), name=f"image {image.name}")
            self._flights[image.sha256] = flight
            flight.add_done_callback(lambda _: self._flights.pop(image.sha256, None))
        # Shielded: one VM that gives up must not take the image from the others.
        return await asyncio.shield(flight)

    # --- eviction: `image_eviction` decides -------------------------------------------------------------------------

    @contextlib.contextmanager
    def held(self, sha256: str) -> Iterator[None]:
        """The image is not evicted meanwhile: for who builds on it, from `ensure` until the disk shows what it uses."""
        self._holds[sha256] += 1
        self._uses[sha256] += 1
        try:
            yield
        finally:
            self._holds[sha256] -= 1
            self._uses[sha256] += 1

    def uses(self) -> Mapping[str, int]:
        """How often each image was used, to be compared: see `evict`."""
        return self._uses.copy()

    def kept(self) -> list[KeptImage]:
        """Every image's file here. Blocking."""
        return kept_images(self._directory)

    def mark_used(self, images: Iterable[KeptImage]) -> None:
        """Their last use is now. Blocking."""
        for image in images:
            mark_used(image.path)

    async def evict(self, image: KeptImage, uses_before: Mapping[str, int]) -> bool:
        """Removes the image, unless it is held, under way, was used since `uses_before` was asked for, or is open.

        `uses_before` must be from before the disks were looked at: whoever used the image since may have made one that
        the look missed. Who wants the image while it goes waits and fetches it anew. Raises `internal.error`.
        """
        sha256 = image.sha256
        busy = self._holds[sha256] or sha256 in self._flights or sha256 in self._evictions
        if busy or self._uses[sha256] != uses_before.get(sha256, 0):
            return False
        # Nothing awaited since: from here on `ensure` sees the eviction.
        eviction = asyncio.create_task(asyncio.to_thread(remove_image, image), name=f"evict {sha256}")
        self._evictions[sha256] = eviction
        eviction.add_done_callback(lambda _: self._evictions.pop(sha256, None))
        if not await asyncio.shield(eviction):
            # No disk here names it, and somebody has it open: its time begins anew.
            log.warning("image_not_evicted", sha256=sha256, why="a process has it open")
            await asyncio.to_thread(mark_used, image.path)
            return False
        log.info("image_evicted", sha256=sha256, size_bytes=image.size_bytes, last_used_s=round(image.last_used_s))
        return True

    # --- one image --------------------------------------------------------------------------------------------------

    async def _ensure(self, image: ImageSource) -> CachedImage:
        loop = asyncio.get_running_loop()
        cached = await loop.run_in_executor(self._looks, self._look, image)
        if cached is not None:
            return cached
        return await loop.run_in_executor(self._fetches, self._fetched, image)

    def _look(self, image: ImageSource) -> CachedImage | None:
        path = self._path_of(image)
        with self._kept(image):
            self._directory.mkdir(parents=True, exist_ok=True)
            # Whatever the umask: QEMU's user passes through to the images, and lists nothing.
            self._directory.chmod(0o711)
            return self._cached(path, image) if self._is_good(path, image) else None

    def _fetched(self, image: ImageSource) -> CachedImage:
        path = self._path_of(image)
        with self._kept(image):
            self._fetch(path, image)
            return self._cached(path, image)

    def _path_of(self, image: ImageSource) -> Path:
        return self._directory / f"{image.sha256}.{image.format}"

    def _kept(self, image: ImageSource) -> contextlib.AbstractContextManager[None]:
        return os_errors(f"image {image.name} can't be kept in {self._directory}", f"image {image.name}")

    def _cached(self, path: Path, image: ImageSource) -> CachedImage:
        return CachedImage(path, image.format, virtual_size_bytes(path, image.format, f"image {image.name}"))

    def _is_good(self, path: Path, image: ImageSource) -> bool:
        try:
            found = path.stat()
        except FileNotFoundError:
            return False
        if found.st_size == image.size_bytes:
            if stamped(path, found):
                return True
            if sha256_of(path) == image.sha256:
                stamp(path, found)
                return True
        log.error("image_damaged", image=image.name, path=str(path), size_bytes=found.st_size)
        return False

    def _fetch(self, path: Path, image: ImageSource) -> None:
        """Tries until it is there, or the limits are reached. Each try begins anew: the hash is of one try's bytes."""
        limits, pause_s, tries = self._limits, self._limits.first_pause_s, 1
        end_s = last_try_s = time.monotonic() + limits.timeout_s
        while True:
            try:
                self._try(path, image, end_s)
            except SourceAwayError as away:
                now_s = time.monotonic()
                if tries == 1:
                    last_try_s = min(end_s, now_s + limits.away_s)
                if now_s >= last_try_s:
                    late = f"not done in {limits.timeout_s:g} s: " if now_s >= end_s else ""
                    raise unfetched(image, f"{late}{away}; tries: {tries}") from away
                log.warning("image_source_away", image=image.name, why=str(away), tries=tries)
                # The last try is at the very end. No need for secrecy: nobody gains by foreseeing a pause.
                jittered_s = pause_s * random.uniform(0.5, 1.0)  # noqa: S311
                if self._closing.wait(min(jittered_s, last_try_s - now_s)):
                    raise unfetched(image, "the agent stops") from away
                pause_s, tries = min(pause_s * 2, limits.longest_pause_s), tries + 1
            else:
                log.info(
                    "image_cached", image=image.name, sha256=image.sha256, size_bytes=image.size_bytes, tries=tries
                )
                return

    def _try(self, path: Path, image: ImageSource, end_s: float) -> None:
        partial = path.with_name(f".{path.name}.partial")
        try:
            with partial.open("wb") as file:
                self._receive(file, image, end_s)
                file.flush()
                virtual_size_bytes(partial, image.format, f"image {image.name}")
                # QEMU runs as another user and only reads it.
                os.fchmod(file.fileno(), 0o644)
                os.fsync(file.fileno())
            partial.replace(path)
            sync_directory(path.parent)
            stamp(path, path.stat())
        finally:
            partial.unlink(missing_ok=True)

    def _receive(self, file: BinaryIO, image: ImageSource, end_s: float) -> None:
        digest, size = hashlib.sha256(), 0
        with contextlib.closing(image_chunks(image, self._tls, end_s)) as chunks:
            for chunk in chunks:
                if self._closing.is_set() or time.monotonic() > end_s:
                    late = f"not done in {self._limits.timeout_s:g} s"
                    raise unfetched(image, "the agent stops" if self._closing.is_set() else late)
                size += len(chunk)
                if size > image.size_bytes:
                    raise _mismatch(image, "bytes", f"more than {image.size_bytes}", image.size_bytes)
                digest.update(chunk)
                file.write(chunk)
        if size != image.size_bytes:
            raise _mismatch(image, "bytes", size, image.size_bytes)
        if digest.hexdigest() != image.sha256:
            raise _mismatch(image, "sha256", digest.hexdigest(), image.sha256)


def _mismatch(image: ImageSource, what: str, found: object, wanted: object) -> PpecError:
    return PpecError(
        "image.checksum_mismatch",
        f"image {image.name}: {what} wanted {wanted}, found {found}",
        hint="The image at its source was changed or cut short; import it again.",
        subject=f"image {image.name}",
    )
