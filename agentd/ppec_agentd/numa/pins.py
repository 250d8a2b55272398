# SPDX-License-Identifier: Apache-2.0
"""Which host CPUs a VM gets. Pure.

The rules, as policy:

1. A VM takes whole physical cores: SMT siblings never serve two VMs.
2. vCPU counts are even, and no VM is larger than a socket.
3. The lowest-numbered cores of each cell are reserved for the host, for QEMU's own threads and for I/O threads.
4. Pins are disjoint, on one socket and inside the cells the plan chose; memory is bound to those cells.
5. Several VMs at once are planned largest first.

Among the cores that would do, those are taken that leave the longest runs of free neighbours: neighbouring cores share
caches, and a large VM needs them later.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from ppec_agentd.numa.plan import NumaPlan, PinRequest
from ppec_agentd.topology import Cell, Core, Topology, format_cpu_list
from ppec_contract.errors import PpecError
from ppec_contract.vm import VcpuPin


@dataclass(frozen=True)
class CpuPool:
    """A host's CPUs, the number of cores reserved in each cell, and the CPUs already taken by VMs."""

    topology: Topology
    reserved_cores: int
    taken: frozenset[int] = frozenset()

    def take(self, cpus: Iterable[int]) -> CpuPool:
        """The pool after `cpus` are taken. Their siblings go with them: a pin read back takes its whole core."""
        wanted = set(cpus)
        whole = {cpu for core in self.topology.cores if wanted & set(core.cpus) for cpu in core.cpus}
        return replace(self, taken=self.taken | wanted | whole)

    def reserved_of(self, cell: Cell) -> tuple[Core, ...]:
        return cell.cores[: self.reserved_cores]

    def usable_of(self, cell: Cell) -> tuple[Core, ...]:
        """The cores of a cell that VMs may have at all."""
        return cell.cores[self.reserved_cores :]

    def free_of(self, cell: Cell) -> tuple[Core, ...]:
        """The cores of a cell that the next VM may have."""
        return tuple(core for core in self.usable_of(cell) if self.taken.isdisjoint(core.cpus))

    def largest_socket(self) -> int:
        """The most vCPUs one VM could have on this host if it were empty."""
        per_socket = dict.fromkeys(self.topology.sockets, 0)
        for cell in self.topology.cells:
            for core in self.usable_of(cell):
                per_socket[core.socket] += len(core.cpus)
        return max(per_socket.values(), default=0)


def plan_pins(pool: CpuPool, request: PinRequest) -> NumaPlan:
    """Choose cores for one VM.

    Raises ``vm.odd_vcpus``, ``vm.exceeds_socket`` (this host never could), ``host.no_capacity`` (not now, or the
    plan names a cell this host doesn't have) and ``request.invalid`` (cells of several sockets). `details` hold the
    figures: wanted and free vCPUs.
    """
    cells = _named_cells(pool, request)
    _check_size(pool, request)
    cores = _choose(pool, cells, request)
    return _grant(pool, cells, cores, request)


def plan_largest_first(pool: CpuPool, requests: Sequence[PinRequest]) -> list[NumaPlan | PpecError]:
    """Plan several VMs on one host, in descending order of vCPUs; the answers are in the order of the requests.

    A refused VM does not stop the smaller ones after it.
    """
    answers: dict[int, NumaPlan | PpecError] = {}
    for index in sorted(range(len(requests)), key=lambda i: -requests[i].vcpus):
        try:
            plan = plan_pins(pool, requests[index])
        except PpecError as refusal:
            answers[index] = refusal
        else:
            answers[index] = plan
            pool = pool.take(plan.cpus)
    return [answers[index] for index in range(len(requests))]


def _named_cells(pool: CpuPool, request: PinRequest) -> list[Cell]:
    known = pool.topology.by_cell
    missing = sorted(set(request.cells) - known.keys())
    if missing or not request.cells:
        raise PpecError(
            "host.no_capacity",
            f"{request.subject} is planned for NUMA cells {_list(request.cells)}; this host has {_list(known)}",
            hint="The host's layout changed since the plan was made; plan again.",
            subject=request.subject,
            details={"resource": "cells", "wanted": list(request.cells), "found": sorted(known)},
        )
    cells = [known[number] for number in sorted(set(request.cells))]
    sockets = sorted({cell.socket for cell in cells})
    if len(sockets) > 1:
        raise PpecError(
            "request.invalid",
            f"{request.subject} names NUMA cells {_list(request.cells)} of sockets {_list(sockets)}; "
            "a VM stays on one socket",
            subject=request.subject,
            details={"cells": list(request.cells), "sockets": sockets},
        )
    return cells


