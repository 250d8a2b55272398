# SPDX-License-Identifier: Apache-2.0
"""What an image file says of itself, read from its header alone.

Source: QEMU's docs/interop/qcow2.txt. A qcow2 file may name other files (a backing file, an external data file), which
QEMU would open on the host: an image is somebody's upload, so one that does is refused. A raw image that starts like
a qcow2 is refused too: whoever probes its format would be led to the same place.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ppec_contract.errors import PpecError

_MAGIC = b"QFI\xfb"
# magic, version, backing file's offset and length, cluster bits, virtual size, encryption method
_HEADER = struct.Struct(">4sIQIIQI")
_EXTERNAL_DATA_FILE = 1 << 2
_V2_HEADER_BYTES = 72
# Version 3's, as far as it is read here.
_HEADER_BYTES = 104
# An extension of the header: type, length of what follows.
_EXTENSION = struct.Struct(">II")
_END, _BACKING_FORMAT, _DATA_FILE_NAME = 0, 0xE2792ACA, 0x44415441
# QEMU's own limits.
_LONGEST_NAME = 1023
_LARGEST_CLUSTER_BITS = 21


def virtual_size_bytes(path: Path, image_format: str, subject: str) -> int:
    """The size of the disk a guest would see. Raises `image.invalid`."""
    with path.open("rb") as file:
        head = file.read(80)
    is_qcow2 = head.startswith(_MAGIC)
    if is_qcow2 != (image_format == "qcow2"):
        raise _invalid(subject, f"it is said to be {image_format} and {'is' if is_qcow2 else 'is not'} a qcow2 file")
    return _qcow2_size(head, subject) if is_qcow2 else path.stat().st_size


@dataclass(frozen=True, slots=True)
class BuiltOn:
    """The files that a qcow2 file names, as they are written there; empty for none. Without a `backing_format` QEMU
    finds out by itself what the backing file is. A data file is always raw."""

    backing: bytes = b""
    backing_format: str = ""
    data_file: bytes = b""


def built_on(file: BinaryIO) -> BuiltOn | None:
    """What a qcow2 file (or one of its forerunner, qcow) is built on; None for a file of another format.

    Raises OSError, without the file's name, for a header that is cut short or can't be right: it may name anything.
    """
    file.seek(0)
    head = file.read(_HEADER_BYTES)
    if not head.startswith(_MAGIC):
        return None
    if len(head) < _HEADER_BYTES:
        raise OSError("the qcow2 header is cut short")
    _, version, offset, length, cluster_bits, *_ = _HEADER.unpack_from(head)
    if version not in (1, 2, 3):
        raise _wrong(f"version {version} is unknown")
    size_bytes = file.seek(0, os.SEEK_END)
    # Before anything is done with them: they go up to 2**64, a seek not even to 2**63.
    if offset and (length > _LONGEST_NAME or offset < _HEADER.size or offset + length > size_bytes):
        where = f"{length} bytes at {offset} in a file of {size_bytes}"
        raise _wrong(f"its backing file's name has {where}")
    named = _extensions(file, head, offset or 1 << min(cluster_bits, _LARGEST_CLUSTER_BITS)) if version > 1 else {}
    data_file = named.get(_DATA_FILE_NAME, b"")
    if version > 2 and _features(head) & _EXTERNAL_DATA_FILE and not data_file:
        raise _wrong("its data is in another file that it doesn't name")
    backing = _part(file, offset, length) if offset else b""
    return BuiltOn(backing, named.get(_BACKING_FORMAT, b"").decode("latin-1"), data_file)


def _extensions(file: BinaryIO, head: bytes, end: int) -> dict[int, bytes]:
    """What stands between the header and the first thing after it, by type. Each begins at a multiple of 8 bytes."""
    _, version, *_ = _HEADER.unpack_from(head)
    at = _V2_HEADER_BYTES if version == 2 else _length(head)
    found: dict[int, bytes] = {}
    while at + _EXTENSION.size <= end:
        kind, length = _EXTENSION.unpack(_part(file, at, _EXTENSION.size))
        if kind == _END:
            break
        at += _EXTENSION.size
        if at + length > end:
            raise _wrong(f"an extension of {length} bytes at {at} goes beyond {end}")
        if kind in (_BACKING_FORMAT, _DATA_FILE_NAME):
            found[kind] = _part(file, at, length)
        at += -(-length // 8) * 8
    return found


def _features(head: bytes) -> int:
    return int.from_bytes(head[72:80], "big")


def _length(head: bytes) -> int:
    """Of version 3's header; one shorter than the specification's is none."""
    return max(int.from_bytes(head[100:104], "big"), _HEADER_BYTES)


def _part(file: BinaryIO, offset: int, length: int) -> bytes:
    file.seek(offset)
    part = file.read(length)
    if len(part) < length:
        raise OSError("the qcow2 file is cut short")
    return part


def _wrong(why: str) -> OSError:
    return OSError(f"the qcow2 header can't be right, {why}")


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
    if version == 3 and _features(head) & _EXTERNAL_DATA_FILE:
        raise _invalid(subject, "it names an external data file")
    return int(size)


def _invalid(subject: str, why: str) -> PpecError:
    return PpecError(
        "image.invalid", f"{subject} can't be used: {why}", hint="Import a self-contained image.", subject=subject
    )
