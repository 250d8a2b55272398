# SPDX-License-Identifier: Apache-2.0
"""A snapshot of the fleet: one row per host, one column per NUMA cell.

Arrays have shape (hosts,) or (hosts, cells); a host with fewer cells than the widest one has zero capacity in the
rest. The snapshot is never changed: a planner works on its own copies of what it uses up. A row stays a host's row for
as long as the set of hosts does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from operator import attrgetter
from typing import Any
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from ppec_contract.vm import SmtPolicy
from ppec_orchestrator.placement.demand import CellResource, free_name
from ppec_orchestrator.placement.request import NO_SPARE_RULE, Group, Level, Profile, Spare, SpareRule

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
# Some rows; None stands for all of them.
Rows = IntArray | None
# A handful of rows, or many.
SomeRows = Sequence[int] | IntArray


@dataclass(frozen=True, slots=True)
class CellState:
    """One NUMA cell as the record has it: usable figures (reserve already taken off) and what is left of them.

    `memory_mib` is on ordinary pages. `shared_cpus` are those that VMs may share, `shared_vcpus` how many of their
    vCPUs are admitted there. Huge pages are counted by their size, 2 MiB and 1 GiB. `nvme` are whole drives for VMs
    that sit near this cell. The reserves are the host's own, and count where use is compared with the whole machine.
    """

    cell: int
    socket: int
    threads_per_core: int
    cores: int
    cores_free: int
    memory_mib: int
    memory_free_mib: int
    shared_cpus: int = 0
    shared_vcpus: int = 0
    shared_vcpus_free: int = 0
    pages_2m: int = 0
    pages_2m_free: int = 0
    pages_1g: int = 0
    pages_1g_free: int = 0
    nvme: int = 0
    nvme_free: int = 0
    cores_reserved: int = 0
    memory_reserved_mib: int = 0


@dataclass(frozen=True, slots=True)
class PoolState:
    """A storage pool of a host, besides its own disk."""

    size_mib: int
    free_mib: int


@dataclass(frozen=True, slots=True)
class SeatedVm:
    """A VM that holds room on a host: what its profile says, in each of `cells`. One that is not `movable` stays in its
    cells whatever is gained by moving it."""

    vm_id: UUID
    name: str
    profile: Profile
    cells: tuple[int, ...]
    groups: tuple[Group, ...] = ()
    movable: bool = True


@dataclass(frozen=True, slots=True)
class HostState:
    """One host: where it stands, whether it may be used, what is free, and which VMs hold the rest.

    `prefixes` are the ids of the prefixes whose addresses a VM here would get, one tuple per address family that is
    served: a VM needs one free address from each tuple. `capabilities` are those its agent announced. `generation`
    grows with every change of what is allocated here: plans with rules about neighbours are committed only on the same.
    `mark` is another one after any change at all: on the same, a plan's room is still there. `spare` is the rule that
    its cluster has about N+1, the same for all hosts of the cluster.
    """

    host_id: int
    name: str
    datacentre: str
    cluster: str
    rack: str
    vrf: str
    architecture: str
    cells: tuple[CellState, ...]
    disk_mib: int
    disk_free_mib: int
    vms: tuple[SeatedVm, ...] = ()
    live: bool = True
    draining: bool = False
    prefixes: tuple[tuple[int, ...], ...] = ()
    capabilities: frozenset[str] = frozenset()
    region: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    pools: Mapping[str, PoolState] = field(default_factory=dict)
    generation: int = 0
    mark: int = 0
    spare: SpareRule = NO_SPARE_RULE


# What a host is found by: the attribute of `HostState`.
PLACES = ("region", "datacentre", "cluster", "rack", "vrf", "architecture")


@dataclass(frozen=True, eq=False)
class Fleet:
    """The snapshot. `free_addresses` counts free addresses per prefix id; a prefix without a bound is left out.

    `cells` has an array (hosts, cells) for each figure of `CellState`, `disk_mib` and `disk_free_mib` one of (hosts,).
    """

    hosts: tuple[HostState, ...]
    free_addresses: Mapping[int, int]
    cells: Mapping[str, IntArray]
    disk_mib: IntArray
    disk_free_mib: IntArray
    index: Mapping[str, int] = field(repr=False)

    @classmethod
    def build(cls, hosts: Sequence[HostState], free_addresses: Mapping[int, int] | None = None) -> Fleet:
        """Orders hosts by name, so that equal fleets give equal plans whatever order they were read in."""
        ordered = tuple(sorted(hosts, key=lambda h: h.name))
        width = max((len(h.cells) for h in ordered), default=1) or 1
        table = np.empty((len(CELL_FIGURES), len(ordered), width), dtype=np.int64)
        table[:] = _NO_CELL[:, None]
        for row, host in enumerate(ordered):
            if host.cells:
                table[:, row, : len(host.cells)] = np.array([_figures(cell) for cell in host.cells]).T
        return cls(
            hosts=ordered,
            free_addresses=dict(free_addresses or {}),
            cells=dict(zip(CELL_FIGURES, table, strict=True)),
            disk_free_mib=np.array([h.disk_free_mib for h in ordered], dtype=np.int64),
            disk_mib=np.array([h.disk_mib for h in ordered], dtype=np.int64),
            index={h.name: row for row, h in enumerate(ordered)},
        )

    def capacity(self, resource: CellResource) -> IntArray:
        """All there is of it, per cell."""
        return self.cells[resource]

    def free(self, resource: CellResource) -> IntArray:
        """What is left of it, per cell."""
        return self.cells[free_name(resource)]

    @property
    def width(self) -> int:
        """How many cells the arrays have columns for."""
        return int(self.threads_per_core.shape[1])

    @property
    def threads_per_core(self) -> IntArray:
        return self.cells["threads_per_core"]

    @property
    def socket(self) -> IntArray:
        return self.cells["socket"]

    @property
    def shared_cpus(self) -> IntArray:
        return self.cells["shared_cpus"]

    @cached_property
    def places(self) -> Mapping[str, Mapping[str, IntArray]]:
        """The rows of hosts by what `PLACES` says of them: `places["rack"]["r1"]`. Ascending."""
        found: dict[str, dict[str, list[int]]] = {place: {} for place in PLACES}
        for row, host in enumerate(self.hosts):
            for place in PLACES:
                found[place].setdefault(getattr(host, place), []).append(row)
        return {
            place: {name: np.array(rows, dtype=np.int64) for name, rows in by_name.items()}
            for place, by_name in found.items()
        }

    @cached_property
    def rack_numbers(self) -> IntArray:
        """Per host the number of its rack."""
        numbers: IntArray = np.zeros(len(self.hosts), dtype=np.int64)
        for number, rows in enumerate(self.racks):
            numbers[rows] = number
        return numbers

    @cached_property
    def racks(self) -> Sequence[IntArray]:
        """The rows of each rack, by its number."""
        return tuple(self.places["rack"].values())

    @cached_property
    def live(self) -> BoolArray:
        return np.array([host.live for host in self.hosts], dtype=np.bool_)

    @cached_property
    def draining(self) -> BoolArray:
        return np.array([host.draining for host in self.hosts], dtype=np.bool_)

    @cached_property
    def spare_rules(self) -> Mapping[str, SpareRule]:
        """What clusters require or warn of about N+1, by their names."""
        return {host.cluster: host.spare for host in self.hosts if host.spare.mode is not Spare.OFF}

    def domain(self, row: int, level: Level) -> str:
        """The name of the host, rack or data centre that the host in `row` fails with."""
        host = self.hosts[row]
        return {Level.HOST: host.name, Level.RACK: host.rack, Level.DATACENTRE: host.datacentre}[level]

    def rows_of(self, level: Level, name: str) -> IntArray:
        """The rows of a host, rack or data centre; none if the fleet doesn't have it."""
        if level is Level.HOST:
            row = self.index.get(name)
            return _NO_ROWS if row is None else np.array([row], dtype=np.int64)
        return self.places[level.value].get(name, _NO_ROWS)

    def largest_socket_vcpus(self, smt: SmtPolicy = SmtPolicy.PREFER) -> int:
        """The most vCPUs any one VM on dedicated cores of one socket can have in this fleet."""
        threads = self.threads_per_core
        seats = self.capacity("cores") * (1 if smt is SmtPolicy.ISOLATE else threads)
        if smt is SmtPolicy.REQUIRE:
            seats = np.where(threads > 1, seats, 0)
        of_sockets = (np.where(self.socket == socket, seats, 0).sum(axis=1) for socket in np.unique(self.socket))
        return max((int(each.max()) for each in of_sockets if len(each)), default=0)

    def changed(self, hosts: Iterable[HostState], free_addresses: Mapping[int, int] | None = None) -> Fleet:
        """The same fleet with these hosts as they are given, in their rows: others' are shared or copied, not read.
        `free_addresses` None: as they were.

        Raises KeyError for a host that the fleet doesn't have, ValueError for one with more cells than there are
        columns."""
        rows = {self.index[host.name]: host for host in hosts}
        everyone = list(self.hosts)
        some = np.fromiter(rows, dtype=np.int64, count=len(rows))
        table = np.empty((len(CELL_FIGURES), len(rows), self.width), dtype=np.int64)
        table[:] = _NO_CELL[:, None]
        for at, (row, host) in enumerate(rows.items()):
            if len(host.cells) > self.width:
                raise ValueError(f"host {host.name} has {len(host.cells)} cells, the fleet's arrays {self.width}")
            everyone[row] = host
            if host.cells:
                table[:, at, : len(host.cells)] = np.array([_figures(cell) for cell in host.cells]).T
        made = Fleet(
            hosts=tuple(everyone),
            free_addresses=self.free_addresses if free_addresses is None else dict(free_addresses),
            cells={name: _with(self.cells[name], some, table[at]) for at, name in enumerate(CELL_FIGURES)},
            disk_mib=_with(self.disk_mib, some, np.array([h.disk_mib for h in rows.values()], dtype=np.int64)),
            disk_free_mib=_with(
                self.disk_free_mib, some, np.array([h.disk_free_mib for h in rows.values()], dtype=np.int64)
            ),
            index=self.index,
        )
        if all(_seldom_changed(self.hosts[row]) == _seldom_changed(host) for row, host in rows.items()):
            # What was worked out from it still holds.
            made.__dict__.update({name: self.__dict__[name] for name in _WORKED_OUT if name in self.__dict__})
        return made


def at(array: NDArray[Any], rows: Rows) -> NDArray[Any]:
    """The rows of an array of the fleet. `take` is some ten times faster than an index for a handful of rows."""
    return array if rows is None else array.take(rows, axis=0)


def _with(array: IntArray, rows: IntArray, values: IntArray) -> IntArray:
    """The array with these rows; itself where they are the same, as capacities mostly are."""
    if np.array_equal(array.take(rows, axis=0), values):
        return array
    made = array.copy()
    made[rows] = values
    return made


CELL_FIGURES = tuple(each.name for each in fields(CellState) if each.name != "cell")
_figures = attrgetter(*CELL_FIGURES)
_seldom_changed = attrgetter(*PLACES, "prefixes", "live", "draining", "spare")
_WORKED_OUT = ("places", "racks", "rack_numbers", "live", "draining", "spare_rules")
_NO_ROWS: IntArray = np.zeros(0, dtype=np.int64)
# The figures of a cell that a host doesn't have; shape (figures, 1).
_NO_CELL: IntArray = np.array([[{"threads_per_core": 1, "socket": -1}.get(name, 0)] for name in CELL_FIGURES])
