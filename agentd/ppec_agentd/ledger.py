# SPDX-License-Identifier: Apache-2.0
"""What the host has given away: the blog's in-memory lockfile, in two sections under two locks.

*Totals* count cores, memory and disk of the whole host; they are small, and most refusals end there. *Details* say
which VM holds which CPUs and how much memory of which cell. A reservation takes from totals first, then from details; a
release gives back in the opposite order, so that totals never promise what details still hold. No lock is ever held
over I/O, nor is one taken inside the other.

Pure and thread-safe. Nothing is stored: `adopt` rebuilds it from the domains' metadata.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from uuid import UUID

from ppec_agentd.hypervisor import Domain
from ppec_agentd.numa import CpuPool, NumaPlan, PinRequest, plan_pins
from ppec_agentd.topology import Cell, Topology
from ppec_contract.errors import PpecError
from ppec_contract.host import CellReport


@dataclass(frozen=True, slots=True)
class Claim:
    """What a VM asks for. Memory comes out of `cells` alone."""

    vm_id: UUID
    name: str
    vcpus: int
    memory_mib: int
    disk_mib: int
    cells: tuple[int, ...]

    @property
    def subject(self) -> str:
        return f"vm {self.name}"


@dataclass(frozen=True, slots=True)
class Holding:
    """What a VM holds. `foreign` marks a domain PPEC did not make: counted, never touched."""

    vm_id: UUID
    name: str
    cpus: frozenset[int]
    memory_by_cell_mib: Mapping[int, int]
    disk_mib: int
    committed: bool
    foreign: bool = False

    @property
    def memory_mib(self) -> int:
        return sum(self.memory_by_cell_mib.values())


@dataclass(frozen=True, slots=True)
class Totals:
    """Free and whole amounts of the host; cores are whole physical ones."""

    cores: int
    cores_free: int
    memory_mib: int
    memory_free_mib: int
    disk_mib: int
    disk_free_mib: int


@dataclass
class _TotalsSection:
    """The first section: sums, and the names in use.

    `undecided` counts callers between the two sections. While there are any, the sums may be too low for a moment, and
    a refusal waits until they are right: nobody is turned away while there is room.
    """

    cores_free: int
    memory_free_mib: int
    disk_free_mib: int
    names: dict[str, UUID] = field(default_factory=dict)
    undecided: int = 0
    lock: threading.Condition = field(default_factory=threading.Condition)


@dataclass
class _DetailsSection:
    """The second section: who holds what."""

    pool: CpuPool
    holdings: dict[UUID, Holding] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Ledger:
    """Admission to one host. `reserve` → `commit` once the VM runs, or `release` at any time."""

    def __init__(
        self,
        topology: Topology,
        disk_mib: int,
        *,
        reserved_cores_per_cell: int = 0,
        reserved_memory_per_cell_mib: int = 0,
    ) -> None:
        self._topology = topology
        self._reserved_memory_mib = {
            cell.cell: min(reserved_memory_per_cell_mib, cell.memory_mib) for cell in topology.cells
        }
        self._disk_mib = disk_mib
        pool = CpuPool(topology, reserved_cores_per_cell)
        self._empty_pool = pool
        self._cores = sum(len(pool.usable_of(cell)) for cell in topology.cells)
        self._memory_mib = topology.memory_mib - sum(self._reserved_memory_mib.values())
        self._totals = _TotalsSection(self._cores, self._memory_mib, disk_mib)
        self._details = _DetailsSection(pool)

    # --- reserve, commit, release -------------------------------------------------------------------------------

    def reserve(self, claim: Claim) -> NumaPlan:
        """Takes cores, memory, disk and the name for a VM.

        Raises `vm.exists` (name or id taken), `host.no_capacity` with `resource`, `wanted` and `free`, and what
        `numa.plan_pins` raises. A refusal takes nothing.
        """
        request = PinRequest(claim.vcpus, claim.cells, claim.subject)
        if claim.vcpus > self._empty_pool.largest_socket():
            # Not a matter of what is free: the empty host refuses it, in its own words.
            plan_pins(self._empty_pool, request)
        cores = self._cores_for(claim)
        with self._totals.lock:
            self._totals.lock.wait_for(lambda: self._has_room(claim, cores) or not self._totals.undecided)
            self._refuse_duplicate(claim)
            self._refuse_excess(claim, cores)
            self._move_totals(cores, claim.memory_mib, claim.disk_mib)
            self._totals.names[claim.name] = claim.vm_id
            self._totals.undecided += 1
        try:
            plan = self._reserve_details(claim, request)
        except BaseException:
            self._give_back(claim.name, claim.vm_id, cores, claim.memory_mib, claim.disk_mib)
            raise
        # The estimate was by the widest core: cells of mixed SMT width may have given more.
        granted = self._core_count(frozenset(plan.cpus))
        with self._totals.lock:
            self._move_totals(granted - cores, 0, 0)
            self._decided()
        return plan

    def commit(self, vm_id: UUID) -> None:
        """The VM stands: what it holds is now its own, and survives a rebuild. Raises KeyError if nothing is held."""
        with self._details.lock:
            held = self._details.holdings[vm_id]
            self._details.holdings[vm_id] = Holding(
                held.vm_id, held.name, held.cpus, held.memory_by_cell_mib, held.disk_mib, True, held.foreign
            )

    def release(self, vm_id: UUID) -> bool:
        """Gives back all a VM holds; False if it held nothing."""
        with self._totals.lock:
            self._totals.undecided += 1
        with self._details.lock:
            held = self._details.holdings.pop(vm_id, None)
            taken = frozenset().union(*(h.cpus for h in self._details.holdings.values()))
            # CPUs of a foreign domain may be shared with others: only what nobody holds any more becomes free.
            before = self._core_count(self._details.pool.taken)
            self._details.pool = self._empty_pool.take(taken)
            cores = before - self._core_count(self._details.pool.taken)
        if held is None:
            with self._totals.lock:
                self._decided()
            return False
        self._give_back(held.name, vm_id, cores, held.memory_mib, held.disk_mib)
        return True

    def adopt(self, domain: Domain) -> None:
        """Enters a domain that exists, whatever that does to the sums: it is there. Known ones are left alone.

        Ours are entered as their metadata says. A foreign one holds the CPUs it is pinned to, if any; its memory counts
        on the cells it is bound to, or else on the cell with the most left.
        """
        with self._details.lock:
            if domain.vm_id in self._details.holdings:
                return
            held = self._holding_of(domain)
            before = self._core_count(self._details.pool.taken)
            self._details.pool = self._details.pool.take(held.cpus)
            cores = self._core_count(self._details.pool.taken) - before
            self._details.holdings[domain.vm_id] = held
        with self._totals.lock:
            self._move_totals(cores, held.memory_mib, held.disk_mib)
            self._totals.names.setdefault(held.name, held.vm_id)

    def follow(self, domains: Iterable[Domain], held_before: frozenset[UUID] = frozenset()) -> None:
        """Brings the ledger in line with the domains that are there.

        `held_before` is `held_ids()` from before the domains were read: what was created or deleted since is not
        judged by a picture older than itself. Domains made by hand are adopted; what a committed VM held is released
        when its domain is gone. A mere reservation is left alone: its domain is yet to come.
        """
        present = {domain.vm_id: domain for domain in domains}
        for held in self.holdings():
            if held.committed and held.vm_id in held_before and held.vm_id not in present:
                self.release(held.vm_id)
        for domain in present.values():
            if domain.vm_id not in held_before:
                self.adopt(domain)

    # --- looking ------------------------------------------------------------------------------------------------

    def holding(self, vm_id: UUID) -> Holding | None:
        with self._details.lock:
            return self._details.holdings.get(vm_id)

    def holdings(self) -> tuple[Holding, ...]:
        with self._details.lock:
            return tuple(self._details.holdings.values())

    def held_ids(self) -> frozenset[UUID]:
        with self._details.lock:
            return frozenset(self._details.holdings)

    def totals(self) -> Totals:
        """Free amounts can be below zero after `adopt` took in more than the host should hold."""
        with self._totals.lock:
            section = self._totals
            return Totals(
                self._cores,
                section.cores_free,
                self._memory_mib,
                section.memory_free_mib,
                self._disk_mib,
                section.disk_free_mib,
            )

    def cells(self) -> tuple[CellReport, ...]:
        """Each cell as the report shows it; `…_free` is what the next VM could get."""
        with self._details.lock:
            return tuple(self._cell_report(cell) for cell in self._topology.cells)

    def _cell_report(self, cell: Cell) -> CellReport:
        pool = self._details.pool
        return CellReport(
            cell=cell.cell,
            socket=cell.socket,
            threads_per_core=cell.threads_per_core,
            cores=len(cell.cores),
            cores_reserved=len(pool.reserved_of(cell)),
            cores_free=len(pool.free_of(cell)),
            memory_mib=cell.memory_mib,
            memory_reserved_mib=self._reserved_memory_mib[cell.cell],
            memory_free_mib=max(0, self._memory_free_mib(cell.cell)),
        )

    # --- totals -------------------------------------------------------------------------------------------------

    def _refuse_duplicate(self, claim: Claim) -> None:
        owner = self._totals.names.get(claim.name)
        if owner is not None or claim.vm_id in self._totals.names.values():
            what = f"name {claim.name}" if owner is not None else f"id {claim.vm_id}"
            raise PpecError(
                "vm.exists",
                f"{claim.subject}: the {what} is taken on this host",
                hint="Choose another name, or delete the VM that has it.",
                subject=claim.subject,
                details={"vm_id": str(owner or claim.vm_id)},
            )

    def _has_room(self, claim: Claim, cores: int) -> bool:
        return all(wanted <= free for _, wanted, free in self._wanted_and_free(claim, cores))

    def _refuse_excess(self, claim: Claim, cores: int) -> None:
        for resource, wanted, free in self._wanted_and_free(claim, cores):
            if wanted > free:
                raise _no_capacity(claim, resource, wanted, max(0, free))

    def _wanted_and_free(self, claim: Claim, cores: int) -> tuple[tuple[str, int, int], ...]:
        return (
            ("cores", cores, self._totals.cores_free),
            ("memory_mib", claim.memory_mib, self._totals.memory_free_mib),
            ("disk_mib", claim.disk_mib, self._totals.disk_free_mib),
        )

    def _decided(self) -> None:
        self._totals.undecided -= 1
        self._totals.lock.notify_all()

    def _move_totals(self, cores: int, memory_mib: int, disk_mib: int) -> None:
        self._totals.cores_free -= cores
        self._totals.memory_free_mib -= memory_mib
        self._totals.disk_free_mib -= disk_mib

    def _give_back(self, name: str, vm_id: UUID, cores: int, memory_mib: int, disk_mib: int) -> None:
        with self._totals.lock:
            self._move_totals(-cores, -memory_mib, -disk_mib)
            if self._totals.names.get(name) == vm_id:
                del self._totals.names[name]
            self._decided()

    def _cores_for(self, claim: Claim) -> int:
        cells = [self._topology.by_cell[c] for c in claim.cells if c in self._topology.by_cell]
        width = max((cell.threads_per_core for cell in cells), default=1)
        return -(-claim.vcpus // width)

    def _core_count(self, cpus: frozenset[int]) -> int:
        """Cores that VMs may have among these CPUs: a foreign domain on reserved cores takes nothing from them."""
        usable = (core for cell in self._topology.cells for core in self._empty_pool.usable_of(cell))
        return sum(1 for core in usable if not cpus.isdisjoint(core.cpus))

    # --- details ------------------------------------------------------------------------------------------------

    def _reserve_details(self, claim: Claim, request: PinRequest) -> NumaPlan:
        with self._details.lock:
            if claim.vm_id in self._details.holdings:
                raise PpecError("vm.exists", f"{claim.subject} is held on this host already", subject=claim.subject)
            plan = plan_pins(self._details.pool, request)
            memory = self._split_memory(claim, plan.cells)
            self._details.pool = self._details.pool.take(plan.cpus)
            self._details.holdings[claim.vm_id] = Holding(
                claim.vm_id, claim.name, frozenset(plan.cpus), memory, claim.disk_mib, committed=False
            )
            return plan

    def _split_memory(self, claim: Claim, cells: tuple[int, ...]) -> dict[int, int]:
        free = {cell: max(0, self._memory_free_mib(cell)) for cell in cells}
        if claim.memory_mib > sum(free.values()):
            raise _no_capacity(claim, "memory_mib", claim.memory_mib, sum(free.values()), cells)
        return _even_shares(claim.memory_mib, free)

    def _memory_free_mib(self, cell: int) -> int:
        held = sum(h.memory_by_cell_mib.get(cell, 0) for h in self._details.holdings.values())
        return self._topology.by_cell[cell].memory_mib - self._reserved_memory_mib[cell] - held

    def _holding_of(self, domain: Domain) -> Holding:
        known = domain.metadata
        pins = known.pins if known else domain.pins
        named = known.cells if known else domain.memory_cells
        cells = [cell for cell in named if cell in self._topology.by_cell] or [self._emptiest_cell()]
        memory_mib = known.memory_mib if known else domain.memory_mib
        shares = _even_shares(memory_mib, {cell: max(0, self._memory_free_mib(cell)) for cell in cells})
        shares[cells[0]] = shares.get(cells[0], 0) + memory_mib - sum(shares.values())
        whole = self._empty_pool.take(pin.pcpu for pin in pins).taken
        disk_mib = known.disk_mib if known else 0
        return Holding(domain.vm_id, domain.name, whole, shares, disk_mib, committed=True, foreign=known is None)

    def _emptiest_cell(self) -> int:
        return max(self._topology.by_cell, key=lambda cell: (self._memory_free_mib(cell), -cell))


def _even_shares(amount: int, free: Mapping[int, int]) -> dict[int, int]:
    """Equal shares as far as they go: what one cell lacks, the others give. At most what is free in all."""
    shares: dict[int, int] = {}
    order = sorted(free, key=lambda cell: (free[cell], cell))
    for position, cell in enumerate(order):
        share = min(free[cell], -(-amount // (len(order) - position)))
        shares[cell] = share
        amount -= share
    return shares


def _no_capacity(
    claim: Claim, resource: str, wanted: int, free: int, cells: tuple[int, ...] | None = None
) -> PpecError:
    where = f"NUMA cells {list(cells)}" if cells else "this host"
    return PpecError(
        "host.no_capacity",
        f"{claim.subject} asks for {wanted} {resource}; {free} are free on {where}",
        hint="Plan again: the host has given it to somebody else since.",
        subject=claim.subject,
        details={"resource": resource, "wanted": wanted, "free": free, **({"cells": list(cells)} if cells else {})},
    )
