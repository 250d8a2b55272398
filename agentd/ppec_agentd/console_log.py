# SPDX-License-Identifier: Apache-2.0
"""A guest's console log, followed through its rotations, and a window on its end that several may read.

virtlogd writes the file, and renames it to `console.log.0` (that one to `.1`, and so on) when it has grown too long.
Nothing here is asynchronous: `LogFollower` reads files, `Window` is pure.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

READ_BYTES = 64 * 1024
# A log longer than this is read from its end; virtlogd begins a new file long before it is reached twice in one look.
_GENERATIONS = 3


class Window:
    """The last `size` bytes of a stream. Positions count from the first byte that was ever put in."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._bytes = bytearray()
        self.end = 0

    @property
    def begin(self) -> int:
        return self.end - len(self._bytes)

    def put(self, data: bytes) -> None:
        self._bytes += data
        self.end += len(data)
        del self._bytes[: max(0, len(self._bytes) - self._size)]

    def take(self, position: int, most: int) -> tuple[bytes, int]:
        """The bytes from `position` on, at most so many, and how many before them are gone already."""
        skipped = max(0, self.begin - position)
        at = position + skipped - self.begin
        return bytes(self._bytes[at : at + most]), skipped


class LogFollower:
    """Reads what comes to the log. The file may not be there yet, be rotated, or be removed and made anew."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = -1
        self._closed = False
        self._lock = threading.Lock()

    def close(self) -> None:
        """For good. A read under way on another thread ends first: its file's number may be another file's next."""
        with self._lock:
            self._closed = True
            self._leave()

    def tail(self, most: int) -> bytes:
        """Begins anew at the end of the log, and returns the last `most` bytes before it, rotated ones among them."""
        with self._lock:
            return b"" if self._closed else self._tail(most)

    def read(self) -> bytes:
        """What has come since, at most READ_BYTES; empty if nothing has."""
        with self._lock:
            return b"" if self._closed else self._read()

    def _leave(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _tail(self, most: int) -> bytes:
        self._leave()
        self._open(self._path)
        data = self._last(self._file, most) if self._file >= 0 else b""
        older = self._path.with_name(f"{self._path.name}.0")
        if len(data) < most and self._file >= 0:
            with contextlib.suppress(OSError), older.open("rb") as file:
                data = self._last(file.fileno(), most - len(data)) + data
        return data

    def _read(self) -> bytes:
        if self._file < 0:
            self._open(self._path)
        if self._file < 0:
            return b""
        data = os.read(self._file, READ_BYTES)
        if data:
            return data
        successor = self._successor()
        if successor is None:
            return b""
        # What was written to the old file between the last read and its rotation.
        data = os.read(self._file, READ_BYTES)
        if not data:
            self._leave()
            self._open(successor)
            data = os.read(self._file, READ_BYTES) if self._file >= 0 else b""
        return data

    def _successor(self) -> Path | None:
        """The file that followed the open one, if it is not the newest any more."""
        ours = os.fstat(self._file)
        newer = self._path
        for generation in range(_GENERATIONS + 1):
            path = self._path.with_name(f"{self._path.name}.{generation - 1}") if generation else self._path
            try:
                found = path.stat()
            except OSError:
                # Between two renames, or the log is gone.
                return newer if generation else None
            if (found.st_dev, found.st_ino) == (ours.st_dev, ours.st_ino):
                return newer if generation else None
            newer = path
        return newer

    def _open(self, path: Path) -> None:
        with contextlib.suppress(OSError):
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)

    @staticmethod
    def _last(file: int, most: int) -> bytes:
        size = os.fstat(file).st_size
        os.lseek(file, max(0, size - most), os.SEEK_SET)
        data = b""
        while len(data) < most and (more := os.read(file, most - len(data))):
            data += more
        return data
