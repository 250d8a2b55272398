# SPDX-License-Identifier: Apache-2.0
"""The root tree of a lab host: Debian with systemd, ssh, libvirt and QEMU, as a bare-metal host would be installed."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

from ppec_lab.cache import cached, recipe_hash, say
from ppec_lab.debian_tree import TreeRecipe, build_tree

# Warmed after the layout; see warm_capabilities.
WARM_SCRIPT = Path(__file__).with_name("warm_capabilities.sh")

JOURNAL = """\
# The kernel's log belongs to the machine outside.
[Journal]
ReadKMsg=no
RuntimeMaxUse=16M
"""

SSHD = """\
PermitRootLogin prohibit-password
PasswordAuthentication no
UseDNS no
"""

# What udev does on a real machine. While QEMU's user can't open a KVM device that QEMU found when probed, libvirt holds
# its cached capabilities for outdated and probes QEMU anew some twenty times in every start of a domain.
DEVICES = """\
z /dev/kvm 0660 root kvm -
"""

RECIPE = TreeRecipe(
    name="host tree",
    packages=(
        "ca-certificates", "curl", "dbus", "iproute2", "ipxe-qemu", "iputils-ping", "kmod", "libvirt-clients",
        "libvirt-daemon-driver-qemu", "libvirt-daemon-system", "nvme-cli", "openssh-server", "openssl", "procps",
        "python3", "python3-apt", "python3-libvirt", "qemu-system-x86", "qemu-utils", "seabios", "smartmontools",
        "systemd", "systemd-sysv",
    ),
    files={
        "/etc/machine-id": "",
        # Empty on purpose: a lab host has no resolver, and an unreachable one costs a migration a minute.
        "/etc/resolv.conf": "",
        "/etc/systemd/journald.conf.d/ppec-lab.conf": JOURNAL,
        "/etc/tmpfiles.d/ppec-lab.conf": DEVICES,
        "/etc/ssh/sshd_config.d/ppec-lab.conf": SSHD,
    },
    # In a privileged container these would act on the machine outside: its devices, its kernel settings, its consoles.
    masked_units=(
        "systemd-udevd.service", "systemd-udevd-kernel.socket", "systemd-udevd-control.socket",
        "systemd-udev-trigger.service", "systemd-sysctl.service", "systemd-modules-load.service",
        "systemd-binfmt.service", "nvmf-autoconnect.service", "nvmefc-boot-connections.service",
        "systemd-remount-fs.service", "systemd-random-seed.service", "systemd-logind.service",
        "getty.target", "console-getty.service", "getty@tty1.service",
        "apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "fstrim.timer",
    ),
    removed=("/etc/ssh/ssh_host_*", "/var/lib/apt/lists/*_*", "/var/cache/apt/archives/*.deb"),
)  # fmt: skip


def host_tree() -> Path:
    """The tree's path in the cache, built there when the recipe or a package has changed. Needs root."""
    digest = recipe_hash(RECIPE.digest(), WARM_SCRIPT.read_bytes())
    return cached(f"host-tree-{digest}", _build)


def _build(scratch: Path) -> Path:
    tree = scratch / "tree"
    tree.mkdir()
    build_tree(RECIPE, tree)
    warm_capabilities(tree)
    return tree


def warm_capabilities(tree: Path) -> None:
    """Have the tree's libvirtd probe its QEMU once, so that no lab host spends seconds of CPU on that again.

    Only time is lost when this fails or the machine's kernel changes: libvirt then probes at its first start.
    """
    say("host tree: asking QEMU for its capabilities once")
    command = ["unshare", "--mount", "--pid", "--net", "--fork", "--kill-child", "--", "sh", str(WARM_SCRIPT)]
    done = subprocess.run([*command, str(tree)], check=False, capture_output=True, text=True, timeout=180)
    if done.returncode:
        say(f"host tree: not warmed: {done.stderr.strip()}")


def main() -> None:
    """Build the host tree, or take it from the cache, and print its path."""
    argparse.ArgumentParser(description=main.__doc__).parse_args()
    print(host_tree())


if __name__ == "__main__":
    main()
