# SPDX-License-Identifier: Apache-2.0
"""What a check has found. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum


class Level(IntEnum):
    """`NOTE` is worth knowing and nothing to mend; with an `ERROR` the host can't serve."""

    OK = 0
    NOTE = 1
    WARNING = 2
    ERROR = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found on a subject, what was wanted, and what to do. `wanted` and `advice` are empty where all is well.

    `check` is the stable name of the check: a script may go by it, and by nothing that is written for people.
    """

    check: str
    level: Level
    subject: str
    found: str
    wanted: str = ""
    advice: str = ""


def worst(findings: Iterable[Finding]) -> Level:
    return max((finding.level for finding in findings), default=Level.OK)


def exit_code(level: Level) -> int:
    """0: the host can serve; 1: it can, with warnings; 2: it can't."""
    return {Level.WARNING: 1, Level.ERROR: 2}.get(level, 0)
