# SPDX-License-Identifier: Apache-2.0
"""Image files by content: `<folder>/<sha256>`, complete or absent."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from ppec_contract.errors import PpecError
from ppec_orchestrator.image_formats import HEADER_BYTES, ImageFormat, virtual_size_mib

_PART = ".part-"
_ABANDONED_AFTER_S = 24 * 3600


@dataclass(frozen=True, slots=True)
class StoredImage:
    """What an upload turned out to be."""

    sha256: str
    size_bytes: int
    virtual_size_mib: int


class Upload:
    """One upload under way. `write` chunks, then `finish`; or `abort`, after which nothing is left."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        handle, name = tempfile.mkstemp(dir=folder, prefix=_PART)
        self._file = os.fdopen(handle, "wb")
        self._path = Path(name)
        self._hash = hashlib.sha256()
        self._header = b""
        self._size = 0

    def write(self, chunk: bytes) -> None:
        self._size += len(chunk)
        if self._size > self._max_bytes:
            raise PpecError(
                "request.too_large",
                f"the image is larger than {self._max_bytes} bytes",
                hint="Raise max_image_bytes in the orchestrator's settings.",
                subject="image",
            )
        if len(self._header) < HEADER_BYTES:
            self._header += chunk[: HEADER_BYTES - len(self._header)]
        self._hash.update(chunk)
        try:
            self._file.write(chunk)
        except OSError as error:
            raise _storage_error(error) from error

    def finish(self, claimed: ImageFormat, wanted_sha256: str | None) -> StoredImage:
        """Checks what arrived and puts it in its place; raises `image.checksum_mismatch` or `image.invalid`."""
        sha256 = self._hash.hexdigest()
        if wanted_sha256 is not None and sha256 != wanted_sha256:
            raise PpecError(
                "image.checksum_mismatch",
                f"the file's sha256 is {sha256}, wanted {wanted_sha256}",
                hint="Upload the file again.",
                subject="image",
            )
        virtual_mib = virtual_size_mib(self._header, self._size, claimed)
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            os.fchmod(self._file.fileno(), 0o640)
            self._file.close()
            self._path.replace(self._folder / sha256)
            _sync_folder(self._folder)
        except OSError as error:
            raise _storage_error(error) from error
        return StoredImage(sha256, self._size, virtual_mib)

    def abort(self) -> None:
        """Leaves nothing of an unfinished upload; harmless after `finish`."""
        self._file.close()
        self._path.unlink(missing_ok=True)


class ImageStore:
    """The folder of image files. `settling` is held where a file and its catalogue row must change together."""

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self.settling = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True, mode=0o750)
        self._sweep()

    def _sweep(self) -> None:
        # Uploads a crash cut off. Not the young ones: they may be another replica's on a shared folder.
        for path in self._folder.glob(f"{_PART}*"):
            if time.time() - path.stat().st_mtime > _ABANDONED_AFTER_S:
                path.unlink(missing_ok=True)

    def begin(self) -> Upload:
        try:
            return Upload(self._folder, self._max_bytes)
        except OSError as error:
            raise _storage_error(error) from error

    def path(self, sha256: str) -> Path:
        return self._folder / sha256

    def remove(self, sha256: str) -> None:
        self.path(sha256).unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _storage_error(error: OSError) -> PpecError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return PpecError(
            "disk.full",
            "the orchestrator's image folder has no room left; nothing was kept",
            hint="Free space, or delete images.",
            subject="image",
        )
    return PpecError("internal.error", "the image could not be written", subject="image")