def _check_size(pool: CpuPool, request: PinRequest) -> None:
    if request.vcpus < 2 or request.vcpus % 2:
        raise PpecError(
            "vm.odd_vcpus",
            f"{request.subject} asks for {request.vcpus} vCPUs; whole cores come in even numbers from 2",
            hint=f"Ask for {max(2, request.vcpus + 1)}.",
            subject=request.subject,
            details={"resource": "vcpus", "wanted": request.vcpus},
        )
    largest = pool.largest_socket()
    if request.vcpus > largest:
        raise PpecError(
            "vm.exceeds_socket",
            f"{request.subject} asks for {request.vcpus} vCPUs; this host's largest socket offers {largest}",
            hint="A VM never spans sockets; choose a smaller flavor or a host with larger sockets.",
            subject=request.subject,
            details={"resource": "vcpus", "wanted": request.vcpus, "largest_socket": largest},
        )


def _choose(pool: CpuPool, cells: Sequence[Cell], request: PinRequest) -> list[Core]:
    """Cores of one socket, in one cell if any single one of them can."""
    # A firmware may spread one cell over several sockets, so the cores' own socket decides and not the cell's.
    by_socket: dict[int, dict[int, list[Core]]] = {}
    for cell in cells:
        for core in pool.free_of(cell):
            by_socket.setdefault(core.socket, {}).setdefault(cell.cell, []).append(core)
    free = {socket: sum(_width(cores) for cores in of.values()) for socket, of in by_socket.items()}
    fitting = [socket for socket in sorted(free) if free[socket] >= request.vcpus]
    if not fitting:
        raise PpecError(
            "host.no_capacity",
            f"{request.subject} asks for {request.vcpus} vCPUs on NUMA cells {_list(request.cells)}; "
            f"{max(free.values(), default=0)} are free there",
            subject=request.subject,
            details={
                "resource": "vcpus",
                "wanted": request.vcpus,
                "free": max(free.values(), default=0),
                "cells": list(request.cells),
            },
        )
    tightest = min(fitting, key=lambda socket: (free[socket], socket))
    return _across_cells(pool, by_socket[tightest], request.vcpus)


def _across_cells(pool: CpuPool, free: dict[int, list[Core]], vcpus: int) -> list[Core]:
    """The tightest single cell that fits; else the emptiest cells first, so that few are touched."""
    fitting = [number for number in free if _width(free[number]) >= vcpus]
    if fitting:
        order = [min(fitting, key=lambda number: (_width(free[number]), number))]
    else:
        order = sorted(free, key=lambda number: (-_width(free[number]), number))
    chosen: list[Core] = []
    for number in order:
        wanted = min(vcpus - _width(chosen), _width(free[number]))
        if wanted > 0:
            positions = pool.topology.by_cell[number].cores
            chosen += _from_runs(list(_runs(positions, free[number])), wanted)
    return chosen


def _runs(positions: Sequence[Core], free: Sequence[Core]) -> Iterator[list[Core]]:
    """The maximal runs of free neighbours among a cell's cores."""
    allowed = set(free)
    run: list[Core] = []
    for core in positions:
        if core in allowed:
            run.append(core)
        elif run:
            yield run
            run = []
    if run:
        yield run


def _from_runs(runs: list[list[Core]], vcpus: int) -> list[Core]:
    """The shortest run that holds all; if none does, whole runs from the shortest up, so that the longest survive."""
    shortest_first = sorted(runs, key=lambda run: (_width(run), run[0].cpus))
    fitting = next((run for run in shortest_first if _width(run) >= vcpus), None)
    candidates = [fitting] if fitting else shortest_first
    chosen: list[Core] = []
    for core in (core for run in candidates for core in run):
        if _width(chosen) >= vcpus:
            break
        chosen.append(core)
    return chosen


def _grant(pool: CpuPool, cells: Sequence[Cell], cores: Sequence[Core], request: PinRequest) -> NumaPlan:
    ordered = sorted(cores, key=lambda core: core.cpus)
    cpus = [cpu for core in ordered for cpu in core.cpus]
    pins = tuple(VcpuPin(vcpu=vcpu, pcpu=cpu) for vcpu, cpu in enumerate(cpus[: request.vcpus]))
    widths = {len(core.cpus) for core in ordered}
    threads = widths.pop() if len(widths) == 1 else 1
    return NumaPlan(
        pins=pins,
        cpus=tuple(sorted(cpus)),
        cells=tuple(cell.cell for cell in cells),
        emulator_cpus=tuple(sorted(cpu for cell in cells for core in pool.reserved_of(cell) for cpu in core.cpus)),
        # Guest siblings mirror host siblings only if every guest core is full.
        threads_per_core=threads if request.vcpus % threads == 0 else 1,
    )


def _width(cores: Iterable[Core]) -> int:
    return sum(len(core.cpus) for core in cores)


def _list(numbers: Iterable[int]) -> str:
    return format_cpu_list(numbers) or "none"
