# Copyright (c) 2026, PPEC contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A point in time by which a whole call has to be over, however slowly its bytes trickle in."""

from __future__ import annotations

import time

from ansible_collections.ppec.cloud.plugins.module_utils.problem import ProblemError


class Deadline:
    """`seconds` from now, on the monotonic clock."""

    def __init__(self, seconds, clock=time.monotonic):
        self._clock = clock
        self._seconds = seconds
        self._end = clock() + seconds

    def left_s(self):
        """Seconds left; raises `request.deadline_exceeded` when there are none."""
        left = self._end - self._clock()
        if left <= 0:
            raise ProblemError(
                "request.deadline_exceeded",
                f"the call was not over after {self._seconds:g} s",
                hint="Repeat it with the same operation id: what is done already is not done again.",
            )
        return left

    def allows(self, seconds):
        """Whether there is more time left than `seconds`."""
        return self._end - self._clock() > seconds
