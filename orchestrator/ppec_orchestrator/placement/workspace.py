# SPDX-License-Identifier: Apache-2.0
"""What is left of a fleet while plans are made: copies of the snapshot's free figures, used up and given back row by
row.

Whoever keeps something worked out from these figures (`candidates.py`) remembers the `moment` it was of, and works out
again only the rows that changed since. A workspace outlives a plan: what the plan took is given back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple, Protocol

import numpy as np

from ppec_orchestrator.placement.addresses import AddressRoom
from ppec_orchestrator.placement.balance import Balance, Spread
from ppec_orchestrator.placement.cells import CellRoom
from ppec_orchestrator.placement.demand import CELL_RESOURCES, CellPart, CellResource
from ppec_orchestrator.placement.fitting import Fitting, cell_kinds
from ppec_orchestrator.placement.fleet import PLACES, Fleet, HostState, IntArray
from ppec_orchestrator.placement.groups import GroupBook
from ppec_orchestrator.placement.request import Group, Profile

# For how many placements `balanced` scores with the same figures: for one in fleets of up to so many hosts, in larger
# ones for a sixteenth of their hosts, of which none then weighs much.
EXACT_HOSTS = 512
HOSTS_PER_STEP = 16
# So few are given back faster one by one than all at once.
_FEW = 16
# How many changes are remembered, at least; and at most twice as many.
MOST_CHANGES = 100_000


# Where a VM goes: a row, and columns.
Seat = tuple[int, tuple[int, ...]]


class Taken(NamedTuple):
    """What one VM took, so that it can be given back: `part` of each of the cells."""

    row: int
    columns: tuple[int, ...]
    part: CellPart
    disk_mib: int
    pool: str
    addresses: tuple[tuple[int, int], ...]
    groups: tuple[Group, ...]


class Tenant(Protocol):
    """What takes room: a VM that is asked for, or one that has a seat."""

    @property
    def profile(self) -> Profile: ...
    @property
    def groups(self) -> tuple[Group, ...]: ...


class Workspace:
    """`free` by resource, shape (hosts, cells), and `packed` by fitting, are changed by `cells.py` alone. `era` counts
    the changes after which nothing that was worked out is of use."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        # Rows in the order they changed in, and how many such there were before.
        self._changes: list[int] = []
        self._forgotten = 0
        # The moment after which no host has had more room than before.
        self.last_growth = 0
        self.era = 0
        self._load()

    def _load(self) -> None:
        fleet = self.fleet
        self._cells = CellRoom(fleet)
        self.free = self._cells.free
        self.packed, self.packed_items = self._cells.packed, self._cells.packed_items
        self.cell_kinds = cell_kinds(fleet)
        self.disk_free_mib = fleet.disk_free_mib.copy()
        self._pools: dict[str, IntArray] = {}
        self.addresses = AddressRoom(fleet, self._changes.extend)
        self.groups = GroupBook(fleet)
        self._balance = Balance(fleet)
        self._not_balanced_yet: list[tuple[Taken, int]] = []
        self.start_epoch(0)

    # --- what changed ----------------------------------------------------------------------------------------------

    @property
    def moment(self) -> int:
        """Grows with every change."""
        return self._forgotten + len(self._changes)

    def changed_since(self, moment: int) -> set[int] | None:
        """The rows that changed since; None when that was too long ago to tell: any may have."""
        known = moment - self._forgotten
        return set(self._changes[known:]) if known >= 0 else None

    def _forget_long_ago(self) -> None:
        if len(self._changes) > 2 * MOST_CHANGES:
            self._forgotten += len(self._changes) - MOST_CHANGES
            del self._changes[:-MOST_CHANGES]

    # --- what is free ----------------------------------------------------------------------------------------------

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
        self.settle()
        return self._balance

    def settle(self) -> None:
        """Brings the balance up to date, for those who have kept what scores with it."""
        if not self._not_balanced_yet:
            return
        for taken, sign in self._not_balanced_yet:
            row, columns, part, disk_mib, pool, _, _ = taken
            factor = sign * len(columns)
            self._balance.take(row, part.memory_mib * factor, 0 if pool else sign * disk_mib, part.cpus * factor, sign)
        self._not_balanced_yet.clear()

    def start_epoch(self, step: int) -> None:
        """From now on, placements are scored with the figures as they are now. `step` is the plan's."""
        self.epoch = step
        self.spread: Spread = self.balance.spread()
        hosts = len(self.fleet.hosts)
        self._steps_left = 1 if hosts <= EXACT_HOSTS else hosts // HOSTS_PER_STEP

    def step(self, step: int) -> None:
        """The plan's `step` begins."""
        if self._steps_left <= 0:
            self.start_epoch(step)
        self._steps_left -= 1

    # --- taking and giving back ------------------------------------------------------------------------------------

    def take(self, row: int, columns: Sequence[int], fitting: Fitting, vm: Tenant) -> Taken:
        """Uses up what the VM, of the fitting's shape, holds in these cells, and its addresses."""
        shape = fitting.shape
        part = fitting.part(row, columns[0], len(columns))
        addresses = self.addresses.granted(row, vm.profile.networks)
        taken = Taken(row, tuple(columns), part, shape.disk_mib, shape.pool, addresses, vm.groups)
        self._apply(taken, 1)
        return taken

    def give_back(self, taken: Taken) -> None:
        self._apply(taken, -1)

    def take_again(self, taken: Taken) -> None:
        """The very same that was given back, where nothing else was taken in between."""
        self._apply(taken, 1)

    def give_back_all(self, taken: Sequence[Taken]) -> None:
        """As one by one, of all that is taken: their hosts are then as the fleet has them."""
        if len(taken) <= _FEW:
            for one in taken:
                self.give_back(one)
            return
        addresses: dict[int, int] = {}
        for one in taken:
            if one.pool:
                self.disk(one.pool)[one.row] += one.disk_mib
            for prefix, count in one.addresses:
                addresses[prefix] = addresses.get(prefix, 0) + count
            if one.groups:
                self.groups.count(one.row, one.groups, -1)
        for prefix, count in addresses.items():
            self.addresses.count(prefix, count)
        rows = np.array(sorted({one.row for one in taken}))
        self._cells.replace(rows, self.fleet)
        self.disk_free_mib[rows] = self.fleet.disk_free_mib[rows]
        self._not_balanced_yet.clear()
        self._balance.restore()
        self._changes.extend(rows.tolist())
        self.last_growth = self.moment

    def overdrawn(self, taken: Taken) -> bool:
        """Was more taken than there was?"""
        row = taken.row
        cells = any(self.free[each][row, column] < 0 for each in taken.part.by_resource for column in taken.columns)
        return (
            cells or bool(self.disk(taken.pool)[row] < 0) or any(self.addresses.left[p] < 0 for p, _ in taken.addresses)
        )

    def move(self, row: int, source: int, target: int, amounts: Mapping[CellResource, int]) -> None:
        """A running VM changes cells on its host: of the host as a whole, nothing changes."""
        self._cells.add(row, (source,), amounts, 1)
        self._cells.add(row, (target,), amounts, -1)
        self._changes.append(row)
        self.last_growth = self.moment

    def _apply(self, taken: Taken, sign: int) -> None:
        row = taken.row
        self._cells.add(row, taken.columns, taken.part.by_resource, -sign)
        self.disk(taken.pool)[row] -= sign * taken.disk_mib
        for prefix, count in taken.addresses:
            self.addresses.count(prefix, -sign * count)
        if taken.groups:
            self.groups.count(row, taken.groups, sign)
        self._not_balanced_yet.append((taken, sign))
        self._changes.append(row)
        if sign < 0:
            self.last_growth = self.moment

    def begin(self) -> None:
        """A plan begins: nothing is taken."""
        self.balance.mark()

    def end(self) -> None:
        """It has ended, and all was given back."""
        self._not_balanced_yet.clear()
        self._balance.restore()
        self._forget_long_ago()

    # --- the fleet moves on ----------------------------------------------------------------------------------------

    def follow(self, fleet: Fleet, rows: Sequence[int]) -> None:
        """The fleet is another one now, of the same hosts, of which those in `rows` changed. Nothing may be taken."""
        before, self.fleet = self.fleet, fleet
        if before.free_addresses.keys() != fleet.free_addresses.keys() or any(
            not _stands_alike(before.hosts[row], fleet.hosts[row]) for row in rows
        ):
            # Rare: a host drains, falls silent, is of another size. What was worked out for profiles is void.
            self.era += 1
            self._load()
            return
        some = np.array(rows, dtype=np.int64)
        self._cells.replace(some, fleet)
        self.disk_free_mib[some] = fleet.disk_free_mib[some]
        self.balance.replace(some, fleet)
        self._changes.extend(rows)
        for row in rows:
            for pool, free_mib in self._pools.items():
                free_mib[row] = fleet.hosts[row].pools[pool].free_mib if pool in fleet.hosts[row].pools else 0
            self.groups.replace(row, before, fleet)
        self.addresses.follow(fleet)
        self.last_growth = self.moment


_capacity = attrgetter(
    "cell", "socket", "threads_per_core", "shared_cpus", "cores_reserved", "memory_reserved_mib", *CELL_RESOURCES
)
_lasting = attrgetter(
    "live", "draining", "disk_mib", "prefixes", "capabilities", "labels", "host_id", *PLACES,
)  # fmt: skip


def _stands_alike(before: HostState, after: HostState) -> bool:
    """Is the same all of a host that one-row updates don't reach?"""
    return (
        _lasting(before) == _lasting(after)
        and list(map(_capacity, before.cells)) == list(map(_capacity, after.cells))
        and {name: pool.size_mib for name, pool in before.pools.items()}
        == {name: pool.size_mib for name, pool in after.pools.items()}
    )
