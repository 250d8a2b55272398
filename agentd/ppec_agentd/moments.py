# SPDX-License-Identifier: Apache-2.0
"""The order in which this agent looked at its host: what it answers and what it reports go to the orchestrator by two
ways, of which either may be the slower one."""

from __future__ import annotations

import time

from ppec_contract.vm import Moment


class Moments:
    """The moments of one agent process. A count and no clock: two looks are never at the same moment.

    Used on the event loop's thread only.
    """

    def __init__(self) -> None:
        self.started_at_unix_ms = time.time_ns() // 1_000_000
        self._tick = 0
        self._observed_tick = 0

    def before_snapshot(self) -> int:
        """To be taken before the first look: whatever is observed from now on is later."""
        self._tick += 1
        return self._tick

    def observed(self) -> Moment:
        """To be taken after the last look at a VM that an answer speaks of: every snapshot before this is older."""
        self._tick += 1
        self._observed_tick = self._tick
        return Moment(agent_started_at_unix_ms=self.started_at_unix_ms, tick=self._tick)

    def observed_since(self, snapshot_tick: int) -> bool:
        """Whether an answer was given of which that snapshot may not know."""
        return self._observed_tick > snapshot_tick
