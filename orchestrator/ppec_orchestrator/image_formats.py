# SPDX-License-Identifier: Apache-2.0
"""What an uploaded file really is, read from its header alone. Pure: bytes in, size or refusal out.

A qcow2 file may name other files (a backing file, an external data file). A hypervisor opens them as root, so an
image that does could hand a tenant any file of the host: such images are refused, never repaired.
Source: QEMU, docs/interop/qcow2.txt.
"""

from __future__ import annotations

import struct
from typing import Final, Literal

from ppec_contract.errors import PpecError
from ppec_contract.vm import MAX_DISK_MIB

ImageFormat = Literal["qcow2", "raw"]
HEADER_BYTES: Final = 512
MIB: Final = 1024 * 1024
_QCOW2 = b"QFI\xfb"
_OTHER_FORMATS: Final = {
    b"QED\x00": "QED",
    b"KDMV": "VMDK",
    b"COWD": "VMDK",
    b"# Disk DescriptorFile": "VMDK",
    b"vhdxfile": "VHDX",
    b"conectix": "VHD",
    b"WithoutFreeSpace": "Parallels",
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
# Incompatible features we know to be harmless: dirty (0), compression type (3), extended L2 entries (4).
_CORRUPT, _EXTERNAL_DATA, _HARMLESS = 1 << 1, 1 << 2, 1 << 0 | 1 << 3 | 1 << 4


def virtual_size_mib(header: bytes, size_bytes: int, claimed: ImageFormat) -> int:
    """The disk's size as the guest sees it, rounded up to MiB. Raises `image.invalid`.

    `header` holds the first `HEADER_BYTES` of the file, or all of a shorter one.
    """
    size = _qcow2_size(header, size_bytes) if claimed == "qcow2" else _raw_size(header, size_bytes)
    rounded = -(-size // MIB)
    if not 1 <= rounded <= MAX_DISK_MIB:
        raise invalid_image(f"its virtual size of {size} bytes is not between 1 byte and {MAX_DISK_MIB} MiB")
    return rounded


def invalid_image(why: str) -> PpecError:
    return PpecError(
        "image.invalid",
        f"the file can't be used as an image: {why}",
        hint="Make a standalone file with `qemu-img convert -O qcow2 IN OUT`.",
        subject="image",
    )


def _raw_size(header: bytes, size_bytes: int) -> int:
    if header.startswith(_QCOW2):
        raise invalid_image("it was given as raw, but it is qcow2")
    for magic, name in _OTHER_FORMATS.items():
        if header.startswith(magic):
            raise invalid_image(f"it was given as raw, but it is {name}")
    if size_bytes == 0 or size_bytes % 512:
        raise invalid_image(f"a raw disk is a whole number of 512-byte sectors, this has {size_bytes} bytes")
    return size_bytes


def _qcow2_size(header: bytes, size_bytes: int) -> int:
    if len(header) < 72 or not header.startswith(_QCOW2):
        raise invalid_image("it was given as qcow2, but has no qcow2 header")
    version, backing_offset, _, cluster_bits, size, crypt, l1_entries, l1_offset = struct.unpack_from(
        ">I Q I I Q I I Q", header, 4
    )
    if version not in (2, 3):
        raise invalid_image(f"qcow2 version {version} is unknown")
    if backing_offset:
        raise invalid_image("it names a backing file")
    if crypt:
        raise invalid_image("it is encrypted")
    if not 9 <= cluster_bits <= 21:
        raise invalid_image(f"its cluster size of 2^{cluster_bits} bytes is out of range")
    if version == 3:
        _check_features(header)
    if l1_offset == 0 or l1_offset + 8 * l1_entries > size_bytes:
        raise invalid_image("it is cut off: its cluster table lies outside the file")
    return int(size)


def _check_features(header: bytes) -> None:
    if len(header) < 104:
        raise invalid_image("its header is cut off")
    (features,) = struct.unpack_from(">Q", header, 72)
    if features & _EXTERNAL_DATA:
        raise invalid_image("it keeps its data in an external file")
    if features & _CORRUPT:
        raise invalid_image("it is marked corrupt")
    if features & ~(_HARMLESS | _CORRUPT | _EXTERNAL_DATA):
        raise invalid_image("it uses features we don't know")
