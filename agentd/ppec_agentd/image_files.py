# SPDX-License-Identifier: Apache-2.0
"""The files of the image cache: `<sha256>.<format>`, and beside each its stamp, `<sha256>.<format>.verified`.

The stamp says what the file was like when its hash was right; its own time is the image's last use. All of it blocks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ppec_agentd.files import os_errors, write_whole
from ppec_agentd.image_guard import unopened

IMAGE_NAME = re.compile(r"[0-9a-f]{64}\.(raw|qcow2)")


@dataclass(frozen=True, slots=True)
class KeptImage:
    """An image's file in the cache, looked into by nobody. `last_used_s` is wall-clock time, kept over restarts."""

    path: Path
    sha256: str
    size_bytes: int
    last_used_s: float


def kept_images(directory: Path) -> list[KeptImage]:
    """Every image's file in the directory; whatever else is there is none."""
    if not directory.is_dir():
        return []
    found = (_kept(path) for path in sorted(directory.iterdir()) if IMAGE_NAME.fullmatch(path.name))
    return [image for image in found if image is not None]


def stamped(path: Path, found: os.stat_result) -> bool:
    """Whether the file is still what it was when it was stamped. If so, it is used now."""
    with contextlib.suppress(OSError, ValueError):
        if json.loads(_stamp_path(path).read_text()) == _stamp(found):
            mark_used(path)
            return True
    return False


def stamp(path: Path, found: os.stat_result) -> None:
    """For a file whose hash was right; `found` is from before it was hashed, lest a change meanwhile be stamped too."""
    write_whole(_stamp_path(path), json.dumps(_stamp(found)).encode())


def mark_used(path: Path) -> None:
    # A time that can't be set costs at worst another fetch.
    with contextlib.suppress(OSError):
        os.utime(_stamp_path(path))


def remove_image(image: KeptImage) -> bool:
    """False, and nothing removed, if anybody has it open. Raises `internal.error`, also if that can't be told."""
    with os_errors(f"the image {image.path} can't be removed", f"image {image.sha256}"):
        with contextlib.suppress(FileNotFoundError), unopened(image.path) as alone:
            if not alone:
                return False
            # Last what there is to be found by: a crash in between leaves an image to be checked or evicted again.
            _stamp_path(image.path).unlink(missing_ok=True)
            image.path.unlink()
        return True


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamp_path(path: Path) -> Path:
    return path.with_name(path.name + ".verified")


def _stamp(found: os.stat_result) -> dict[str, int]:
    return {"size_bytes": found.st_size, "mtime_ns": found.st_mtime_ns, "inode": found.st_ino}


def _kept(path: Path) -> KeptImage | None:
    try:
        found = used = path.stat()
        with contextlib.suppress(FileNotFoundError):
            used = _stamp_path(path).stat()
    except FileNotFoundError:
        return None
    return KeptImage(path, path.stem, found.st_size, used.st_mtime)
