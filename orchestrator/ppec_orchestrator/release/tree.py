# SPDX-License-Identifier: Apache-2.0
"""What a release is made of: packages, launchers, manifest. Nothing here asks the network or starts a program.

/opt/ppec/releases/0.1.0+2f1c…/
    bin/ppec-agentd   #!/usr/bin/python3 -IB, puts ../lib on sys.path
    bin/ppec-proxy
    lib/…             locked dependencies and our packages
    manifest.json     sha256 of every other file
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

MANIFEST = "manifest.json"
# Package -> home folder in the source tree. The orchestrator never runs on a host, so it isn't shipped to one.
HOST_PACKAGES = {"ppec_contract": "contract", "ppec_proxy": "proxy", "ppec_agentd": "agentd"}
# What an installer leaves behind: it names the builder's interpreter or installer and serves nothing at run time.
_INSTALLER_FILES = ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json", "uv_cache.json", "uv_build.json")

# -I: neither the environment nor the working directory nor a user's site-packages may change what runs.
# -B: a root-owned tree stays exactly what its manifest says.
# The distribution's site-packages stay reachable: libvirt's binding comes from there.
_LAUNCHER = """\
#!/usr/bin/python3 -IB
import sys
from os.path import dirname, join, realpath

if sys.version_info[:2] != {python!r}:
    sys.exit(f"{name}: this release is built for Python {dotted}, not {{sys.version.split()[0]}}")
sys.path.insert(0, join(dirname(dirname(realpath(__file__))), "lib"))

from {module} import {function}

sys.exit({function}())
"""


@dataclass(frozen=True, slots=True)
class Target:
    """What hosts run. `python` is `3.11`; `platform` is uv's name of it, `x86_64-manylinux_2_36` being Debian 12."""

    python: str = "3.11"
    platform: str = "x86_64-manylinux_2_36"

    @property
    def architecture(self) -> str:
        return self.platform.split("-", 1)[0]

    @property
    def python_version(self) -> tuple[int, int]:
        major, minor = self.python.split(".")
        return int(major), int(minor)

    @property
    def suffix(self) -> str:
        """`py311-x86_64`, as in the archive's name."""
        return f"py{self.python.replace('.', '')}-{self.architecture}"


def package_sources(project: Path) -> list[tuple[str, Path]]:
    """(path below lib/, file) of each file of our packages, sorted; bytecode of the working tree left out."""
    return sorted(
        (path.relative_to(project / home).as_posix(), path)
        for package, home in HOST_PACKAGES.items()
        for path in (project / home / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    )


def host_scripts(scripts: dict[str, str]) -> dict[str, str]:
    """Those of `[project.scripts]` whose package is shipped to hosts."""
    return {name: entry for name, entry in scripts.items() if entry.partition(".")[0] in HOST_PACKAGES}


def launcher(name: str, entry: str, target: Target) -> str:
    """The text of `bin/<name>` for an entry point `package.module:function`."""
    module, _, function = entry.partition(":")
    return _LAUNCHER.format(
        name=name, module=module, function=function, python=target.python_version, dotted=target.python
    )


def strip_installer_traces(lib: Path) -> None:
    """Removes what differs between builders (scripts with the builder's interpreter, install records)."""
    for name in ("bin", "share"):
        shutil.rmtree(lib / name, ignore_errors=True)
    for info in lib.glob("*.dist-info"):
        for name in _INSTALLER_FILES:
            (info / name).unlink(missing_ok=True)
    (lib / ".lock").unlink(missing_ok=True)
    for cache in list(lib.rglob("__pycache__")):
        shutil.rmtree(cache)


def add_own_packages(project: Path, tree: Path, scripts: dict[str, str], target: Target) -> None:
    for relative, source in package_sources(project):
        destination = tree / "lib" / relative
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, destination)
    (tree / "bin").mkdir()
    for name, entry in host_scripts(scripts).items():
        (tree / "bin" / name).write_text(launcher(name, entry, target))


def file_digests(tree: Path) -> dict[str, str]:
    """Path below the tree -> sha256, sorted by path."""
    files = sorted(path for path in tree.rglob("*") if path.is_file())
    return {path.relative_to(tree).as_posix(): sha256(path) for path in files}


def sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def seal(tree: Path, base_version: str, target: Target) -> str:
    """Names the tree after its content, writes its package metadata and manifest; returns the version.

    The version is `<project version>+<twelve hex digits>`, so a changed tree is always a new release.
    """
    digests = json.dumps(file_digests(tree), sort_keys=True)
    content = hashlib.sha256(f"{target.suffix}\n{digests}".encode()).hexdigest()[:12]
    version = f"{base_version}+{content}"
    info = tree / "lib" / f"ppec-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: ppec\nVersion: {version}\n")
    manifest = {
        "name": "ppec",
        "version": version,
        "python": target.python,
        "architecture": target.architecture,
        "files": file_digests(tree),
    }
    (tree / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    return version
