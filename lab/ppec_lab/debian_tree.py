# SPDX-License-Identifier: Apache-2.0
"""Debian root trees built by mmdebstrap from the machine's own mirrors, cached by what goes into them."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ppec_lab.cache import recipe_hash, say

SUITE = "bookworm"
# Nobody reads manuals on a lab machine, and fewer files make the tree quicker to lay out. Copyright files stay.
LEFT_OUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")
KEPT = ("/usr/share/doc/*/copyright",)


@dataclass(frozen=True)
class TreeRecipe:
    """What a tree holds: packages, files (path to text), units enabled and masked, and paths removed.

    `early_files` are there before the packages are configured; `files` replace what packages brought.
    """

    name: str
    packages: tuple[str, ...]
    files: Mapping[str, str] = field(default_factory=dict)
    early_files: Mapping[str, str] = field(default_factory=dict)
    enabled_units: tuple[str, ...] = ()
    masked_units: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()

    def digest(self) -> str:
        """Changes with the recipe and with the version of any package it names."""
        versions = subprocess.run(
            ["apt-cache", "policy", *self.packages], check=True, capture_output=True, text=True, timeout=120
        ).stdout
        candidates = [line for line in versions.splitlines() if "Candidate:" in line]
        texts = [sorted(files.items()) for files in (self.files, self.early_files)]
        content = repr((self.packages, texts, self.enabled_units, self.masked_units, self.removed, LEFT_OUT))
        return recipe_hash(content, *candidates)


def build_tree(recipe: TreeRecipe, target: Path) -> None:
    """Lay out `recipe` as a directory; needs root. `RuntimeError` carries mmdebstrap's last lines."""
    early = target.with_name("early")
    early.mkdir()
    for path, text in recipe.early_files.items():
        write_file(early, path, text)
    say(f"{recipe.name}: laying out Debian {SUITE} with {len(recipe.packages)} packages (about a minute)")
    target.chmod(0o755)
    command = ["mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", "--format=directory"]
    command += [f"--dpkgopt=path-exclude={pattern}" for pattern in LEFT_OUT]
    command += [f"--dpkgopt=path-include={pattern}" for pattern in KEPT]
    # A hook is a shell line; mmdebstrap gives it the tree as its first argument.
    command.append(f'--essential-hook=cp --recursive {shlex.quote(str(early))}/. "$1"/')
    command += [f"--include={','.join(recipe.packages)}", SUITE, str(target), *mirrors()]
    environment = {"SOURCE_DATE_EPOCH": "0", **os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=1800, env=environment)
    if done.returncode:
        raise RuntimeError(f"mmdebstrap failed for {recipe.name}:\n" + "\n".join(done.stderr.splitlines()[-15:]))
    for path in recipe.removed:
        for found in target.glob(path.lstrip("/")):
            found.unlink()
    for path, text in recipe.files.items():
        write_file(target, path, text)
    for unit in recipe.enabled_units:
        subprocess.run(["chroot", str(target), "systemctl", "enable", "--quiet", unit], check=True, timeout=60)
    for unit in recipe.masked_units:
        link = target / "etc/systemd/system" / unit
        link.unlink(missing_ok=True)
        link.symlink_to("/dev/null")


def write_file(tree: Path, path: str, text: str, mode: int = 0o644) -> None:
    """Write `text` to an absolute path inside `tree`, replacing a symlink rather than following it out of the tree."""
    target = tree / path.lstrip("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    target.write_text(text)
    target.chmod(mode)


def mirrors() -> list[str]:
    """One-line sources for Debian as this machine has them, so that a local mirror is used; else Debian's own."""
    form = "$(ORIGIN)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)"
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", form, "Created-By: Packages"],
        check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    rows = [line.split("|") for line in listed.stdout.splitlines()]
    found = {
        f"deb {uri} {release} {component}"
        for origin, uri, release, component in (row for row in rows if len(row) == 4)
        if origin == "Debian" and release.startswith(SUITE) and component == "main"
    }
    if not any(f" {SUITE} " in source for source in found):
        found = {
            f"deb http://deb.debian.org/debian {SUITE} main",
            f"deb http://deb.debian.org/debian-security {SUITE}-security main",
        }
    return sorted(found)
