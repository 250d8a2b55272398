# SPDX-License-Identifier: Apache-2.0
"""What is left of a fleet while plans are made: copies of the snapshot's free figures, used up and given back row by
row.

Whoever keeps something worked out from these figures (`candidates.py`) remembers how much of `changes` it has seen, and
works out again only the rows that stand there since. A workspace outlives a plan: what the plan took is given back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ppec_orchestrator.placement.balance import CPU, MEMORY, Balance, Change, Spread
from ppec_orchestrator.placement.demand import CELL_RESOURCES, CellResource
from ppec_orchestrator.placement.fitting import Fitting
from ppec_orchestrator.placement.fleet import BoolArray, Fleet, IntArray
from ppec_orchestrator.placement.groups import GroupBook
from ppec_orchestrator.placement.packed import CPU_SHIFT, GUARDS, Packed, pack
from ppec_orchestrator.placement.request import Group

# For how many placements `balanced` scores with the same figures, as a part of the fleet: one, up to this many hosts.
HOSTS_PER_STEP = 32
_Pair = tuple[CellResource, CellResource]


@dataclass(frozen=True, slots=True)
class Taken:
    """What one VM took, so that it can be given back: `part` of each of the cells."""

    row: int
    columns: tuple[int, ...]
    part: Mapping[CellResource, int]
    disk_mib: int
    pool: str
    prefixes: tuple[int, ...]
    groups: tuple[Group, ...]


class Workspace:
    """`free` by resource, shape (hosts, cells). `changes` are the rows changed so far, in order, one again and again if
    need be. `era` counts the changes after which nothing that was worked out is of use."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.changes: list[int] = []
        self.era = 0
        self._load()

    def _load(self) -> None:
        fleet = self.fleet
        self.free: dict[CellResource, IntArray] = {each: fleet.free(each).copy() for each in CELL_RESOURCES}
        self._packed: dict[_Pair, Packed] = {}
        self.disk_free_mib = fleet.disk_free_mib.copy()
        self._pools: dict[str, IntArray] = {}
        self.addresses = dict(fleet.free_addresses)
        self.addresses_left: BoolArray = np.fromiter(
            (self._has_addresses(row) for row in range(len(fleet.hosts))), dtype=np.bool_, count=len(fleet.hosts)
        )
        # A host's prefixes that can run out, a tuple per family; None where none of them can.
        self._scarce = [_scarce(host.prefixes, self.addresses) for host in fleet.hosts]
        self.groups = GroupBook(fleet)
        self._balance = Balance(fleet)
        self._not_balanced_yet: list[tuple[Taken, int]] = []
        self.start_epoch(0)

    # --- what is free ----------------------------------------------------------------------------------------------

    def packed(self, fitting: Fitting) -> Packed:
        """What is free of the fitting's CPUs and memory, per cell (`packed.py`)."""
        pair = (fitting.cpu, fitting.memory)
        if pair not in self._packed:
            # A cell that shrank under its VMs has less than nothing free, which the packed form can't say.
            cpus, memory = (np.maximum(self.free[each], 0) for each in pair)
            self._packed[pair] = pack(cpus, memory) | GUARDS
        return self._packed[pair]

    def disk(self, pool: str) -> IntArray:
        """Free MiB per host, of a pool or (with "") of the host's own disk; 0 where there is no such pool."""
        if not pool:
            return self.disk_free_mib
        if pool not in self._pools:
            free = (host.pools[pool].free_mib if pool in host.pools else 0 for host in self.fleet.hosts)
            self._pools[pool] = np.fromiter(free, dtype=np.int64, count=len(self.fleet.hosts))
        return self._pools[pool]

    # --- the figures that `balanced` scores with -------------------------------------------------------------------

    @property
    def balance(self) -> Balance:
        """How evenly the fleet is used. Brought up to date when somebody asks: most policies never do."""
        for taken, sign in self._not_balanced_yet:
            self._balance.move(taken.row, self._change(taken, sign))
        self._not_balanced_yet.clear()
        return self._balance

    def start_epoch(self, step: int) -> None:
        """From now on, placements are scored with the figures as they are now. `step` is the plan's."""
        self.epoch = step
        self.spread: Spread = self.balance.spread()
        self._steps_left = max(1, len(self.fleet.hosts) // HOSTS_PER_STEP)

    def step(self, step: int) -> None:
        """The plan's `step` begins."""
        if self._steps_left <= 0:
            self.start_epoch(step)
        self._steps_left -= 1

    def _change(self, taken: Taken, sign: int) -> Change:
        """What the VM changes in its host's figures."""
        memory_mib = cpus = 0
        for resource, amount in taken.part.items():
            memory_mib += amount * MEMORY.get(resource, 0)
            cpus += amount * CPU.get(resource, 0)
        factor = sign * len(taken.columns)
        disk_mib = 0 if taken.pool else sign * taken.disk_mib
        return self._balance.change_of(taken.row, memory_mib * factor, disk_mib, cpus * factor, sign)

    # --- taking and giving back ------------------------------------------------------------------------------------

    def take(self, row: int, columns: Sequence[int], fitting: Fitting, groups: tuple[Group, ...] = ()) -> Taken:
        """Uses up what a VM of the fitting's shape holds in these cells, and one address of each family."""
        shape = fitting.shape
        part = fitting.part(row, columns[0], len(columns))
        scarce = self._scarce[row]
        prefixes = () if scarce is None else self._next_addresses(scarce)
        taken = Taken(row, tuple(columns), part, shape.disk_mib, shape.pool, prefixes, groups)
        self._apply(taken, 1)
        return taken

    def give_back(self, taken: Taken) -> None:
        self._apply(taken, -1)

    def _apply(self, taken: Taken, sign: int) -> None:
        row, part = taken.row, taken.part
        for column in taken.columns:
            for resource, amount in part.items():
                self.free[resource][row, column] -= sign * amount
            for (cpu, memory), packed in self._packed.items():
                packed[row, column] -= sign * ((part.get(cpu, 0) << CPU_SHIFT) + part.get(memory, 0))
        self.disk(taken.pool)[row] -= sign * taken.disk_mib
        for prefix in taken.prefixes:
            self._count_address(prefix, -sign)
        if taken.groups:
            self.groups.count(row, taken.groups, sign)
        self._not_balanced_yet.append((taken, sign))
        self.changes.append(row)

    # --- addresses -------------------------------------------------------------------------------------------------

    def _next_addresses(self, families: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
        """The prefix of each family that the next address would come from, unless it can't run out."""
        found = (next((p for p in family if self.addresses.get(p, 1) > 0), None) for family in families)
        return tuple(prefix for prefix in found if prefix is not None and prefix in self.addresses)

    def _count_address(self, prefix: int, by: int) -> None:
        before = self.addresses[prefix]
        self.addresses[prefix] = before + by
        if before <= 0 or before + by <= 0:
            for row in self.fleet.hosts_of_prefix.get(prefix, ()):
                self.addresses_left[row] = self._has_addresses(int(row))
                self.changes.append(int(row))

    def _has_addresses(self, row: int) -> bool:
        families = self.fleet.hosts[row].prefixes
        return bool(families) and all(any(self.addresses.get(p, 1) > 0 for p in family) for family in families)

    # --- the fleet moves on ----------------------------------------------------------------------------------------

    def follow(self, fleet: Fleet, rows: Sequence[int]) -> None:
        """The fleet is another one now, of the same hosts, of which those in `rows` changed. Nothing may be taken."""
        before, self.fleet = self.fleet, fleet
        if before.free_addresses.keys() != fleet.free_addresses.keys() or any(
            _standing(before, row) != _standing(fleet, row) for row in rows
        ):
            # Rare: a host drains, falls silent, is of another size. What was worked out for profiles is void.
            self.era += 1
            self._load()
            return
        self._packed.clear()
        for row in rows:
            for resource, free in self.free.items():
                free[row] = fleet.free(resource)[row]
            self.disk_free_mib[row] = fleet.disk_free_mib[row]
            for pool, free_mib in self._pools.items():
                free_mib[row] = fleet.hosts[row].pools[pool].free_mib if pool in fleet.hosts[row].pools else 0
            self.balance.replace(row, fleet)
            self.groups.replace(row, before, fleet)
            self.changes.append(row)
        for prefix, free_now in fleet.free_addresses.items():
            if free_now != self.addresses[prefix]:
                self._count_address(prefix, free_now - self.addresses[prefix])


def _scarce(families: tuple[tuple[int, ...], ...], bounded: Mapping[int, int]) -> tuple[tuple[int, ...], ...] | None:
    return families if any(prefix in bounded for family in families for prefix in family) else None


def _standing(fleet: Fleet, row: int) -> tuple[object, ...]:
    """All of a host that one-row updates don't reach."""
    host = fleet.hosts[row]
    capacity = tuple(
        (c.cell, c.socket, c.threads_per_core, c.shared_cpus, *(getattr(c, each) for each in CELL_RESOURCES))
        for c in host.cells
    )
    pools = tuple(sorted((name, pool.size_mib) for name, pool in host.pools.items()))
    places = (host.host_id, host.region, host.datacentre, host.cluster, host.rack, host.vrf, host.architecture)
    usable = (host.live, host.draining, host.capabilities, tuple(sorted(host.labels.items())), host.prefixes)
    return capacity, pools, places, usable, host.disk_mib
