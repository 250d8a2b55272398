# SPDX-License-Identifier: Apache-2.0
"""The image cache: each image once, under its sha256, checked before anything is built on it.

An image is fetched aside, hashed while it streams, looked into (`image_format`), fsynced and renamed into place with a
*stamp*: the size, time and inode it had when its hash was right. A later use compares the stamp; a file that no longer
fits it is hashed again, and fetched again if it is wrong. The path stays the same then, so disks built on it heal.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import json
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import structlog

from ppec_agentd.files import os_errors, sync_directory, write_whole
from ppec_agentd.image_format import virtual_size_bytes
from ppec_agentd.orchestrator_link import OrchestratorLink
from ppec_agentd.settings import TlsSettings
from ppec_contract.errors import PpecError
from ppec_contract.vm import ImageSource

log = structlog.get_logger(__name__)
CHUNK_BYTES = 1024 * 1024
CONCURRENT_FETCHES = 4


@dataclass(frozen=True, slots=True)
class CachedImage:
    """A checked image file; `virtual_size_bytes` is the disk the guest would see."""

    path: Path
    format: str
    virtual_size_bytes: int


class ImageCache:
    """`ensure` fetches at most once per image at a time, however many VMs wait for it."""

    def __init__(self, directory: Path, tls: TlsSettings, timeout_s: float) -> None:
        self._directory = directory
        self._tls = tls
        self._timeout_s = timeout_s
        self._flights: dict[str, asyncio.Future[CachedImage]] = {}
        # Threads of its own: downloads that crawl must not hold up the journal's.
        self._threads = ThreadPoolExecutor(CONCURRENT_FETCHES, thread_name_prefix="image")
        self._closing = threading.Event()

    def close(self) -> None:
        """Fetches under way end at their next chunk."""
        self._closing.set()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def ensure(self, image: ImageSource) -> CachedImage:
        """The cached image, fetched if need be.

        Raises `image.fetch_failed`, `image.checksum_mismatch`, `image.invalid`, `disk.full`.
        """
        flight = self._flights.get(image.sha256)
        if flight is None:
            flight = asyncio.get_running_loop().run_in_executor(self._threads, self._ensure, image)
            self._flights[image.sha256] = flight
            flight.add_done_callback(lambda _: self._flights.pop(image.sha256, None))
        # Shielded: one VM that gives up must not take the image from the others.
        return await asyncio.shield(flight)

    def _ensure(self, image: ImageSource) -> CachedImage:
        path = self._directory / f"{image.sha256}.{image.format}"
        with os_errors(f"image {image.name} can't be kept in {self._directory}", f"image {image.name}"):
            self._directory.mkdir(parents=True, exist_ok=True)
            # Whatever the umask: QEMU's user passes through to the images, and lists nothing.
            self._directory.chmod(0o711)
            if not self._is_good(path, image):
                self._fetch(path, image)
            size = virtual_size_bytes(path, image.format, f"image {image.name}")
        return CachedImage(path, image.format, size)

    def _is_good(self, path: Path, image: ImageSource) -> bool:
        try:
            found = path.stat()
        except FileNotFoundError:
            return False
        if found.st_size == image.size_bytes:
            with contextlib.suppress(OSError, ValueError):
                if json.loads(_stamp_path(path).read_text()) == _stamp(found):
                    return True
            if _sha256_of(path) == image.sha256:
                write_whole(_stamp_path(path), json.dumps(_stamp(found)).encode())
                return True
        log.error("image_damaged", image=image.name, path=str(path), size_bytes=found.st_size)
        return False

    def _fetch(self, path: Path, image: ImageSource) -> None:
        partial = path.with_name(f".{path.name}.partial")
        try:
            with partial.open("wb") as file:
                digest, size, end = hashlib.sha256(), 0, time.monotonic() + self._timeout_s
                for chunk in self._stream(image):
                    if self._closing.is_set() or time.monotonic() > end:
                        why = "the agent stops" if self._closing.is_set() else f"not done in {self._timeout_s:g} s"
                        raise _unfetched(image, why)
                    size += len(chunk)
                    if size > image.size_bytes:
                        raise _mismatch(image, "bytes", f"more than {image.size_bytes}", image.size_bytes)
                    digest.update(chunk)
                    file.write(chunk)
                if size != image.size_bytes:
                    raise _mismatch(image, "bytes", size, image.size_bytes)
                if digest.hexdigest() != image.sha256:
                    raise _mismatch(image, "sha256", digest.hexdigest(), image.sha256)
                file.flush()
                virtual_size_bytes(partial, image.format, f"image {image.name}")
                # QEMU runs as another user and only reads it.
                os.fchmod(file.fileno(), 0o644)
                os.fsync(file.fileno())
            partial.replace(path)
            sync_directory(path.parent)
            write_whole(_stamp_path(path), json.dumps(_stamp(path.stat())).encode())
        finally:
            partial.unlink(missing_ok=True)
        log.info("image_cached", image=image.name, sha256=image.sha256, size_bytes=size)

    def _stream(self, image: ImageSource) -> Iterator[bytes]:
        parts = urlsplit(image.url)
        if parts.scheme == "file":
            yield from _read_file(Path(unquote(parts.path)), image)
            return
        link = OrchestratorLink(image.url, self._tls, min(self._timeout_s, 60.0))
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        try:
            answer = link.request("GET", target or "/")
            if answer.status != 200:
                raise _unfetched(image, f"the server answered {answer.status}")
            while chunk := answer.read(CHUNK_BYTES):
                yield chunk
        except (OSError, http.client.HTTPException) as error:
            raise _unfetched(image, str(error)) from error
        except PpecError as error:
            raise error if error.code.startswith("image.") else _unfetched(image, error.message) from error
        finally:
            link.close()


def _read_file(path: Path, image: ImageSource) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
    except OSError as error:
        raise _unfetched(image, f"{path}: {error.strerror}") from error


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamp_path(path: Path) -> Path:
    return path.with_name(path.name + ".verified")


def _stamp(found: os.stat_result) -> dict[str, int]:
    return {"size_bytes": found.st_size, "mtime_ns": found.st_mtime_ns, "inode": found.st_ino}


def _mismatch(image: ImageSource, what: str, found: object, wanted: object) -> PpecError:
    return PpecError(
        "image.checksum_mismatch",
        f"image {image.name}: {what} wanted {wanted}, found {found}",
        hint="The image at its source was changed or cut short; import it again.",
        subject=f"image {image.name}",
    )


def _unfetched(image: ImageSource, why: str) -> PpecError:
    return PpecError(
        "image.fetch_failed", f"image {image.name} could not be fetched: {why}", subject=f"image {image.name}"
    )
