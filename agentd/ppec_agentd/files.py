# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or absent: write aside, fsync, rename; and the one map from OSError to our errors."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from ppec_contract.errors import PpecError


def sync_directory(path: Path) -> None:
    """Makes a rename in the directory survive a power loss."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def write_whole(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Puts a file in place at once; a crash leaves the old one, or none, never half of it."""
    partial = path.with_name(f".{path.name}.partial")
    file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        write_all(file, data)
        os.fsync(file)
    finally:
        os.close(file)
    partial.replace(path)
    sync_directory(path.parent)


@contextlib.contextmanager
def os_errors(what: str, subject: str) -> Iterator[None]:
    """Maps OSError: no room is `disk.full`, everything else `internal.error`; `what` says what could not be done."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise PpecError(
            "disk.full" if full else "internal.error",
            f"{what}: {error.strerror or error}",
            hint="Make room on the host's storage." if full else "",
            subject=subject,
        ) from error
