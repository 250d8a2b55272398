# SPDX-License-Identifier: Apache-2.0
"""The Debian packages that the demo and the tests need, and their installation.

Runs on the distribution's bare python3: it is what brings in all the rest.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

# To build the locked Python environment: libvirt's binding comes as source.
PYTHON = ("ca-certificates", "gcc", "libc6-dev", "libvirt-dev", "pkg-config", "python3-dev", "python3-venv")

# To build trees and images and to start hosts in containers.
DEMO = (
    "curl", "debian-archive-keyring", "dosfstools", "e2fsprogs", "iproute2", "kmod", "mmdebstrap", "mtools",
    "openssh-client", "openssl", "podman", "qemu-utils", "runc", "syslinux", "syslinux-common", "util-linux",
)  # fmt: skip

# To run libvirt, PostgreSQL and guests on the machine itself.
TEST = (
    "busybox-static", "ipxe-qemu", "iputils-ping", "libvirt-clients", "libvirt-daemon-driver-qemu",
    "libvirt-daemon-system", "libxml2-utils", "openssh-server", "postgresql", "python3-libvirt", "qemu-system-x86",
    "seabios", "smartmontools", "xorriso",
)  # fmt: skip

# What figures are taken beside: Ganeti's allocator and balancer.
BENCH = ("ganeti-htools-3.0",)

GROUPS = {"python": PYTHON, "demo": DEMO, "test": TEST, "bench": BENCH}
LISTS_ARE_OLD_AFTER_S = 24 * 3600


def packages(groups: list[str]) -> list[str]:
    """All packages of the named groups, sorted."""
    return sorted({name for group in groups for name in GROUPS[group]})


def missing(names: list[str]) -> list[str]:
    """Those of `names` that aren't installed."""
    form = "${Package} ${db:Status-Status}\n"
    listed = subprocess.run(
        ["dpkg-query", "--show", f"--showformat={form}", *names], check=False, capture_output=True, text=True
    )
    installed = {line.split()[0] for line in listed.stdout.splitlines() if line.endswith(" installed")}
    return [name for name in names if name not in installed]


def install(names: list[str]) -> None:
    """Install `names`, without the packages they merely recommend; needs root."""
    apt_get("--yes", "--no-install-recommends", "install", *names)


def refresh_lists() -> bool:
    """Fetch apt's package lists when they are absent or a day old; false when that failed.

    Images are built from what the lists name, and mirrors drop the versions that old lists name.
    """
    # The files in it carry the mirror's times; the directory's own is when apt last wrote here.
    lists = Path("/var/lib/apt/lists")
    fetched = any(lists.glob("*_Packages*")) and time.time() - lists.stat().st_mtime < LISTS_ARE_OLD_AFTER_S
    if fetched:
        return True
    try:
        apt_get("update")
    except subprocess.CalledProcessError:
        return False
    return True


def apt_get(*words: str) -> None:
    """Run apt-get without questions; its complaints go to standard error."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "--quiet=2", "-o", "DPkg::Lock::Timeout=300", *words]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


def main() -> int:
    """Say which Debian packages are missing, or install them."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--install", action="store_true", help="install what is missing (as root)")
    action.add_argument("--check", action="store_true", help="only say what is missing; ends with 1 if anything is")
    parser.add_argument("--group", action="append", choices=sorted(GROUPS), help="default: all groups")
    arguments = parser.parse_args()
    absent = missing(packages(arguments.group or sorted(GROUPS)))
    if absent:
        print(f"packages: missing {' '.join(absent)}", file=sys.stderr, flush=True)
    if arguments.check:
        return 1 if absent else 0
    return _install(absent)


def _install(absent: list[str]) -> int:
    if os.geteuid() != 0:
        if absent:
            print("packages: installing them needs root", file=sys.stderr)
        return 1 if absent else 0
    fresh = refresh_lists()
    if absent:
        install(absent)
    elif not fresh:
        print("packages: apt's lists could not be refreshed; going on with the old ones", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
