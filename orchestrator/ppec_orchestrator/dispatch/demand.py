# SPDX-License-Identifier: Apache-2.0
"""How many runs are to stand by: as many as would have been enough of late. Pure; times are seconds, monotonic."""

from __future__ import annotations

import math

LEAST = 2
MOST_STANDING_BY = 8
# A run that stands by has some 40 MiB; after that long without use it is let go.
QUIET_S = 120.0


class Demand:
    """`wanted` grows with every request that found none standing by, up to `most`, and goes back after quiet."""

    def __init__(self, most: int) -> None:
        self._least = min(LEAST, most)
        self._most = most
        self.wanted = self._least
        # How many were never taken in the present span, which ends then.
        self._unused = self.wanted
        self._span_ends_s = math.inf

    def taken(self, left: int) -> None:
        """A request has taken one; so many still stand by."""
        self._unused = min(self._unused, left)

    def missed(self, now_s: float) -> None:
        """A request has found none."""
        self.wanted = min(self.wanted + 1, self._most)
        self._unused = 0
        if self.wanted > self._least:
            self._span_ends_s = min(self._span_ends_s, now_s + QUIET_S)

    def look(self, now_s: float) -> float:
        """Lets go of what a whole span has not used. When to come again; infinity when there is nothing to let go."""
        if now_s >= self._span_ends_s:
            self.wanted = max(self._least, self.wanted - self._unused)
            self._unused = self.wanted
            self._span_ends_s = now_s + QUIET_S if self.wanted > self._least else math.inf
        return self._span_ends_s
