# SPDX-License-Identifier: Apache-2.0
"""The release tree: what goes in, what it is called, and that its launchers run from wherever it lies."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from ppec_orchestrator.release import tree
from ppec_orchestrator.release.tree import Target

SYSTEM_PYTHON = "/usr/bin/python3"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    for package, home in tree.HOST_PACKAGES.items():
        folder = root / home / package
        (folder / "__pycache__").mkdir(parents=True)
        (folder / "__init__.py").write_text(f'NAME = "{package}"\n')
        (folder / "__pycache__" / "__init__.cpython-311.pyc").write_bytes(b"stale")
    (root / "agentd" / "ppec_agentd" / "serve.py").write_text(
        "import sys, ppec_contract\n\ndef main():\n    print(ppec_contract.__file__, *sys.argv[1:])\n    return 7\n"
    )
    return root


def system_target() -> Target:
    command = [SYSTEM_PYTHON, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    return Target(python=subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())


def made(project: Path, root: Path, target: Target) -> str:
    tree.add_own_packages(project, root, {"ppec-agentd": "ppec_agentd.serve:main"}, target)
    return tree.seal(root, "1.2.3", target)


def test_only_host_programs_get_launchers() -> None:
    scripts = {"ppec": "ppec_orchestrator.cli.main:main", "ppec-agentd": "ppec_agentd.serve:main"}
    assert tree.host_scripts(scripts) == {"ppec-agentd": "ppec_agentd.serve:main"}


def test_manifest_lists_every_other_file_with_its_digest(project: Path, tmp_path: Path) -> None:
    root = tmp_path / "tree"
    version = made(project, root, Target())
    manifest = json.loads((root / tree.MANIFEST).read_text())
    on_disk = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}
    assert set(manifest["files"]) == on_disk - {tree.MANIFEST}
    assert all(tree.sha256(root / name) == digest for name, digest in manifest["files"].items())
    assert manifest["version"] == version
    assert not [name for name in on_disk if "__pycache__" in name]


def test_version_follows_content_and_target(project: Path, tmp_path: Path) -> None:
    first = made(project, tmp_path / "a", Target())
    assert made(project, tmp_path / "b", Target()) == first
    assert made(project, tmp_path / "c", Target(python="3.12")) != first
    (project / "proxy" / "ppec_proxy" / "__init__.py").write_text("NAME = 'changed'\n")
    changed = made(project, tmp_path / "d", Target())
    assert changed != first
    assert changed.startswith("1.2.3+")


def test_installer_traces_are_removed_and_metadata_kept(tmp_path: Path) -> None:
    info = tmp_path / "thing-1.dist-info"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "thing").write_text("#!/home/somebody/bin/python\n")
    (tmp_path / "thing" / "__pycache__").mkdir(parents=True)
    info.mkdir()
    for name in ("RECORD", "INSTALLER", "METADATA"):
        (info / name).write_text(name)
    tree.strip_installer_traces(tmp_path)
    left = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*"))
    assert left == ["thing", "thing-1.dist-info", "thing-1.dist-info/METADATA"]


def test_launcher_runs_from_anywhere_and_ignores_the_environment(project: Path, tmp_path: Path) -> None:
    made(project, tmp_path / "tree", system_target())
    moved = tmp_path / "elsewhere" / "1.2.3"
    shutil.copytree(tmp_path / "tree", moved)
    shutil.rmtree(tmp_path / "tree")
    (moved.parent / "current").symlink_to("1.2.3")
    (moved / "bin" / "ppec-agentd").chmod(0o755)
    decoy = tmp_path / "decoy" / "ppec_contract"
    decoy.mkdir(parents=True)
    (decoy / "__init__.py").write_text("raise SystemExit('decoy imported')\n")
    done = subprocess.run(
        [moved.parent / "current" / "bin" / "ppec-agentd", "--flag"],
        env={"PYTHONPATH": str(decoy.parent)},
        cwd=decoy.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 7, done.stderr
    assert done.stdout.split() == [str(moved / "lib" / "ppec_contract" / "__init__.py"), "--flag"]
    assert not list(moved.rglob("__pycache__"))


def test_launcher_refuses_another_python(project: Path, tmp_path: Path) -> None:
    made(project, tmp_path / "tree", Target(python="3.1"))
    done = subprocess.run(
        [SYSTEM_PYTHON, "-I", tmp_path / "tree" / "bin" / "ppec-agentd"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("ppec-agentd: this release is built for Python 3.1, not 3.")
