# SPDX-License-Identifier: Apache-2.0
"""A snapshot of the fleet: one row per host, one column per NUMA cell.

Arrays have shape (hosts,) or (hosts, cells); a host with fewer cells than the widest one has zero capacity in the
rest. The snapshot is never changed: a planner works on its own copies of what it uses up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class CellState:
    """One NUMA cell as the record has it: usable figures (reserve already taken off) and what is left of them."""

    cell: int
    socket: int
    threads_per_core: int
    cores: int
    cores_free: int
    memory_mib: int
    memory_free_mib: int


@dataclass(frozen=True, slots=True)
class HostState:
    """One host: where it stands, whether it may be used, and what is free.

    `prefixes` are the ids of the prefixes whose addresses a VM here would get, one tuple per address family that is
    served: a VM needs one free address from each tuple.
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
    vms: int = 0
    live: bool = True
    draining: bool = False
    prefixes: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, eq=False)
class Fleet:
    """The snapshot. `free_addresses` counts free addresses per prefix id; a prefix without a bound is left out."""

    hosts: tuple[HostState, ...]
    free_addresses: Mapping[int, int]
    cores_free: IntArray
    memory_free_mib: IntArray
    threads_per_core: IntArray
    socket: IntArray
    cores: IntArray
    memory_mib: IntArray
    disk_free_mib: IntArray
    disk_mib: IntArray
    index: Mapping[str, int] = field(repr=False)

    @classmethod
    def build(cls, hosts: Sequence[HostState], free_addresses: Mapping[int, int] | None = None) -> Fleet:
        """Orders hosts by name, so that equal fleets give equal plans whatever order they were read in."""
        ordered = tuple(sorted(hosts, key=lambda h: h.name))
        width = max((len(h.cells) for h in ordered), default=1) or 1
        shape = (len(ordered), width)
        columns = {name: np.zeros(shape, dtype=np.int64) for name in _CELL_COLUMNS}
        columns["threads_per_core"][:] = 1
        columns["socket"][:] = -1
        for row, host in enumerate(ordered):
            for column, cell in enumerate(host.cells):
                for name in _CELL_COLUMNS:
                    columns[name][row, column] = getattr(cell, name)
        return cls(
            hosts=ordered,
            free_addresses=dict(free_addresses or {}),
            disk_free_mib=np.array([h.disk_free_mib for h in ordered], dtype=np.int64),
            disk_mib=np.array([h.disk_mib for h in ordered], dtype=np.int64),
            index={h.name: row for row, h in enumerate(ordered)},
            **columns,
        )

    def largest_socket_vcpus(self) -> int:
        """The most vCPUs any one VM can have in this fleet: the usable threads of its largest socket."""
        largest = 0
        for host in self.hosts:
            threads: dict[int, int] = {}
            for cell in host.cells:
                threads[cell.socket] = threads.get(cell.socket, 0) + cell.cores * cell.threads_per_core
            largest = max(largest, *threads.values(), 0)
        return largest


_CELL_COLUMNS = ("cores_free", "memory_free_mib", "threads_per_core", "socket", "cores", "memory_mib")
