# SPDX-License-Identifier: Apache-2.0
"""Which images a disk needs: its backing chain, followed from the disk to its end.

`Chains` decides, over whatever reads a file for it; `read_disk` is the one that reads. What can't be told, because a
file can't be read, is not here, or names what is no file of this host, is kept in `Chains.untold`: such a disk may be
built on any image.

What is opened as raw is never read, for a guest writes there as it likes; it is built on nothing, whatever it holds.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ppec_agentd.hypervisor import DiskFormat, ObservedDisk
from ppec_agentd.image_files import IMAGE_NAME
from ppec_agentd.image_format import BuiltOn, built_on

# libvirt's own limit; QEMU has none.
LONGEST_CHAIN = 200
_RAW: DiskFormat = "raw"
# Those whose chains are followed; an unknown one (empty) is whatever its file says.
_FOLLOWED = frozenset({"", _RAW, "qcow2", "qcow"})
# Of the other formats that know of backing files, or of parts in files of their own: QED, VMDK (two, and a text that
# describes one), VHD, VHDX.
_NOT_FOLLOWED = (b"QED\0", b"KDMV", b"COWD", b"# Disk", b"conectix", b"vhdxfile")
# Of a disk in another format; the description that stands for a disk on a fake host is far shorter, too.
_HEAD_BYTES = 65536
_SHA256 = re.compile(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")
# As QEMU tells a protocol ("json:", "nbd:", "file:") from a path.
_PROTOCOL = re.compile(r"[^/]*:")


def names_in(text: str) -> frozenset[str]:
    """Every sha256 in a path or a disk's backing file name, however that is written (`json:`, `file:`, relative)."""
    return frozenset(_SHA256.findall(text))


def named_by(path: str, name: str) -> str | None:
    """The path of a file that the file at `path` names, as QEMU finds it; None for what is no path at all."""
    if not name or "\0" in name or _PROTOCOL.match(name):
        return None
    return str(Path(path).parent / name)


@dataclass(slots=True)
class Chains:
    """Follows disks' chains and collects what they say: `named`, the sha256s, and `untold`, the reasons why a disk may
    be built on others. `read` answers what a file is built on, or the head of one in another format; it raises OSError.
    """

    read: Callable[[str], BuiltOn | bytes]
    named: set[str] = field(default_factory=set)
    untold: set[str] = field(default_factory=set)
    _followed: set[tuple[str, str]] = field(default_factory=set)

    def follow(self, disk: ObservedDisk, *, may_be_gone: bool = False) -> None:
        """`may_be_gone`: it is known who may take the disk away, so that an absent one is gone, not out of sight."""
        self.named |= names_in(disk.path) | names_in(disk.elsewhere)
        if not Path(disk.path).is_absolute():
            if disk.format != _RAW:
                self.untold.add(f"a disk in format {disk.format or 'unknown'} is at {disk.elsewhere or disk.path!r}")
            return
        path, opened_as = disk.path, disk.format
        for _ in range(LONGEST_CHAIN):
            # A symbolic link may hide the name.
            self.named |= names_in(path) | names_in(os.path.realpath(path))
            if opened_as == _RAW or (path, opened_as) in self._followed:
                return
            self._followed.add((path, opened_as))
            below = self._below(path, opened_as, may_be_gone)
            if below is None:
                return
            path, opened_as = below
            may_be_gone = False
        self.untold.add(f"{disk.path!r} is built on more than {LONGEST_CHAIN} files")

    def _below(self, path: str, opened_as: str, may_be_gone: bool) -> tuple[str, str] | None:
        """The backing file and its format; None at the end of what can be told."""
        try:
            found = self.read(path)
        except FileNotFoundError:
            # An image is built on nothing, here or not.
            if not may_be_gone and not IMAGE_NAME.fullmatch(Path(path).name):
                self.untold.add(f"{path!r} is not there, or out of the agent's sight")
            return None
        except OSError as error:
            self.untold.add(f"{path!r} can't be read: {error.strerror or error}")
            return None
        if isinstance(found, bytes):
            self.named |= names_in(found.decode("latin-1"))
            if opened_as not in _FOLLOWED or found.startswith(_NOT_FOLLOWED):
                self.untold.add(f"{path!r} is in a format whose backing files are not followed")
            return None
        if found.data_file:
            self._name(path, found.data_file)
        if not found.backing:
            return None
        backing = self._name(path, found.backing)
        return None if backing is None else (backing, found.backing_format)

    def _name(self, path: str, written: bytes) -> str | None:
        name = os.fsdecode(written)
        self.named |= names_in(name)
        named = named_by(path, name)
        if named is None:
            self.untold.add(f"{path!r} is built on {name!r}")
        else:
            self.named |= names_in(os.path.realpath(named))
        return named


def read_disk(path: str) -> BuiltOn | bytes:
    """For `Chains`: reads a file or a block device; nothing else can be built on an image. Raises OSError."""
    # Lest a pipe be waited for.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        mode = os.fstat(file.fileno()).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            return b""
        found = built_on(file)
        if found is not None:
            return found
        file.seek(0)
        return file.read(_HEAD_BYTES)
