# SPDX-License-Identifier: Apache-2.0
"""Bootable disk images put together from files: no loop device, no mount, no root.

Layout: an MBR with SYSLINUX's boot code, an active FAT partition with the boot loader, kernel and initramfs, and
optionally a second partition that is given as a ready file system image.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

MBR_CODE = Path("/usr/lib/syslinux/mbr/mbr.bin")
SECTOR = 512
# Partitions start and end on whole MiB.
ALIGN = 1024 * 1024
FAT16_LBA, LINUX = 0x0E, 0x83
# The disk's signature makes PARTUUID=50504543-02 the name of the second partition in any guest.
DISK_SIGNATURE = 0x50504543
ROOT_PARTUUID = f"{DISK_SIGNATURE:08x}-02"


@dataclass(frozen=True)
class BootFiles:
    """Kernel, initramfs and the kernel's command line."""

    kernel: Path
    initramfs: Path
    command_line: str


def build_boot_disk(scratch: Path, boot: BootFiles, root: Path | None = None) -> Path:
    """Write ``scratch/disk.raw`` with the boot partition and, if given, `root` as the second partition."""
    fat = _boot_partition(scratch, boot)
    partitions = [(fat, FAT16_LBA)] + ([(root, LINUX)] if root else [])
    disk = scratch / "disk.raw"
    start = ALIGN
    table = b""
    with disk.open("wb") as out:
        for path, kind in partitions:
            size = _aligned(path.stat().st_size)
            table += _partition_entry(active=not table, kind=kind, start=start, size=size)
            _copy_at(path, out.fileno(), start)
            start += size
        out.truncate(start)
        out.seek(0)
        code = MBR_CODE.read_bytes()[:440].ljust(440, b"\0")
        out.write(code + struct.pack("<IH", DISK_SIGNATURE, 0) + table.ljust(64, b"\0") + b"\x55\xaa")
    return disk


def to_qcow2(raw: Path, target: Path, *, compress: bool = False) -> Path:
    """Convert a raw image; compressed ones are smaller to ship and slower to read."""
    flags = ["-c"] if compress else []
    subprocess.run(
        ["qemu-img", "convert", *flags, "-f", "raw", "-O", "qcow2", str(raw), str(target)],
        check=True,
        timeout=600,
    )
    return target


def _boot_partition(scratch: Path, boot: BootFiles) -> Path:
    config = scratch / "syslinux.cfg"
    config.write_text(
        f"DEFAULT linux\nPROMPT 0\nLABEL linux\n  LINUX /vmlinuz\n  INITRD /initrd.img\n  APPEND {boot.command_line}\n"
    )
    image = scratch / "boot.fat"
    payload = boot.kernel.stat().st_size + boot.initramfs.stat().st_size
    # FAT16 wants a few thousand clusters, whatever it holds; 2 MiB more are room for the loader and the tables.
    size = max(_aligned(payload + 2 * ALIGN), 16 * ALIGN)
    with image.open("wb") as out:
        out.truncate(size)
    hidden = str(ALIGN // SECTOR)
    _run("mkfs.vfat", "-F", "16", "-h", hidden, "-i", f"{DISK_SIGNATURE:08x}", "-n", "PPECBOOT", str(image))
    _run("syslinux", "--install", str(image))
    for source, name in ((boot.kernel, "vmlinuz"), (boot.initramfs, "initrd.img"), (config, "syslinux.cfg")):
        _run("mcopy", "-i", str(image), str(source), f"::/{name}")
    return image


def _partition_entry(*, active: bool, kind: int, start: int, size: int) -> bytes:
    # Cylinders, heads and sectors are given as "too large to say": all boot code used here goes by block number.
    chs = b"\xfe\xff\xff"
    return struct.pack("<B3sB3sII", 0x80 if active else 0, chs, kind, chs, start // SECTOR, size // SECTOR)


def _copy_at(source: Path, target: int, offset: int) -> None:
    with source.open("rb") as data, os.fdopen(os.dup(target), "wb") as out:
        out.seek(offset)
        shutil.copyfileobj(data, out, ALIGN)


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def _run(*argv: str) -> None:
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=300, env=_build_environment())
    if done.returncode:
        raise RuntimeError(f"{argv[0]} failed: {(done.stderr or done.stdout).strip()}")


def _build_environment() -> dict[str, str]:
    """mkfs.vfat and mtools take their clock from here, so that a rebuild gives the same bytes."""
    return {"SOURCE_DATE_EPOCH": "0", **os.environ, "MTOOLS_SKIP_CHECK": "1"}
