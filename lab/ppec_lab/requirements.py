# SPDX-License-Identifier: Apache-2.0
"""Says in one sentence what this machine lacks to run lab hosts; silent when it lacks nothing."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from ppec_lab.cache import cache_root

PROGRAMS = ("podman", "runc", "mmdebstrap", "ip", "qemu-img", "syslinux", "mcopy", "mkfs.vfat", "ssh-keygen")
INSTALL_HINT = "run `python3 -m ppec_lab.packages --install` as root"
NEEDED_SPACE_GIB = 6


def not_root() -> str | None:
    """Containers, bridges and overlays are root's."""
    return None if os.geteuid() == 0 else "lab hosts need root: run it as root"


def no_apt() -> str | None:
    """Trees and images are made of Debian packages."""
    return None if shutil.which("apt-get") else "lab hosts are built from Debian packages, and there is no apt-get here"


def no_programs() -> str | None:
    """Programs that `packages` installs."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"missing {', '.join(absent)}: {INSTALL_HINT}" if absent else None


def no_namespaces() -> str | None:
    """A machine that is itself a restricted container can't make any."""
    command = ["unshare", "--mount", "--net", "--pid", "--fork", "true"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=20)
    return None if done.returncode == 0 else f"this machine may not make namespaces: {done.stderr.strip()}"


def no_tun() -> str | None:
    """A guest's network card is a tap device."""
    return None if Path("/dev/net/tun").exists() else "there is no /dev/net/tun: load the kernel module `tun`"


def no_space() -> str | None:
    """A host tree takes 400 MB, a Debian guest as much, disks and logs the rest."""
    place = next(path for path in (cache_root(), *cache_root().parents) if path.exists())
    free = shutil.disk_usage(place).free / 1024**3
    if free >= NEEDED_SPACE_GIB:
        return None
    return f"only {free:.1f} GiB free in {place}, wanted {NEEDED_SPACE_GIB}: make room, or set PPEC_CACHE elsewhere"


CHECKS: tuple[Callable[[], str | None], ...] = (not_root, no_apt, no_programs, no_namespaces, no_tun, no_space)
# Before the packages are there, only these can be judged.
FIRST_CHECKS = (not_root, no_apt)


def first_problem(checks: tuple[Callable[[], str | None], ...] = CHECKS) -> str | None:
    """The first thing missing, as a sentence that says what to do; `None` when the machine will do."""
    return next((problem for check in checks if (problem := check())), None)


def main() -> int:
    """Say what this machine lacks to run lab hosts; ends with 1 if it lacks anything."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--before-install", action="store_true", help="leave out what the packages will bring")
    arguments = parser.parse_args()
    problem = first_problem(FIRST_CHECKS if arguments.before_install else CHECKS)
    if problem:
        print(problem, file=sys.stderr)
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
