# SPDX-License-Identifier: Apache-2.0
"""A real Debian cloud image: systemd, cloud-init and ssh, for the demo's ``GUEST=debian`` and end-to-end tests.

Put together from files: mmdebstrap's tree, an ext4 image of it by ``mke2fs -d``, and SYSLINUX in a small FAT partition
that carries the kernel. cloud-init takes a NoCloud seed, grows the root partition to the disk it finds, and says
``Cloud-init ... finished`` on the serial console. A kernel upgraded inside the guest isn't booted: it would have to be
copied to the FAT partition.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path

from ppec_lab import boot_disk
from ppec_lab.cache import cached, recipe_hash, say
from ppec_lab.debian_tree import TreeRecipe, build_tree

# Room besides the content, for logs and cloud-init's first minute; the root then grows to the disk.
SPARE_MIB = 192
ROOT_UUID = "70706563-0000-4000-8000-000000000001"
# One CPU, however many the domain has: see the README's traps (QEMU 7.2 may crash under several emulated ones).
COMMAND_LINE = f"root=PARTUUID={boot_disk.ROOT_PARTUUID} ro console=ttyS0 quiet net.ifnames=0 no_timer_check maxcpus=1"

CLOUD_CFG = """\
# Only a NoCloud seed is looked for: probing for clouds would wait for servers that aren't there.
datasource_list: [NoCloud]
# One kind of host key: an emulated CPU spends many seconds on the large primes of the others.
ssh_genkeytypes: [ed25519]
# No locale is generated and no package mirror asked.
locale: C.UTF-8
apt:
  preserve_sources_list: true
"""

# Drivers a guest of ours can meet, in place of all that a machine could have: less for an emulated CPU to unpack.
INITRAMFS = "MODULES=list\nCOMPRESS=lz4\nRESUME=none\n"
INITRAMFS_MODULES = "virtio_pci\nvirtio_blk\nvirtio_scsi\nsd_mod\next4\n"

RECIPE = TreeRecipe(
    name="debian guest",
    packages=(
        "cloud-guest-utils", "cloud-init", "dbus", "e2fsprogs", "fdisk", "initramfs-tools", "iproute2", "iputils-ping",
        "kmod", "linux-image-cloud-amd64", "lz4", "netplan.io", "openssh-server", "python3", "qemu-guest-agent", "sudo",
        "systemd", "systemd-resolved", "systemd-sysv", "udev",
    ),
    early_files={
        "/etc/initramfs-tools/conf.d/ppec": INITRAMFS,
        "/usr/share/initramfs-tools/modules.d/ppec": INITRAMFS_MODULES,
    },
    files={
        "/etc/machine-id": "",
        "/etc/hostname": "debian\n",
        "/etc/fstab": f"PARTUUID={boot_disk.ROOT_PARTUUID} / ext4 errors=remount-ro,discard 0 1\n",
        "/etc/cloud/cloud.cfg.d/90_ppec.cfg": CLOUD_CFG,
    },
    enabled_units=("systemd-networkd.service",),
    masked_units=("apt-daily.timer", "apt-daily-upgrade.timer", "e2scrub_all.timer", "fstrim.timer"),
    removed=("/etc/ssh/ssh_host_*", "/var/lib/apt/lists/*_*", "/var/cache/apt/archives/*.deb"),
)  # fmt: skip


def debian_guest_image() -> Path:
    """The image's path in the cache, built there when the recipe or a package has changed. Needs root."""
    sources = [Path(__file__), Path(boot_disk.__file__ or "")]
    digest = recipe_hash(RECIPE.digest(), *(source.read_bytes() for source in sources))
    return cached(f"debian-guest-{digest}.qcow2", _build)


def _build(scratch: Path) -> Path:
    tree = scratch / "tree"
    tree.mkdir()
    build_tree(RECIPE, tree)
    (kernel,) = (tree / "boot").glob("vmlinuz-*")
    (initramfs,) = (tree / "boot").glob("initrd.img-*")
    boot = boot_disk.BootFiles(kernel, initramfs, COMMAND_LINE)
    raw = boot_disk.build_boot_disk(scratch, boot, _root_file_system(tree, scratch / "root.ext4"))
    say("debian guest: compressing the image")
    image = boot_disk.to_qcow2(raw, scratch / "debian-guest.qcow2", compress=True)
    say(f"debian guest: {image.stat().st_size // 1024**2} MiB")
    return image


def _root_file_system(tree: Path, image: Path) -> Path:
    used = subprocess.run(
        ["du", "--summarize", "--block-size=1M", str(tree)], check=True, capture_output=True, text=True, timeout=120
    )
    # A fifth more for inodes and the journal.
    size_mib = int(used.stdout.split()[0]) * 6 // 5 + SPARE_MIB
    options = ["-q", "-t", "ext4", "-L", "root", "-U", ROOT_UUID, "-E", f"hash_seed={ROOT_UUID},lazy_itable_init=1"]
    subprocess.run(["mke2fs", *options, "-d", str(tree), str(image), f"{size_mib}M"], check=True, timeout=600)
    return image


def main() -> None:
    """Build, or take from the cache, and print the path; ``--output`` copies the image there."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    image = debian_guest_image()
    if arguments.output:
        shutil.copyfile(image, arguments.output)
        image = arguments.output
    print(image)


if __name__ == "__main__":
    main()
