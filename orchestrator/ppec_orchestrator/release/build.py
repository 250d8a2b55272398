# SPDX-License-Identifier: Apache-2.0
"""Builds a release for hosts: `python -m ppec_orchestrator.release.build --output build/releases`.

Prints the archive's path. Beside it lies `<archive>.json` (its sha256 and the manifest), which the `release` role
reads. `latest-<python>-<architecture>.tar.gz` (and `.json`) are symlinks to the newest. Nothing is built when the
inputs (lock, sources, target, compiler) are those of the newest release.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppec_orchestrator.release import archive, tree
from ppec_orchestrator.release.tree import Target

_COMPILE = """
import pathlib, py_compile, sys
for path in sorted(pathlib.Path(sys.argv[1]).rglob("*.py")):
    shown = path.relative_to(sys.argv[1]).as_posix()
    try:
        py_compile.compile(str(path), dfile=shown, doraise=True, optimize=0,
                           invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    except py_compile.PyCompileError:
        if "ppec_" in shown:
            raise
"""
_EXTRAS = ("agentd", "proxy")


class BuildError(Exception):
    """The release can't be built; the text says what is missing or which step failed."""


@dataclass(frozen=True, slots=True)
class Release:
    """A built release. `sha256` is the archive's; `description` is the JSON file beside it."""

    version: str
    archive: Path
    sha256: str
    description: Path


def build(project: Path, output: Path, target: Target) -> Release:
    """The release of `project` (the source tree with uv.lock) for `target`, built unless it is there already."""
    output.mkdir(parents=True, exist_ok=True)
    with _locked(output / ".lock"):
        inputs = _inputs(project, target)
        known = _newest(output, target, inputs)
        if known:
            return known
        with tempfile.TemporaryDirectory(prefix=".release-", dir=output) as scratch:
            return _build(project, output, target, Path(scratch), inputs)


def _build(project: Path, output: Path, target: Target, scratch: Path, inputs: str) -> Release:
    root = scratch / "tree"
    lib = root / "lib"
    _install_locked(project, lib, target, scratch)
    tree.strip_installer_traces(lib)
    pyproject = _pyproject(project)
    tree.add_own_packages(project, root, pyproject["project"]["scripts"], target)
    _compile(lib, target)
    version = tree.seal(root, pyproject["project"]["version"], target)
    packed = scratch / "release.tar.gz"
    archive.pack(root, packed)
    final = output / f"ppec-{version.replace('+', '-')}-{target.suffix}.tar.gz"
    description = {
        "archive": final.name,
        "sha256": tree.sha256(packed),
        "inputs": inputs,
        "manifest": json.loads((root / tree.MANIFEST).read_text()),
    }
    packed.rename(final)
    described = final.with_name(final.name + ".json")
    (scratch / "description").write_text(json.dumps(description, indent=1, sort_keys=True) + "\n")
    (scratch / "description").rename(described)
    for link, name in ((_latest(output, target), final.name), (_latest_description(output, target), described.name)):
        _link(scratch, link, name)
    return Release(version, final, description["sha256"], described)


def _install_locked(project: Path, lib: Path, target: Target, scratch: Path) -> None:
    """The locked versions, each wheel checked against the lock's hashes, for the host's Python and not ours."""
    requirements = scratch / "requirements.txt"
    extras = [word for extra in _EXTRAS for word in ("--extra", extra)]
    export = ["uv", "export", "--quiet", "--frozen", "--no-dev", "--no-emit-project", "--no-header", "--no-annotate"]
    _run([*export, *extras, "--output-file", str(requirements)], cwd=project)
    install = ["uv", "pip", "install", "--quiet", "--target", str(lib), "--no-deps", "--require-hashes"]
    wheels = ["--only-binary", ":all:", "--link-mode", "copy", "--no-compile-bytecode"]
    cross = ["--python", sys.executable, "--python-version", target.python, "--python-platform", target.platform]
    _run([*install, *wheels, *cross, "--requirements", str(requirements)], cwd=project)


def _compile(lib: Path, target: Target) -> None:
    """Bytecode, because hosts never write any; by hash and not by time, one process, fixed order: same bytes."""
    env = {"PATH": os.environ.get("PATH", os.defpath), "PYTHONHASHSEED": "0"}
    _run([_compiler(target), "-sSB", "-c", _COMPILE, str(lib)], cwd=lib, env=env)


def _compiler(target: Target) -> str:
    """A Python of the target's minor version: only that one writes bytecode the host's can read."""
    if sys.version_info[:2] == target.python_version:
        return sys.executable
    found = shutil.which(f"python{target.python}")
    if not found:
        raise BuildError(f"no python{target.python} on PATH to compile for hosts with Python {target.python}")
    return found


def _inputs(project: Path, target: Target) -> str:
    """One hash over everything that decides the result."""
    digest = hashlib.sha256()
    try:
        ours = sorted(Path(__file__).parent.glob("*.py"))
        files = [project / "pyproject.toml", project / "uv.lock", *ours]
        for path in [*files, *(source for _, source in tree.package_sources(project))]:
            digest.update(f"{path.name} {tree.sha256(path)}\n".encode())
    except FileNotFoundError as error:
        raise BuildError(f"{error.filename} is missing: a release is built from the source tree") from error
    digest.update("\n".join(name for name, _ in tree.package_sources(project)).encode())
    digest.update(f"{target} {_compiler(target)} {platform.python_version()}".encode())
    return digest.hexdigest()


def _newest(output: Path, target: Target, inputs: str) -> Release | None:
    """The newest release if it was built from these inputs and is still whole."""
    try:
        described = _latest_description(output, target).resolve(strict=True)
        description = json.loads(described.read_text())
        packed = output / description["archive"]
        if description["inputs"] != inputs or tree.sha256(packed) != description["sha256"]:
            return None
        return Release(description["manifest"]["version"], packed, description["sha256"], described)
    except (FileNotFoundError, ValueError, KeyError):
        return None


def _latest(output: Path, target: Target) -> Path:
    return output / f"latest-{target.suffix}.tar.gz"


def _latest_description(output: Path, target: Target) -> Path:
    return output / f"latest-{target.suffix}.tar.gz.json"


def _link(scratch: Path, link: Path, name: str) -> None:
    staged = scratch / "link"
    staged.symlink_to(name)
    staged.rename(link)


def _pyproject(project: Path) -> dict[str, Any]:
    return tomllib.loads((project / "pyproject.toml").read_text())


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _run(command: list[str], *, cwd: Path, env: dict[str, str] | None = None) -> None:
    try:
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=600)
    except FileNotFoundError as error:
        raise BuildError(f"{command[0]} is not installed") from error
    if done.returncode:
        raise BuildError(f"{' '.join(command[:3])} failed: {done.stderr.strip()[-2000:]}")


def main(arguments: list[str] | None = None) -> int:
    source_tree = Path(__file__).resolve().parents[3]
    default = Target()
    parser = argparse.ArgumentParser(prog="python -m ppec_orchestrator.release.build", description=__doc__)
    parser.add_argument("--project", type=Path, default=source_tree, help="source tree with pyproject.toml, uv.lock")
    parser.add_argument("--output", type=Path, default=Path("build/releases"))
    parser.add_argument("--python", default=default.python, help="the hosts' Python (default %(default)s)")
    parser.add_argument("--platform", default=default.platform, help="uv's platform name (default %(default)s)")
    given = parser.parse_args(arguments)
    try:
        release = build(given.project.resolve(), given.output.resolve(), Target(given.python, given.platform))
    except BuildError as error:
        sys.stderr.write(f"release: {error}\n")
        return 1
    sys.stdout.write(f"{release.archive}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
