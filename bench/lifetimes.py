# SPDX-License-Identifier: Apache-2.0
"""Does a hint about VMs' lifetimes open more empty hosts? A made-up trace, packed with and without the hint.

VMs come at random and live minutes, days or weeks; what is counted is how many hosts stand empty, by the hour, after a
warm-up. Both sides see the same VMs at the same times. The planner has no such hint, because of these figures (decision
0014): best fit, alone and with the hint, is written out here.
"""

from __future__ import annotations

import heapq
import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from bench.figures import Figures


class Lifetime(IntEnum):
    MINUTES = 0
    DAYS = 1
    FOREVER = 2


HOSTS = 80
CELL_CORES, CELL_MEMORY_MIB = 50, 376 * 1024
# Weight, vCPUs, GiB: a fleet's ordinary flavors.
FLAVORS = (
    (14, 2, 4), (14, 2, 8), (20, 4, 16), (8, 4, 32), (16, 8, 32), (8, 8, 64), (5, 12, 96), (6, 16, 64), (4, 16, 128),
    (2, 24, 192), (2, 32, 256), (1, 48, 320),
)  # fmt: skip
MEAN_HOURS = {Lifetime.MINUTES: 0.75, Lifetime.DAYS: 48.0, Lifetime.FOREVER: 960.0}
# Of a hundred VMs: a fleet of services, one with test beds, one whose pipelines make nearly all of them.
MIXES = {"services": (80.0, 15.0, 5.0), "test_beds": (60.0, 35.0, 5.0), "pipelines": (97.0, 2.5, 0.5)}
LOADS = (0.5, 0.75)
SEEDS = range(8)
WARM_HOURS, HOURS = 48.0, 240.0


@dataclass(frozen=True, slots=True)
class _Stay:
    at_hour: float
    hours: float
    lifetime: Lifetime
    vcpus: int
    memory_mib: int


def run(figures: Figures) -> None:
    for mix in MIXES:
        for load in LOADS:
            pairs = [(_empty_hosts(stays, hint=False), _empty_hosts(stays, hint=True)) for stays in _traces(mix, load)]
            name = f"lifetimes.{mix}.{int(load * 100)}"
            figures.add(f"{name}.empty_hosts", statistics.mean(plain for plain, _ in pairs), "hosts")
            figures.add(f"{name}.more_with_hint", statistics.mean(hinted - plain for plain, hinted in pairs), "hosts")
            figures.add(f"{name}.least_more", min(hinted - plain for plain, hinted in pairs), "hosts")


def _traces(mix: str, load: float) -> Iterator[list[_Stay]]:
    weights = dict(zip(Lifetime, MIXES[mix], strict=True))
    mean_cores = sum(weight * vcpus for weight, vcpus, _ in FLAVORS) / sum(weight for weight, _, _ in FLAVORS)
    cores = load * HOSTS * 2 * CELL_CORES
    hours = sum(weights[each] * MEAN_HOURS[each] for each in Lifetime) / 100
    for seed in SEEDS:
        rng = random.Random(seed)
        # It begins with as many of each kind as there are on average.
        standing = {each: weights[each] * MEAN_HOURS[each] for each in Lifetime}
        stays = [_stay(rng, rng.random() / 1000, standing) for _ in range(int(cores / mean_cores))]
        at_hour = 0.0
        while at_hour < HOURS:
            at_hour += rng.expovariate(cores / mean_cores / hours)
            stays.append(_stay(rng, at_hour, weights))
        yield sorted(stays, key=lambda stay: stay.at_hour)


def _stay(rng: random.Random, at_hour: float, weights: dict[Lifetime, float]) -> _Stay:
    (lifetime,) = rng.choices(list(weights), list(weights.values()))
    _, vcpus, gib = rng.choices(FLAVORS, [weight for weight, _, _ in FLAVORS])[0]
    return _Stay(at_hour, rng.expovariate(1 / MEAN_HOURS[lifetime]), lifetime, vcpus, gib * 1024)


def _empty_hosts(stays: list[_Stay], *, hint: bool) -> float:
    """How many hosts stand empty on average over time."""
    packing = _Packing()
    leaving: list[tuple[float, int, int, _Stay]] = []
    empty_hours, since = 0.0, WARM_HOURS

    def passed(hour: float) -> None:
        nonlocal empty_hours, since
        if hour > since:
            empty_hours += (hour - since) * packing.empty_hosts()
            since = hour

    for number, stay in enumerate(stays):
        while leaving and leaving[0][0] <= stay.at_hour:
            hour, _, cell, gone = heapq.heappop(leaving)
            passed(hour)
            packing.put(cell, gone, -1)
        passed(stay.at_hour)
        cell = packing.best(stay, hint=hint)
        if cell is not None:
            packing.put(cell, stay, 1)
            heapq.heappush(leaving, (stay.at_hour + stay.hours, number, cell, stay))
    return empty_hours / (since - WARM_HOURS)


class _Packing:
    """Best fit by cores, then memory, as `pack` has it; `vms` counts by host and lifetime."""

    def __init__(self) -> None:
        self.cores = np.full(2 * HOSTS, CELL_CORES)
        self.memory_mib = np.full(2 * HOSTS, CELL_MEMORY_MIB)
        self.vms = np.zeros((HOSTS, len(Lifetime)), dtype=np.int64)

    def empty_hosts(self) -> int:
        return int(np.count_nonzero(~self.vms.any(axis=1)))

    def put(self, cell: int, stay: _Stay, by: int) -> None:
        self.cores[cell] -= by * stay.vcpus
        self.memory_mib[cell] -= by * stay.memory_mib
        self.vms[cell // 2, stay.lifetime] += by

    def best(self, stay: _Stay, *, hint: bool) -> int | None:
        cores, memory_mib = self.cores - stay.vcpus, self.memory_mib - stay.memory_mib
        left = cores * 1e7 + memory_mib
        if hint:
            # First where another stays as long, then where the host is held longer, an empty host last.
            as_long = self.vms[:, stay.lifetime :].any(axis=1)
            left += np.repeat(np.where(as_long, 0, np.where(self.vms.any(axis=1), 1, 2)), 2) * 1e12
        left[(cores < 0) | (memory_mib < 0)] = np.inf
        best = int(left.argmin())
        return best if left[best] < np.inf else None
