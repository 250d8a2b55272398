# SPDX-License-Identifier: Apache-2.0
"""A host's CPUs: which are kept for the host, which are shared, which are taken, and how many vCPUs fit the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from ppec_agentd.topology import Cell, Core, Topology
from ppec_contract.vm import SmtPolicy

DEFAULT_SHARED_VCPUS_PER_CPU = 4


def seats(core: Core, smt: SmtPolicy) -> int:
    """How many vCPUs of one VM a core carries under this policy; 0 if it is not to be used."""
    if smt is SmtPolicy.ISOLATE:
        return 1
    if smt is SmtPolicy.REQUIRE and len(core.cpus) == 1:
        return 0
    return len(core.cpus)


def seats_of(cores: Iterable[Core], smt: SmtPolicy) -> int:
    return sum(seats(core, smt) for core in cores)


@dataclass(frozen=True)
class CpuPool:
    """Each cell's cores, ascending, are: `reserved_cores` for the host, `shared_cores` for VMs that share, the rest.

    `taken` are the CPUs of the rest that VMs hold; `shared_taken` says how many vCPUs float in each cell, of which
    `shared_vcpus_per_cpu` are admitted on each shared CPU.
    """

    topology: Topology
    reserved_cores: int
    taken: frozenset[int] = frozenset()
    shared_cores: int = 0
    shared_vcpus_per_cpu: int = DEFAULT_SHARED_VCPUS_PER_CPU
    shared_taken: Mapping[int, int] = field(default_factory=dict)

    def take(self, cpus: Iterable[int]) -> CpuPool:
        """The pool after `cpus` are taken. Their siblings go with them: a pin read back takes its whole core."""
        return replace(self, taken=self.taken | self.whole(cpus))

    def whole(self, cpus: Iterable[int]) -> frozenset[int]:
        """These CPUs and their siblings."""
        cores = self.topology.core_of_cpu
        given = frozenset(cpus)
        return given.union(*(cores[cpu].cpus for cpu in given if cpu in cores))

    def share(self, vcpus_by_cell: Mapping[int, int]) -> CpuPool:
        """The pool after so many more vCPUs float in each cell; negative numbers take them away."""
        if not vcpus_by_cell:
            return self
        cells = self.shared_taken.keys() | vcpus_by_cell.keys()
        return replace(
            self, shared_taken={c: self.shared_taken.get(c, 0) + vcpus_by_cell.get(c, 0) for c in sorted(cells)}
        )

    def reserved_of(self, cell: Cell) -> tuple[Core, ...]:
        return cell.cores[: self.reserved_cores]

    def shared_of(self, cell: Cell) -> tuple[Core, ...]:
        return cell.cores[self.reserved_cores : self.reserved_cores + self.shared_cores]

    def usable_of(self, cell: Cell) -> tuple[Core, ...]:
        """The cores of a cell that dedicated VMs may have at all."""
        return cell.cores[self.reserved_cores + self.shared_cores :]

    def free_of(self, cell: Cell) -> tuple[Core, ...]:
        """The cores of a cell that the next dedicated VM may have."""
        return tuple(core for core in self.usable_of(cell) if self.taken.isdisjoint(core.cpus))

    def is_whole(self, cell: Cell) -> bool:
        """Whether all that a cell has for dedicated VMs is free (and it has something)."""
        usable = self.usable_of(cell)
        return bool(usable) and all(self.taken.isdisjoint(core.cpus) for core in usable)

    def shared_capacity(self, cell: Cell) -> int:
        """vCPUs that may float in a cell."""
        return self.shared_vcpus_per_cpu * sum(len(core.cpus) for core in self.shared_of(cell))

    def shared_free(self, cell: Cell) -> int:
        """Below zero if more were found there than are admitted."""
        return self.shared_capacity(cell) - self.shared_taken.get(cell.cell, 0)

    def largest_socket(self, smt: SmtPolicy = SmtPolicy.PREFER) -> int:
        """The most vCPUs one dedicated VM on one socket could have on this host if it were empty."""
        per_socket = dict.fromkeys(self.topology.sockets, 0)
        for cell in self.topology.cells:
            for core in self.usable_of(cell):
                per_socket[core.socket] += seats(core, smt)
        return max(per_socket.values(), default=0)

    def emulator_cpus(self, cells: Iterable[Cell]) -> tuple[int, ...]:
        """Where QEMU's own threads run: the reserved CPUs of these cells.

        A host that reserves none but shares some runs them there. Empty if it does neither: they then float.
        """
        named = tuple(cells)
        reserved = [core for cell in named for core in self.reserved_of(cell)]
        return cpus_of(reserved or [core for cell in named for core in self.shared_of(cell)])


def cpus_of(cores: Iterable[Core]) -> tuple[int, ...]:
    return tuple(sorted(cpu for core in cores for cpu in core.cpus))
