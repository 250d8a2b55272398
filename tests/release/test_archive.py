# SPDX-License-Identifier: Apache-2.0
"""Equal trees pack to equal bytes, whatever their times, modes and order of creation."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest

from ppec_orchestrator.release import archive

FILES = {"bin/tool": b"#!/bin/sh\n", "lib/a/one.py": b"1\n", "lib/b.py": b"2\n", "manifest.json": b"{}\n"}


def lay_out(root: Path, names: list[str], mode: int, time: int) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(FILES[name])
        path.chmod(mode)
        os.utime(path, (time, time))
    return root


def test_bytes_depend_on_names_and_content_alone(tmp_path: Path) -> None:
    first = lay_out(tmp_path / "one", sorted(FILES), 0o600, 1_000_000)
    second = lay_out(tmp_path / "two", sorted(FILES, reverse=True), 0o755, 2_000_000)
    archive.pack(first, tmp_path / "one.tar.gz")
    archive.pack(second, tmp_path / "renamed.tar.gz")
    assert (tmp_path / "one.tar.gz").read_bytes() == (tmp_path / "renamed.tar.gz").read_bytes()


def test_entries_are_root_owned_and_only_programs_are_executable(tmp_path: Path) -> None:
    archive.pack(lay_out(tmp_path / "one", list(FILES), 0o600, 5), tmp_path / "one.tar.gz")
    with tarfile.open(tmp_path / "one.tar.gz") as tar:
        entries = tar.getmembers()
    assert [e.name for e in entries if e.isfile()] == sorted(FILES)
    assert {(e.uid, e.gid, e.mtime) for e in entries} == {(0, 0, 0)}
    assert {e.name: e.mode for e in entries if e.isfile()} == {
        name: 0o755 if name.startswith("bin/") else 0o644 for name in FILES
    }


def test_a_symlink_is_refused(tmp_path: Path) -> None:
    lay_out(tmp_path / "one", list(FILES), 0o644, 5)
    (tmp_path / "one" / "lib" / "link").symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match="lib/link"):
        archive.pack(tmp_path / "one", tmp_path / "one.tar.gz")
