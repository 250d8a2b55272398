# SPDX-License-Identifier: Apache-2.0
"""The user's terminal while a console is open in it: every key goes to the guest, and it is put back at the end."""

from __future__ import annotations

import os
import signal
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

# What would end us without a word, and leave the terminal raw.
_DEADLY = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class Ended(BaseException):
    """A signal ends the program."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def raw(handle: int) -> Iterator[None]:
    """Raw for the time of the block, if it is a terminal. Of what ends a program only SIGKILL leaves it so."""
    if not os.isatty(handle):
        yield
        return
    before = termios.tcgetattr(handle)
    handlers = {number: signal.signal(number, _end) for number in _DEADLY}
    try:
        tty.setraw(handle)
        yield
    finally:
        # Keys that were typed for the guest are no command for the shell.
        with suppress(termios.error):  # It may have gone itself.
            termios.tcsetattr(handle, termios.TCSAFLUSH, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:
    raise Ended(number)
