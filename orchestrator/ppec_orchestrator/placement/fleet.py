# SPDX-License-Identifier: Apache-2.0
"""A snapshot of the fleet: one row per host, one column per NUMA cell.

Arrays have shape (hosts,) or (hosts, cells); a host with fewer cells than the widest one has zero capacity in the
rest. The snapshot is never changed: a planner works on its own copies of what it uses up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from ppec_contract.vm import SmtPolicy
from ppec_orchestrator.placement.demand import CellResource

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class CellState:
    """One NUMA cell as the record has it: usable figures (reserve already taken off) and what is left of them.

    `memory_mib` is on ordinary pages. `shared_cpus` are those that VMs may share, `shared_vcpus` how many of their
    vCPUs are admitted there. Huge pages are counted by their size, 2 MiB and 1 GiB.
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


@dataclass(frozen=True, slots=True)
class HostState:
    """One host: where it stands, whether it may be used, and what is free.

    `prefixes` are the ids of the prefixes whose addresses a VM here would get, one tuple per address family that is
    served: a VM needs one free address from each tuple. `capabilities` are those its agent announced.
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
    capabilities: frozenset[str] = frozenset()


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
    shared_cpus: IntArray
    shared_vcpus: IntArray
    shared_vcpus_free: IntArray
    pages_2m: IntArray
    pages_2m_free: IntArray
    pages_1g: IntArray
    pages_1g_free: IntArray
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

    def capacity(self, resource: CellResource) -> IntArray:
        """All there is of it, per cell."""
        return self._column(resource)

    def free(self, resource: CellResource) -> IntArray:
        """What is left of it, per cell."""
        return self._column("memory_free_mib" if resource == "memory_mib" else f"{resource}_free")

    def largest_socket_vcpus(self, smt: SmtPolicy = SmtPolicy.PREFER) -> int:
        """The most vCPUs any one VM on dedicated cores of one socket can have in this fleet."""
        largest = 0
        for host in self.hosts:
            vcpus: dict[int, int] = {}
            for cell in host.cells:
                if smt is not SmtPolicy.REQUIRE or cell.threads_per_core > 1:
                    seats = cell.cores * (1 if smt is SmtPolicy.ISOLATE else cell.threads_per_core)
                    vcpus[cell.socket] = vcpus.get(cell.socket, 0) + seats
            largest = max(largest, *vcpus.values(), 0)
        return largest

    def _column(self, name: str) -> IntArray:
        column: IntArray = getattr(self, name)
        return column


_CELL_COLUMNS = tuple(each.name for each in fields(CellState) if each.name != "cell")
