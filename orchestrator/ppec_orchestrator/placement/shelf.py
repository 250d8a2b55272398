# SPDX-License-Identifier: Apache-2.0
"""Candidates kept from one VM and one plan to the next, within a bound of memory: an LRU cache."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ppec_contract.api_placement import Policy
from ppec_orchestrator.placement.candidates import Candidates
from ppec_orchestrator.placement.request import Network, Profile
from ppec_orchestrator.placement.workspace import Workspace

# Of all candidates together. One profile's are of some 1.4 MB on ten thousand hosts of four cells.
MOST_BYTES = 256 * 1024 * 1024
# Of so many parts one is dropped at once, so that not every new profile looks for the one to make room for it.
_PARTS = 4


@dataclass(slots=True)
class _Kept:
    candidates: Candidates
    size: int
    used: int


class Shelf:
    """By profile and policy. Where they become too large the least recently used are dropped, and worked out anew when
    they are asked for again. `dropped` tells that some were: what is remembered of them elsewhere is to be asked for
    again, for what is dropped is no longer told of addresses that ran out."""

    def __init__(self, workspace: Workspace, most_bytes: int = MOST_BYTES) -> None:
        self._workspace = workspace
        self._most_bytes = most_bytes
        self._kept: dict[tuple[Profile, Policy], _Kept] = {}
        self._users: Counter[tuple[Network, ...]] = Counter()
        self._clock = 0
        self.size = 0
        self.dropped = 0

    def current(self, profile: Profile, policy: Policy) -> Candidates:
        self._clock += 1
        kept = self._kept.get((profile, policy))
        if kept is None:
            return self._made(profile, policy)
        kept.used = self._clock
        kept.candidates.refresh()
        return kept.candidates

    def holds(self, profiles: int) -> bool:
        """Whether so many profiles have room beside each other, were they of the size of those that are kept."""
        return profiles * self.size * _PARTS <= self._most_bytes * (_PARTS - 1) * len(self._kept)

    def clear(self) -> None:
        """The workspace was loaded anew."""
        self._kept.clear()
        self._users.clear()
        self.size = 0
        self.dropped += 1

    def _made(self, profile: Profile, policy: Policy) -> Candidates:
        candidates = Candidates(self._workspace, profile, policy)
        self._kept[profile, policy] = _Kept(candidates, candidates.size, self._clock)
        self._users[profile.networks] += 1
        self.size += candidates.size
        if self.size > self._most_bytes:
            self._make_room()
        return candidates

    def _make_room(self) -> None:
        """Drops all but the last used, up to three quarters of what may be kept; the very last whatever its size."""
        oldest_first = sorted(self._kept, key=lambda key: self._kept[key].used)
        for key in oldest_first[:-1]:
            if self.size * _PARTS <= self._most_bytes * (_PARTS - 1):
                break
            self._drop(*key)
        self.dropped += 1

    def _drop(self, profile: Profile, policy: Policy) -> None:
        self.size -= self._kept.pop((profile, policy)).size
        self._users[profile.networks] -= 1
        if not self._users[profile.networks]:
            del self._users[profile.networks]
            self._workspace.addresses.forget(profile.networks)
