# SPDX-License-Identifier: Apache-2.0
"""Ends everything a process started, including what detached itself.

Ansible's workers start sessions of their own, so killing a process group misses them. A *child subreaper* inherits
every orphan below it instead of init: whoever is one can end them all and know that none is left.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Makes this process the parent of all its orphaned descendants (prctl(2)); children don't inherit the role."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def children() -> list[int]:
    """Living and dead children of this (single-threaded) process."""
    pid = os.getpid()
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def end_all() -> int:
    """Kills and reaps every child until none is left; orphans of the killed become children and go the same way."""
    ended = 0
    while True:
        for pid in children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return ended
        ended += 1
