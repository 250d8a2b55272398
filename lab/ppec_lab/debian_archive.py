# SPDX-License-Identifier: Apache-2.0
"""Debian packages fetched and unpacked beside the system, not installed on it."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Candidate:
    """A package as the mirrors offer it, for example ``busybox-static 1:1.35.0-4+deb12u1``."""

    name: str
    version: str


def candidate(package: str) -> Candidate:
    """The version that apt would install; `LookupError` when the lists know none."""
    out = _apt("apt-cache", "policy", package)
    found = re.search(r"^  Candidate: (\S+)$", out, re.MULTILINE)
    if found is None or found[1] == "(none)":
        raise LookupError(f"apt knows no package {package}: run `apt-get update`")
    return Candidate(package, found[1])


def cloud_kernel(architecture: str = "amd64") -> Candidate:
    """The kernel package behind ``linux-image-cloud-<architecture>``, a metapackage that names the current one."""
    depends = _apt("apt-cache", "show", "--no-all-versions", f"linux-image-cloud-{architecture}")
    found = re.search(r"^Depends: (linux-image-\S+)", depends, re.MULTILINE)
    if found is None:
        raise LookupError(f"apt knows no cloud kernel for {architecture}: run `apt-get update`")
    return candidate(found[1])


def unpack(package: Candidate, into: Path) -> Path:
    """Download `package` and unpack its files below ``into/<name>``; returns that directory."""
    downloads = into / "deb"
    downloads.mkdir(parents=True, exist_ok=True)
    # apt drops to a user of its own for downloads and warns when that user can't write here; it is harmless.
    options = ["-q=2", "-o", "APT::Sandbox::User=root"]
    subprocess.run(
        ["apt-get", *options, "download", f"{package.name}={package.version}"],
        cwd=downloads,
        check=True,
        capture_output=True,
        timeout=600,
    )
    (archive,) = downloads.glob(f"{package.name}_*.deb")
    target = into / package.name
    subprocess.run(["dpkg-deb", "--extract", str(archive), str(target)], check=True, timeout=300)
    return target


def _apt(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=120).stdout
