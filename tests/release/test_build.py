# SPDX-License-Identifier: Apache-2.0
"""A whole release from the lock: same bytes twice, nothing rebuilt without cause, verifiable after unpacking."""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from ppec_orchestrator.release import build, tree
from ppec_orchestrator.release.tree import Target

PROJECT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A frozen copy of what a release is built from, so that a build and its repetition see the same sources."""
    copy = tmp_path_factory.mktemp("source")
    for relative, path in tree.package_sources(PROJECT):
        destination = copy / tree.HOST_PACKAGES[relative.partition("/")[0]] / relative
        destination.parent.mkdir(parents=True, exist_ok=True)
        destination.write_bytes(path.read_bytes())
    for name in ("pyproject.toml", "uv.lock"):
        (copy / name).write_bytes((PROJECT / name).read_bytes())
    return copy


@pytest.fixture(scope="module")
def release(source: Path, tmp_path_factory: pytest.TempPathFactory) -> build.Release:
    return build.build(source, tmp_path_factory.mktemp("releases"), Target())


def test_two_builds_give_the_same_bytes(release: build.Release, source: Path, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        again = build.build(source, tmp_path / "another", Target())
    finally:
        os.umask(before)
    assert again.archive != release.archive
    assert again.archive.read_bytes() == release.archive.read_bytes()
    assert again.version == release.version


def test_unchanged_inputs_build_nothing(release: build.Release, source: Path) -> None:
    written = release.archive.stat().st_mtime_ns
    again = build.build(source, release.archive.parent, Target())
    assert again == release
    assert again.archive.stat().st_mtime_ns == written


def test_a_damaged_archive_is_built_again(source: Path, tmp_path: Path) -> None:
    first = build.build(source, tmp_path, Target())
    good = first.archive.read_bytes()
    first.archive.write_bytes(good[:-1])
    assert build.build(source, tmp_path, Target()).archive.read_bytes() == good


def test_unpacked_tree_is_what_its_description_says(release: build.Release, tmp_path: Path) -> None:
    with tarfile.open(release.archive) as tar:
        tar.extractall(tmp_path)
    described = json.loads(release.description.read_text())
    manifest = json.loads((tmp_path / tree.MANIFEST).read_text())
    assert described["manifest"] == manifest
    assert described["sha256"] == tree.sha256(release.archive)
    assert {name: digest for name, digest in tree.file_digests(tmp_path).items() if name != tree.MANIFEST} == manifest[
        "files"
    ]
    assert {"bin/ppec-agentd", "bin/ppec-proxy"} <= set(manifest["files"])
    assert not [name for name in manifest["files"] if name.startswith("lib/ppec_orchestrator")]
    assert not [name for name in manifest["files"] if "://" in name or name.endswith("RECORD")]


def test_unpacked_tree_imports_its_dependencies_on_the_hosts_python(release: build.Release, tmp_path: Path) -> None:
    version = subprocess.run(["/usr/bin/python3", "-V"], capture_output=True, text=True, check=True).stdout
    if not version.startswith("Python 3.11."):
        pytest.skip(f"/usr/bin/python3 is {version.strip()}, the release is for 3.11")
    with tarfile.open(release.archive) as tar:
        tar.extractall(tmp_path)
    program = (
        "import sys, importlib.metadata; sys.path.insert(0, sys.argv[1]);"
        "import pydantic, structlog, uvicorn, httptools, starlette, ppec_contract.agent;"
        "print(pydantic.__file__, importlib.metadata.version('ppec'))"
    )
    command = ["/usr/bin/python3", "-IB", "-c", program, str(tmp_path / "lib")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "lib" / "pydantic" / "__init__.py"), release.version]


def test_a_changed_source_is_a_new_release(release: build.Release, source: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    subprocess.run(["cp", "-a", source, changed], check=True)
    (changed / "agentd" / "ppec_agentd" / "added.py").write_text("ADDED = True\n")
    assert build.build(changed, tmp_path / "out", Target()).version != release.version


def test_outside_a_source_tree_it_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main(["--project", str(tmp_path), "--output", str(tmp_path / "out")]) == 1
    assert "pyproject.toml is missing" in capsys.readouterr().err
