# SPDX-License-Identifier: Apache-2.0
"""Cells filled one after the other: what is found fits, and what is said to be impossible is."""

from __future__ import annotations

import random
from collections import Counter
from functools import cache

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ppec_orchestrator.placement.filling import Cells, Filling

from .fleets import some_cells

STEPS = 20_000


def possible(cells: Cells, counts: list[int]) -> bool:
    """VM by VM, every cell for each: by nothing but what is free."""
    vms = [kind for kind, count in enumerate(counts) for _ in range(count)]

    @cache
    def place(done: int, room: tuple[tuple[int, ...], ...], disk: tuple[int, ...]) -> bool:
        if done == len(vms):
            return True
        kind = vms[done]
        for number, left in enumerate(room):
            host = cells.host.item(number)
            after = tuple(a - b for a, b in zip(left, cells.needs[number, kind].tolist(), strict=True))
            rest = disk[host] - cells.disk_needs.item(kind, 0)
            if min(after) < 0 or rest < 0:
                continue
            rooms, disks = (*room[:number], after, *room[number + 1 :]), (*disk[:host], rest, *disk[host + 1 :])
            if place(done + 1, rooms, disks):
                return True
        return False

    return place(0, tuple(map(tuple, cells.room.tolist())), tuple(cells.disk[:, 0].tolist()))


def fits(cells: Cells, counts: list[int], found: list[tuple[int, int]]) -> bool:
    room, disk = cells.room.copy(), cells.disk.copy()
    for cell, kind in found:
        room[cell] -= cells.needs[cell, kind]
        disk[cells.host[cell]] -= cells.disk_needs[kind]
    asked = Counter({kind: count for kind, count in enumerate(counts) if count})
    return bool((room >= 0).all() and (disk >= 0).all() and Counter(kind for _, kind in found) == asked)


@settings(max_examples=600, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_way_is_found_if_and_only_if_there_is_one(seed: int) -> None:
    cells, counts = some_cells(random.Random(seed), disk=100)
    filling = Filling(cells, counts, STEPS)
    found = filling.run()
    assert (found is not None) == possible(cells, counts)
    assert found is None or fits(cells, counts, found)
    assert filling.exhausted == (found is None)


@settings(max_examples=600, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_with_little_disk_what_is_found_fits_and_nothing_wrong_is_claimed(seed: int) -> None:
    cells, counts = some_cells(random.Random(seed), disk=6)
    filling = Filling(cells, counts, STEPS)
    found = filling.run()
    assert found is None or fits(cells, counts, found)
    assert not (filling.exhausted and possible(cells, counts))


def test_a_search_ends_and_then_claims_nothing() -> None:
    """Three VMs of odd sizes leave a MiB of an even room at least; one less may be left of all rooms together."""
    rng = random.Random(3)
    kinds = rng.sample(range(101, 999, 2), 20)
    planted = [rng.choices(range(20), k=3) for _ in range(40)]
    room = [[3, sum(kinds[kind] for kind in three) + 1] for three in planted]
    room[7][1] -= 2
    cells = Cells(
        room=np.array(room, dtype=np.int64),
        needs=np.broadcast_to(np.array([[1, memory] for memory in kinds], dtype=np.int64), (40, 20, 2)),
        host=np.arange(40),
        disk=np.full((40, 1), 1, dtype=np.int64),
        disk_needs=np.zeros((20, 1), dtype=np.int64),
    )
    counts = Counter(kind for three in planted for kind in three)
    filling = Filling(cells, [counts[kind] for kind in range(20)], STEPS)
    assert filling.run() is None
    assert not filling.exhausted
    assert -20 < filling.steps_left <= 0


def test_what_is_asked_for_is_left_as_it_was() -> None:
    cells, counts = some_cells(random.Random(1), disk=6)
    before = [array.copy() for array in (cells.room, cells.needs, cells.disk)]
    Filling(cells, counts, STEPS).run()
    assert all((a == b).all() for a, b in zip(before, (cells.room, cells.needs, cells.disk), strict=True))


def test_without_cells_there_is_no_way() -> None:
    none = np.zeros((0, 2), dtype=np.int64)
    cells = Cells(none, np.zeros((0, 1, 2), dtype=np.int64), none[:, 0], none, np.zeros((1, 2), dtype=np.int64))
    filling = Filling(cells, [1], STEPS)
    assert filling.run() is None
    assert filling.exhausted
