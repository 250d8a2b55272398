# SPDX-License-Identifier: Apache-2.0
"""The policies: each turns the state of a batch into one score per host; the lowest score that fits wins.

To add one: write a `Policy` subclass whose `row` gives one host's score from its own figures, and enter it in
`POLICIES`. Scores must depend on nothing but the row and what this batch put near it, so that one placement changes
few rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from ppec_contract.api import Policy as PolicyName
from ppec_orchestrator.placement.room import Room

Scores = NDArray[np.float64]
Scorer = Callable[[Scores, Scores, Scores], Scores]


def balanced(used: Scores, on_host: Scores, on_rack: Scores) -> Scores:
    """Evens out use: the sum of squares grows fastest where a resource is already scarce."""
    result: Scores = (used**2).sum(axis=-1)
    return result


def pack(used: Scores, on_host: Scores, on_rack: Scores) -> Scores:
    """Best fit: the fullest host first, so that whole hosts and cells stay empty."""
    result: Scores = -used.max(axis=-1)
    return result


def spread(used: Scores, on_host: Scores, on_rack: Scores) -> Scores:
    """Keeps a batch apart: fewest of it on the host, then in the rack, then the emptiest host.

    The weights order the three strictly: a batch has at most 1,000 VMs, and `balanced` stays within 3.
    """
    result: Scores = on_host * 1e5 + on_rack * 1e1 + balanced(used, on_host, on_rack)
    return result


POLICIES: dict[PolicyName, Scorer] = {
    PolicyName.BALANCED: balanced,
    PolicyName.PACK: pack,
    PolicyName.SPREAD: spread,
}


class Ranking:
    """One score per host, kept current as the batch is placed."""

    def __init__(self, room: Room, policy: PolicyName, batch_hosts: Iterable[tuple[int, int]] = ()) -> None:
        self._room = room
        self._scorer = POLICIES[policy]
        hosts = room.fleet.hosts
        self._racks = np.unique([h.rack for h in hosts], return_inverse=True)[1] if hosts else np.zeros(0, np.int64)
        self._on_host = np.zeros(len(hosts))
        self._on_rack = np.zeros(len(hosts))
        for row, count in batch_hosts:
            self._count(row, count)
        self.scores = self._scorer(room.used, self._on_host, self._on_rack)

    def best(self, allowed: NDArray[np.bool_]) -> int | None:
        """The row with the lowest score among `allowed`; ties go to the first host by name. None if none is allowed."""
        if not allowed.any():
            return None
        return int(np.argmin(np.where(allowed, self.scores, np.inf)))

    def placed(self, row: int) -> None:
        neighbours = self._count(row, 1)
        self.scores[neighbours] = self._scorer(
            self._room.used[neighbours], self._on_host[neighbours], self._on_rack[neighbours]
        )

    def _count(self, row: int, count: int) -> NDArray[np.intp]:
        self._on_host[row] += count
        neighbours = np.flatnonzero(self._racks == self._racks[row])
        self._on_rack[neighbours] += count
        return neighbours
