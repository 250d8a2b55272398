# SPDX-License-Identifier: Apache-2.0
"""The disk of an emulated bare-metal machine: Debian as its installer would leave it, with kernel and initrd beside it.

Unlike the host tree of the containers it has a kernel, udev and all that acts on real hardware. What makes one machine
itself (keys, network) comes on a second, tiny disk: a tar archive that is unpacked over the root before the network is
set up. So the large disk is built once, and every run writes into an overlay of its own.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from ppec_lab import host_tree
from ppec_lab.cache import cached, recipe_hash, say
from ppec_lab.debian_tree import TreeRecipe, build_tree

# Room for releases, images and the guests' disks, which are sparse overlays.
SPARE_MIB = 4096
FILE_SYSTEM = ("-q", "-t", "ext4", "-L", "root", "-E", "lazy_itable_init=1")
# virtio-blk cuts a serial after 20 bytes; udev names the disk after it.
SEED_SERIAL = "ppec-seed"
# How systemd spells /dev/disk/by-id/virtio-ppec-seed.
SEED_DEVICE = "dev-disk-by\\x2did-virtio\\x2dppec\\x2dseed.device"

SEED_UNIT = f"""\
[Unit]
Description=What makes this machine itself, from its second disk
DefaultDependencies=no
Requires={SEED_DEVICE}
After={SEED_DEVICE} local-fs.target
Before=network-pre.target systemd-networkd.service ssh.service sysinit.target
Wants=network-pre.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/bin/tar --extract --no-same-owner --file /dev/disk/by-id/virtio-{SEED_SERIAL} --directory /

[Install]
WantedBy=sysinit.target
"""

# Only what this machine has: the fewer modules, the less for an emulated CPU to unpack.
INITRAMFS = "MODULES=list\nCOMPRESS=lz4\nRESUME=none\n"
INITRAMFS_MODULES = "virtio_pci\nvirtio_blk\next4\n"

RECIPE = TreeRecipe(
    name="bare-metal disk",
    packages=(
        *host_tree.RECIPE.packages,
        "apparmor", "e2fsprogs", "initramfs-tools", "linux-image-cloud-amd64", "lz4", "numactl", "pciutils", "udev",
    ),
    early_files={
        "/etc/initramfs-tools/conf.d/ppec": INITRAMFS,
        "/usr/share/initramfs-tools/modules.d/ppec": INITRAMFS_MODULES,
    },
    files={
        "/etc/machine-id": "",
        "/etc/resolv.conf": "",
        # Before libvirtd starts: else it finds no KVM, and asks QEMU for its capabilities twice.
        "/etc/modules-load.d/ppec-lab.conf": "kvm_amd\n",
        "/etc/fstab": "/dev/vda / ext4 errors=remount-ro 0 0\n",
        "/etc/ssh/sshd_config.d/ppec-lab.conf": host_tree.SSHD,
        "/etc/systemd/system/ppec-seed.service": SEED_UNIT,
    },
    enabled_units=("systemd-networkd.service", "ppec-seed.service"),
    masked_units=(
        "systemd-networkd-wait-online.service", "apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer",
        "e2scrub_all.timer", "fstrim.timer", "getty.target",
    ),
    removed=host_tree.RECIPE.removed,
)  # fmt: skip


@dataclass(frozen=True)
class BareMetalDisk:
    """`root` is a raw ext4 file system that nobody may write to: runs lay overlays on it."""

    root: Path
    kernel: Path
    initrd: Path


def bare_metal_disk() -> BareMetalDisk:
    """The disk from the cache, built there when the recipe or a package has changed. Needs root."""
    digest = recipe_hash(RECIPE.digest(), repr((SPARE_MIB, FILE_SYSTEM)))
    directory = cached(f"bare-metal-{digest}", _build)
    return BareMetalDisk(directory / "root.raw", directory / "vmlinuz", directory / "initrd.img")


def _build(scratch: Path) -> Path:
    tree, finished = scratch / "tree", scratch / "bare-metal"
    tree.mkdir()
    finished.mkdir()
    build_tree(RECIPE, tree)
    for pattern, name in (("vmlinuz-*", "vmlinuz"), ("initrd.img-*", "initrd.img")):
        (found,) = (tree / "boot").glob(pattern)
        shutil.copyfile(found, finished / name)
    say("bare-metal disk: making the file system")
    used = subprocess.run(
        ["du", "--summarize", "--block-size=1M", str(tree)], check=True, capture_output=True, text=True, timeout=120
    )
    size_mib = int(used.stdout.split()[0]) * 6 // 5 + SPARE_MIB
    command = ["mke2fs", *FILE_SYSTEM, "-d", str(tree), str(finished / "root.raw"), f"{size_mib}M"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=600)
    return finished


def main() -> None:
    """Build the bare-metal machine's disk, or take it from the cache, and print its path."""
    argparse.ArgumentParser(description=main.__doc__).parse_args()
    print(bare_metal_disk().root.parent)


if __name__ == "__main__":
    main()
