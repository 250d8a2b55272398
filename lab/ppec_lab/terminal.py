# SPDX-License-Identifier: Apache-2.0
"""A program in a terminal, as a person has it: keys go in, the screen's bytes come out, and each wait has a bound."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from typing import Any

SOON_S = 60.0
INTERRUPTIBLE = ("env", "--default-signal=INT")
"""Starts a program that can be interrupted, also where we can't be: a shell has what it starts in the background ignore
the interrupt, and programs inherit that. `env` does it in whichever thread we are, Python in the main one alone."""


class Terminal:
    """Its messages (standard error) are kept apart from the screen. Close it, or use it in a `with`."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._ours, self._theirs = pty.openpty()
        self._before = self.modes()
        self.seen = b""
        self.process = subprocess.Popen(
            [*INTERRUPTIBLE, *command],
            env=dict(environment),
            stdin=self._theirs,
            stdout=self._theirs,
            stderr=subprocess.PIPE,
        )

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def modes(self) -> list[Any]:
        return termios.tcgetattr(self._theirs)

    @property
    def untouched(self) -> bool:
        """Whether it is as it was before the program."""
        return self.modes() == self._before

    def see(self, last: bytes, timeout_s: float = SOON_S) -> bytes:
        """All that was shown, as soon as `last` is in it."""
        until = time.monotonic() + timeout_s
        while last not in self.seen:
            ready, _, _ = select.select([self._ours], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise TimeoutError(f"waited {timeout_s:g} s in vain for {last!r}; on the screen: {self.seen[-500:]!r}")
            self.seen += os.read(self._ours, 4096)
        return self.seen

    def type(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    def end(self, timeout_s: float = SOON_S) -> tuple[int, str]:
        """Waits for the program: its exit code and its messages."""
        _, messages = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, messages.decode()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()
        os.close(self._ours)
        os.close(self._theirs)
