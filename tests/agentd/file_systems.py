# SPDX-License-Identifier: Apache-2.0
"""Small file systems of their own, that are full, read-only or gone when a test wants it."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest


@contextlib.contextmanager
def _mounted_at(path: Path) -> Iterator[Path]:
    """One of 16 MiB, mounted there: nobody else takes of it."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    path.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(path)], check=True, timeout=30)
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True, timeout=30)


@pytest.fixture
def file_system() -> Callable[[Path], AbstractContextManager[Path]]:
    return _mounted_at


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    with _mounted_at(tmp_path / "small") as path:
        yield path
