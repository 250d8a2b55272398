# SPDX-License-Identifier: Apache-2.0
"""The best that any plan could do on a small host: every assignment is tried, no heuristic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product

# Free cores of each cell, by socket; and what each cell has when whole.
Sockets = tuple[tuple[int, ...], ...]
# As `packing.Room`: cores placed, whole sockets, whole cells, cores of the freest socket.
Outcome = tuple[int, int, int, int]


def best_outcome(whole: Sockets, free: Sockets, sizes: Sequence[int]) -> Outcome:
    """The best outcome for VMs of these numbers of cores, each on one socket, in any cells of it."""
    ordered = tuple(sorted(sizes, reverse=True))

    @cache
    def best(index: int, now: Sockets) -> Outcome:
        if index == len(ordered):
            return _outcome(whole, now)
        # Left out, or anywhere it fits.
        found = best(index + 1, now)
        for after in set(_placements(now, ordered[index])):
            placed, sockets, cells, freest = best(index + 1, after)
            found = max(found, (placed + ordered[index], sockets, cells, freest))
        return found

    return best(0, free)


def _placements(now: Sockets, cores: int) -> Iterator[Sockets]:
    for number, cells in enumerate(now):
        if sum(cells) < cores:
            continue
        for taken in product(*(range(min(free, cores) + 1) for free in cells)):
            if sum(taken) == cores:
                left = tuple(free - part for free, part in zip(cells, taken, strict=True))
                yield (*now[:number], left, *now[number + 1 :])


def _outcome(whole: Sockets, now: Sockets) -> Outcome:
    sockets = sum(1 for all_of, free in zip(whole, now, strict=True) if all_of == free)
    cells = sum(
        one == other for all_of, free in zip(whole, now, strict=True) for one, other in zip(all_of, free, strict=True)
    )
    return 0, sockets, cells, max(sum(free) for free in now)
