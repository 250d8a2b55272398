# SPDX-License-Identifier: Apache-2.0
"""A guest of 88 bytes: a boot sector that counts on the serial port, then sends back whatever it is sent.

It writes the numbers from 0 to `lines` - 1, each as eight hex digits and a newline, and is up in about a second on an
emulated CPU.
"""

from __future__ import annotations

import struct
from pathlib import Path

# 16-bit code; `lines` goes in between.
_COUNT = bytes.fromhex(
    "fa bafb03 b003 ee"  # 8 data bits at COM1, whatever the firmware left there
    "6631db"  # ebx = 0
    "b90800"  # line: 8 digits
    "66c1c304 88d8 240f 0430 3c39 7602 0427 e82300 e2eb"  # the highest four bits of ebx as a digit, and so on
    "b00a e81c00"  # a newline
    "6643 6681fb"  # ebx + 1 < lines: next line
)
_ECHO = bytes.fromhex(
    "72d8"
    "bafd03 ec a801 74f8 baf803 ec e80200 ebef"  # echo: wait for a byte, send it, again
    "50 bafd03 ec a820 74f8 58 baf803 ee c3"  # put: wait until the port takes a byte, send al
)


def counting_disk(path: Path, lines: int) -> Path:
    """A raw disk that boots into the guest."""
    code = _COUNT + struct.pack("<I", lines) + _ECHO
    path.write_bytes(code.ljust(510, b"\0") + b"\x55\xaa" + bytes(1024 * 1024 - 512))
    return path


def counted(lines: int) -> bytes:
    """All that it writes before the echo."""
    return b"".join(b"%08x\n" % number for number in range(lines))
