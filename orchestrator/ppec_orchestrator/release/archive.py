# SPDX-License-Identifier: Apache-2.0
"""Packs a tree so that equal trees give equal bytes: sorted names, no times, no owners, two modes."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path


def pack(tree: Path, archive: Path) -> None:
    """Writes `archive` (tar.gz) with the tree's directories and files at its top."""
    # gzip writes a file name and a time into its header unless told otherwise.
    with (
        archive.open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0, compresslevel=6) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for path in sorted(tree.rglob("*")):
            _add(tar, tree, path)


def _add(tar: tarfile.TarFile, tree: Path, path: Path) -> None:
    if path.is_symlink() or not (path.is_dir() or path.is_file()):
        raise ValueError(f"{path} is neither a directory nor a plain file, wanted nothing else in a release")
    name = path.relative_to(tree)
    entry = tarfile.TarInfo(name.as_posix())
    if path.is_dir():
        entry.type, entry.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(entry)
        return
    data = path.read_bytes()
    entry.size, entry.mode = len(data), 0o755 if name.parts[0] == "bin" else 0o644
    tar.addfile(entry, io.BytesIO(data))
