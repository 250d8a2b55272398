# SPDX-License-Identifier: Apache-2.0
"""The small guest: an ordinary bootable disk, up in seconds even on an emulated CPU.

Debian's cloud kernel with our own few-megabyte userland (guest/init): it applies a NoCloud seed, answers ping and HTTP
on port 8000, says ``ppec-guest ready <hostname> <address>`` on the serial console, and powers off on the ACPI button.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from ppec_lab import boot_disk, initramfs
from ppec_lab.cache import cached, recipe_hash, say
from ppec_lab.debian_archive import Candidate, candidate, cloud_kernel, unpack

GUEST_DIR = Path(__file__).with_name("guest")
# One CPU, whatever the domain has: QEMU 7.2 gives each a thread, and now and then dies of SIGSEGV when one CPU maps a
# PCI device, as every boot does, while another writes to its interrupt controller (see the traps in lab/README.md).
COMMAND_LINE = "console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check maxcpus=1"


def guest_image() -> Path:
    """The image's path in the cache, built there when the recipe or a package has changed."""
    kernel, busybox = cloud_kernel(), candidate("busybox-static")
    return cached(f"guest-{_recipe(kernel, busybox)}.qcow2", lambda scratch: _build(scratch, kernel, busybox))


def _recipe(kernel: Candidate, busybox: Candidate) -> str:
    sources = [GUEST_DIR / "init", GUEST_DIR / "flatten.awk", GUEST_DIR / "network.awk"]
    sources += [Path(module.__file__ or "") for module in (boot_disk, initramfs)] + [Path(__file__)]
    return recipe_hash(f"{kernel} {busybox}", *(source.read_bytes() for source in sources))


def _build(scratch: Path, kernel: Candidate, busybox: Candidate) -> Path:
    say(f"guest image: {kernel.name} with {busybox.name}")
    kernel_tree, busybox_tree = unpack(kernel, scratch), unpack(busybox, scratch)
    (vmlinuz,) = (kernel_tree / "boot").glob("vmlinuz-*")
    archive = scratch / "initrd.img"
    archive.write_bytes(
        initramfs.build_initramfs((busybox_tree / "bin/busybox").read_bytes(), kernel_tree / "lib/modules", GUEST_DIR)
    )
    raw = boot_disk.build_boot_disk(scratch, boot_disk.BootFiles(vmlinuz, archive, COMMAND_LINE))
    image = boot_disk.to_qcow2(raw, scratch / "guest.qcow2")
    say(f"guest image: {image.stat().st_size // 1024**2} MiB")
    return image


def main() -> None:
    """Build, or take from the cache, and print the path; ``--output`` copies the image there."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    image = guest_image()
    if arguments.output:
        shutil.copyfile(image, arguments.output)
        image = arguments.output
    print(image)


if __name__ == "__main__":
    main()
