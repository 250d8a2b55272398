# SPDX-License-Identifier: Apache-2.0
"""The small guest's initramfs: busybox, a handful of kernel modules and our init, as a cpio archive.

The archive is written here, in the format of the kernel's Documentation/driver-api/early-userspace/buffer-format.rst
("newc"), because that makes it the same to the byte on every build and needs no root for device nodes.
"""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass, field
from pathlib import Path

# What a guest may be given: disks, NICs, a CD drive, the seed's file systems, the power button.
WANTED_MODULES = (
    "virtio_pci", "virtio_blk", "virtio_net", "virtio_scsi", "virtio-rng", "virtio_balloon", "sd_mod", "sr_mod",
    "ata_piix", "isofs", "nls_cp437", "nls_ascii", "nls_utf8", "vfat", "button", "evdev",
)  # fmt: skip

# Only the applets that init uses get a link; busybox holds the rest as well.
APPLETS = (
    "acpid", "arping", "awk", "cat", "chmod", "cp", "cut", "dd", "findfs", "hostname", "httpd", "insmod", "ip",
    "mkdir", "mount", "poweroff", "printf", "sh", "sha256sum", "sleep", "tr", "uevent", "umount",
)  # fmt: skip


@dataclass
class CpioArchive:
    """Collects entries and renders them; owner root, times zero, inode numbers in order."""

    _chunks: list[bytes] = field(default_factory=list)
    _inode: int = 0

    def directory(self, path: str) -> None:
        self._entry(path, stat.S_IFDIR | 0o755, b"")

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        self._entry(path, stat.S_IFREG | mode, data)

    def link(self, path: str, target: str) -> None:
        self._entry(path, stat.S_IFLNK | 0o777, target.encode())

    def device(self, path: str, major: int, minor: int) -> None:
        self._entry(path, stat.S_IFCHR | 0o600, b"", (major, minor))

    def render(self) -> bytes:
        """The whole archive with its trailer."""
        self._entry("TRAILER!!!", 0, b"")
        return b"".join(self._chunks)

    def _entry(self, path: str, mode: int, data: bytes, device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        name = path.encode() + b"\0"
        numbers = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name), 0)
        header = b"070701" + b"".join(b"%08X" % number for number in numbers)
        self._chunks += [_padded(header + name), _padded(data)]


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)


def module_order(modules_root: Path) -> list[Path]:
    """The wanted modules and all they depend on, each after what it needs.

    Reads each module's own ``depends=`` record: the package carries no modules.dep (its installation makes that).
    A wanted module that this kernel has built in, or lacks, is passed over.
    """
    by_name = {path.stem.replace("-", "_"): path for path in sorted(modules_root.rglob("*.ko"))}
    order: list[Path] = []

    def add(name: str) -> None:
        path = by_name.get(name.replace("-", "_"))
        if path is None or path in order:
            return
        for needed in _dependencies(path):
            add(needed)
        order.append(path)

    for name in WANTED_MODULES:
        add(name)
    return order


def _dependencies(module: Path) -> list[str]:
    record = re.search(rb"\0depends=([^\0]*)\0", module.read_bytes())
    return [name for name in record[1].decode().split(",") if name] if record else []


def build_initramfs(busybox: bytes, modules_root: Path, guest_dir: Path) -> bytes:
    """The archive, uncompressed: unpacking a compressed one costs an emulated CPU more than loading it."""
    archive = CpioArchive()
    for directory in ("bin", "dev", "lib", "modules"):
        archive.directory(directory)
    archive.device("dev/console", 5, 1)
    archive.file("init", (guest_dir / "init").read_bytes(), 0o755)
    archive.file("bin/busybox", busybox, 0o755)
    for applet in APPLETS:
        archive.link(f"bin/{applet}", "busybox")
    for script in ("flatten.awk", "network.awk"):
        archive.file(f"lib/{script}", (guest_dir / script).read_bytes())
    modules = module_order(modules_root)
    for module in modules:
        archive.file(f"modules/{module.name}", module.read_bytes())
    archive.file("modules/order", "".join(f"{module.name}\n" for module in modules).encode())
    return archive.render()
