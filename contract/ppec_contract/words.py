# SPDX-License-Identifier: Apache-2.0
"""The texts and lists that a host says of itself: what the contract takes, and how an agent keeps within it.

An orchestrator refuses what is longer, and doesn't cut it: the picture it would store were another than the one whose
digest the agent tells. So agents cut, by `words` and `short`, before a model is made.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, StringConstraints

from ppec_contract.model import printable

LONGEST_SHORT = 256
LONGEST_WORDS = 4096
# Agents keep well below, so that a report with much to say stays within the size of a request.
SAID_WORDS = 1024
MAX_CELLS = 1024
MAX_VMS = 4096
MAX_PARTS = 4096
MAX_DRIFT = 1024
MAX_CHECKS = 512
MAX_FILE_SYSTEMS = 64
MAX_POOLS = 64
MAX_PINS = 4096
MAX_MACS = 256

# A name, a path, a version, a model: one line.
ShortText = Annotated[str, StringConstraints(max_length=LONGEST_SHORT), AfterValidator(printable)]


def _lines(text: str) -> str:
    printable(text.translate(_BREAKS))
    return text


_BREAKS = str.maketrans("\n\r\t", "   ")
# What was found, in words. Agents say it on one line; the first ones said what others' errors say as it was.
Words = Annotated[str, StringConstraints(max_length=LONGEST_WORDS), AfterValidator(_lines)]


def words(text: str, longest: int = SAID_WORDS) -> str:
    """The text on one line and within bounds, the same for the same text. What is left out ends in an ellipsis; what
    is no character (a file's name may be any bytes) or a control character becomes a question mark."""
    line = " ".join(text.split()) if any(c in text for c in "\n\r\t") else text
    shown = "".join("?" if ord(c) < 0x20 or ord(c) == 0x7F or 0xD800 <= ord(c) <= 0xDFFF else c for c in line[:longest])
    return shown if len(line) <= longest else f"{shown[:-1]}…"


def short(text: str) -> str:
    """`words` for a `ShortText`."""
    return words(text, LONGEST_SHORT)
