# SPDX-License-Identifier: Apache-2.0
"""An ISO 9660 image of a few files in one folder, with Joliet names. Pure: bytes in, bytes out, nothing of the time.

Sources: ECMA-119 (section numbers below), and the Joliet specification, which adds a second tree whose names are
UCS-2. That is all a seed needs; pycdlib can do everything else too, took 9 MiB of the agent's memory, and stamps the
present into every record.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SECTOR = 2048
_PRIMARY, _SUPPLEMENTARY, _TERMINATOR = 1, 2, 255
_FIRST_DESCRIPTOR = 16
_PATH_TABLES = 19  # little- and big-endian, once per tree
_ROOTS = 23
_FIRST_FILE = 25
_PATH_TABLE_BYTES = 10
_UNSPECIFIED_TIME = b"0" * 16 + b"\0"  # 8.4.26.1
_JOLIET_LEVEL_3 = b"%/E"


@dataclass(frozen=True, slots=True)
class _Extent:
    """Where a file lies: its first sector and its length in bytes."""

    sector: int
    size: int


@dataclass(frozen=True, slots=True)
class _Tree:
    """One of the two views of the same files; `names` are in the order of the extents."""

    number: int
    kind: int
    label: bytes
    names: Sequence[bytes]
    blank: bytes

    @property
    def root(self) -> _Extent:
        return _Extent(_ROOTS + self.number, SECTOR)

    @property
    def path_tables(self) -> tuple[int, int]:
        first = _PATH_TABLES + 2 * self.number
        return first, first + 1


def iso_image(label: str, files: Mapping[str, bytes]) -> bytes:
    """`label` and names are ASCII; at most some twenty files, so that a folder fits one sector (ValueError)."""
    names = sorted(files)
    extents, end = _lay_out([files[name] for name in names])
    trees = (
        # Readers without Joliet see plain numbers: "meta-data" is no name ECMA-119 would allow.
        _Tree(0, _PRIMARY, label.encode("ascii"), [b"FILE%d.;1" % n for n in range(len(names))], b" "),
        _Tree(1, _SUPPLEMENTARY, label.encode("utf-16-be"), [n.encode("utf-16-be") for n in names], b"\0 "),
    )
    image = bytearray(end * SECTOR)
    for tree in trees:
        _put(image, _FIRST_DESCRIPTOR + tree.number, _descriptor(tree, end))
        for sector, byte_order in zip(tree.path_tables, "<>", strict=True):
            _put(image, sector, _path_table(tree.root, byte_order))
        _put(image, tree.root.sector, _folder(tree, extents))
    _put(image, _FIRST_DESCRIPTOR + 2, struct.pack(">B5sB", _TERMINATOR, b"CD001", 1))
    for name, extent in zip(names, extents, strict=True):
        image[extent.sector * SECTOR : extent.sector * SECTOR + extent.size] = files[name]
    return bytes(image)


def _lay_out(contents: Sequence[bytes]) -> tuple[list[_Extent], int]:
    """An extent for each file, and the first sector after them."""
    extents, sector = [], _FIRST_FILE
    for content in contents:
        extents.append(_Extent(sector, len(content)))
        sector += -(-len(content) // SECTOR)
    return extents, sector


def _put(image: bytearray, sector: int, data: bytes) -> None:
    if len(data) > SECTOR:
        raise ValueError(f"{len(data)} bytes do not fit a sector: too many files")
    image[sector * SECTOR : sector * SECTOR + len(data)] = data


def _both16(number: int) -> bytes:
    return struct.pack("<H", number) + struct.pack(">H", number)


def _both32(number: int) -> bytes:
    return struct.pack("<I", number) + struct.pack(">I", number)


def _record(name: bytes, extent: _Extent, *, folder: bool = False) -> bytes:
    """A directory record (9.1): no date, no interleaving, volume 1 of the set."""
    body = b"\0" + _both32(extent.sector) + _both32(extent.size) + bytes(7)
    body += struct.pack("BBB", 2 if folder else 0, 0, 0) + _both16(1) + struct.pack("B", len(name)) + name
    if len(body) % 2 == 0:
        body += b"\0"
    return struct.pack("B", len(body) + 1) + body


def _folder(tree: _Tree, extents: Sequence[_Extent]) -> bytes:
    """The root folder: itself, its parent (itself again), and the files in the order of their names."""
    records = [_record(b"\0", tree.root, folder=True), _record(b"\1", tree.root, folder=True)]
    records += [_record(name, extent) for name, extent in zip(tree.names, extents, strict=True)]
    return b"".join(records)


def _path_table(root: _Extent, byte_order: str) -> bytes:
    """The path table (9.4) of a tree with nothing but a root."""
    return struct.pack(f"{byte_order}BBIHBB", 1, 0, root.sector, 1, 0, 0)


def _descriptor(tree: _Tree, sectors: int) -> bytes:
    """A primary or supplementary volume descriptor (8.4, 8.5)."""

    def text(value: bytes, size: int) -> bytes:
        return (value + tree.blank * size)[:size]

    little, big = tree.path_tables
    escape = _JOLIET_LEVEL_3 if tree.kind == _SUPPLEMENTARY else b""
    return b"".join(
        [
            struct.pack(">B5sBB", tree.kind, b"CD001", 1, 0),
            text(b"", 32) + text(tree.label, 32) + bytes(8),
            _both32(sectors) + escape.ljust(32, b"\0"),
            _both16(1) + _both16(1) + _both16(SECTOR),
            _both32(_PATH_TABLE_BYTES) + struct.pack("<II", little, 0) + struct.pack(">II", big, 0),
            _record(b"\0", tree.root, folder=True),
            text(b"", 4 * 128) + text(b"", 3 * 37),
            _UNSPECIFIED_TIME * 4,
            struct.pack("BB", 1, 0),
        ]
    )
