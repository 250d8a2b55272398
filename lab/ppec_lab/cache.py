# SPDX-License-Identifier: Apache-2.0
"""Where built trees and images are kept, each under the hash of its recipe."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

DEFAULT_ROOT = "/var/cache/ppec"


def cache_root() -> Path:
    """The cache's directory: ``$PPEC_CACHE``, or /var/cache/ppec."""
    return Path(os.environ.get("PPEC_CACHE") or DEFAULT_ROOT)


def recipe_hash(*parts: str | bytes) -> str:
    """Twelve hex digits over all parts of a recipe (scripts, package versions); any change gives another name."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.hexdigest()[:12]


def say(message: str) -> None:
    """One line of progress, on standard error so that standard output carries only results."""
    print(message, file=sys.stderr, flush=True)


def cached(name: str, build: Callable[[Path], Path]) -> Path:
    """The path ``cache_root()/name``, built at most once even when several processes ask at the same time.

    `build` gets an empty scratch directory on the same file system and returns the finished file or directory in it,
    which is then renamed into place: the cache never shows something half made.
    """
    target = cache_root() / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target.parent / f".{target.name}.lock"):
        if target.exists():
            return target
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            build(scratch).rename(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
