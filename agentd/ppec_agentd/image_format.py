# SPDX-License-Identifier: Apache-2.0
"""What an image file says of itself, read from its header alone.

Source: QEMU's docs/interop/qcow2.txt. A qcow2 file may name other files (a backing file, an external data file), which
QEMU would open on the host: an image is somebody's upload, so one that does is refused. A raw image that starts like
a qcow2 is refused too: whoever probes its format would be led to the same place.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO

from ppec_contract.errors import PpecError

_MAGIC = b"QFI\xfb"
# magic, version, backing file's offset and length, cluster bits, virtual size, encryption method
_HEADER = struct.Struct(">4sIQIIQI")
_INCOMPATIBLE_FEATURES = struct.Struct(">Q")
_EXTERNAL_DATA_FILE = 1 << 2
# QEMU's own limit.
_LONGEST_NAME = 1023


def virtual_size_bytes(path: Path, image_format: str, subject: str) -> int:
    """The size of the disk a guest would see. Raises `image.invalid`."""
    with path.open("rb") as file:
        head = file.read(80)
    is_qcow2 = head.startswith(_MAGIC)
    if is_qcow2 != (image_format == "qcow2"):
        raise _invalid(subject, f"it is said to be {image_format} and {'is' if is_qcow2 else 'is not'} a qcow2 file")
    return _qcow2_size(head, subject) if is_qcow2 else path.stat().st_size


def backing_file_name(file: BinaryIO) -> bytes | None:
    """What a qcow2 file says it is built on, as it is written there; empty for nothing, None for no qcow2 file.

    Raises OSError for a header that is cut short, or whose name can't be where it says.
    """
    file.seek(0)
    head = file.read(_HEADER.size)
    if not head.startswith(_MAGIC):
        return None
    if len(head) < _HEADER.size:
        raise OSError(f"{file.name}: the qcow2 header is cut short")
    _, _, offset, length, *_ = _HEADER.unpack(head)
    if not offset:
        return b""
    size_bytes = file.seek(0, os.SEEK_END)
    # Before anything is done with them: they go up to 2**64, a seek not even to 2**63.
    if length > _LONGEST_NAME or offset < _HEADER.size or offset + length > size_bytes:
        where = f"{length} bytes at {offset} in a file of {size_bytes}"
        raise OSError(f"{file.name}: the qcow2 header can't be right, its backing file's name has {where}")
    file.seek(offset)
    name = file.read(length)
    if len(name) < length:
        raise OSError(f"{file.name}: the qcow2 file was cut short meanwhile")
    return name


def _qcow2_size(head: bytes, subject: str) -> int:
    if len(head) < 80:
        raise _invalid(subject, "the qcow2 header is cut short")
    _, version, backing_offset, _, _, size, encryption = _HEADER.unpack_from(head)
    if version not in (2, 3):
        raise _invalid(subject, f"qcow2 version {version} is unknown")
    if backing_offset:
        raise _invalid(subject, "it names a backing file")
    if encryption:
        raise _invalid(subject, "it is encrypted")
    if version == 3 and _INCOMPATIBLE_FEATURES.unpack_from(head, 72)[0] & _EXTERNAL_DATA_FILE:
        raise _invalid(subject, "it names an external data file")
    return int(size)


def _invalid(subject: str, why: str) -> PpecError:
    return PpecError(
        "image.invalid", f"{subject} can't be used: {why}", hint="Import a self-contained image.", subject=subject
    )
