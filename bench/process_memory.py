# SPDX-License-Identifier: Apache-2.0
"""The memory of a process as a host of its own would have it, from proc(5) smaps.

The kernel's PSS divides what is shared by all the processes of the machine that share it, and so tells on a machine
with many Pythons a smaller figure than on a host. Here a file counts by the processes named alone: what only this
process maps counts whole.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

_MAPPING = re.compile(r"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+\s*(.*)$")


def parse_smaps(text: str) -> tuple[int, Counter[str]]:
    """KiB of its own (heap, stacks, what it wrote into), and KiB of pages of each file."""
    own, files, name = 0, Counter[str](), ""
    for line in text.splitlines():
        if mapping := _MAPPING.match(line):
            name = mapping[1]
            continue
        kind, _, rest = line.partition(":")
        if kind == "Rss" and name.startswith("/"):
            files[name] += int(rest.split()[0])
        elif kind == "Rss":
            own += int(rest.split()[0])
        elif kind == "Anonymous" and name.startswith("/"):
            own += int(rest.split()[0])
            files[name] -= int(rest.split()[0])
    return own, files


def memory_mib(pid: int, beside: Iterable[int]) -> tuple[float, float]:
    """What a host with `beside` has less of because of this process, and its resident set."""
    own, files = parse_smaps(_smaps(pid))
    others = [parse_smaps(_smaps(other))[1] for other in beside if other != pid]
    share = sum(kib / (1 + sum(name in other for other in others)) for name, kib in files.items())
    return (own + share) / 1024, (own + files.total()) / 1024


def _smaps(pid: int) -> str:
    return Path(f"/proc/{pid}/smaps").read_text()
