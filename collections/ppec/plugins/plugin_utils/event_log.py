# Copyright (c) 2026, PPEC contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A run's event file: one JSON line per event, appended by many workers at once."""

from __future__ import annotations

import json
import os
import time


class EventLog:
    """Appends the events of one host.

    O_APPEND and one write per line keep the lines of several processes whole without a lock.
    """

    def __init__(self, path, host, clock=time.time):
        self._host = host
        self._clock = clock
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def append(self, **event):
        """One of accepted=True, progress=…, result=…, problem=… or view=…, as the contract's `RunEvent` has them."""
        line = {"host": self._host, "at_unix_ms": int(self._clock() * 1000), **event}
        data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        if os.write(self._file, data) != len(data):
            raise OSError("the event file took only a part of a line; is its file system full?")

    def close(self):
        os.close(self._file)
