# SPDX-License-Identifier: Apache-2.0
"""What the host has given away: the blog's in-memory lockfile, in two sections under two locks.

*Totals* count cores, memory, huge pages, shared vCPUs, disk, storage pools and NVMe drives of the whole host; they are
small, and most refusals end there. *Details* say which VM holds which CPUs and drives, and how much memory of which
cell. A reservation takes from totals first, then from details; a release gives back in the opposite order, so that
totals never promise what details still hold. No lock is ever held over I/O, nor is one taken inside the other.

Pure and thread-safe. Nothing is stored: `adopt` rebuilds it from the domains' metadata.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar
from uuid import UUID

from ppec_agentd.hypervisor import Domain
from ppec_agentd.ledger.audit import Finding, audit
from ppec_agentd.ledger.claims import (
    CORES,
    DISK,
    NVME_DRIVES,
    SHARED,
    Amounts,
    Claim,
    Holding,
    Move,
    Totals,
    disk_resource,
    memory_amount,
    negated,
)
from ppec_agentd.ledger.details import DetailsSection
from ppec_agentd.ledger.drives import CellDrives, DriveState, drives_per_cell
from ppec_agentd.ledger.memory import CellMemory
from ppec_agentd.ledger.totals import TotalsSection
from ppec_agentd.numa import CpuPool, NumaPlan, PinRequest, plan_pins
from ppec_agentd.numa.pool import DEFAULT_SHARED_VCPUS_PER_CPU
from ppec_agentd.topology import Topology
from ppec_contract.host import CellReport, PoolReport
from ppec_contract.vm import CpuPolicy, SmtPolicy

_ANYWHERE = 1_000_000
_Result = TypeVar("_Result")


class Ledger:
    """Admission to one host. `reserve` → `commit` once the VM runs, or `release` at any time.

    A VM that is there is changed by `resize` or `repin` → `commit` once the hypervisor has done it, or `revert`.
    """

    def __init__(  # noqa: PLR0913 - a setting each
        self,
        topology: Topology,
        disk_mib: int,
        *,
        reserved_cores_per_cell: int = 0,
        reserved_memory_per_cell_mib: int = 0,
        shared_cores_per_cell: int = 0,
        shared_vcpus_per_cpu: int = DEFAULT_SHARED_VCPUS_PER_CPU,
        pools_mib: Mapping[str, int] | None = None,
        cell_by_drive: Mapping[str, int] | None = None,
    ) -> None:
        """`pools_mib` is what disks may take of each storage pool, by its name. What stands in any other pool is
        counted nonetheless. `cell_by_drive` are the NVMe drives for VMs; none is free before `mark_drive` says so."""
        pool = CpuPool(
            topology,
            reserved_cores_per_cell,
            shared_cores=shared_cores_per_cell,
            shared_vcpus_per_cpu=shared_vcpus_per_cpu,
        )
        memory = CellMemory(topology, reserved_memory_per_cell_mib)
        self._empty_pool = pool
        self._pools_mib = dict(sorted((pools_mib or {}).items()))
        self._largest = {smt: pool.largest_socket(smt) for smt in SmtPolicy}
        drives = dict(cell_by_drive or {})
        whole = {
            CORES: sum(len(pool.usable_of(cell)) for cell in topology.cells),
            DISK: disk_mib,
            **{disk_resource(name): size_mib for name, size_mib in self._pools_mib.items()},
            SHARED: sum(pool.shared_capacity(cell) for cell in topology.cells),
            NVME_DRIVES: len(drives),
            **memory.whole(),
        }
        self._totals = TotalsSection(whole, free={**whole, NVME_DRIVES: 0})
        self._details = DetailsSection(pool, memory, CellDrives(drives))

    # --- reserve, commit, release -------------------------------------------------------------------------------

    def reserve(self, claim: Claim) -> NumaPlan:
        """Takes cores, memory, disk, drives and the name for a VM.

        Raises `vm.exists` (name or id taken), `host.no_capacity` with `resource`, `wanted` and `free`, and what
        `numa.plan_pins` raises. A refusal takes nothing.
        """
        self._refuse_impossible(claim.request())
        estimate = self._estimate(claim)
        self._totals.admit(claim, estimate)
        try:
            plan, taken = self._details.reserve(claim)
        except BaseException:
            self._totals.forget(claim.name, claim.vm_id, negated(estimate))
            raise
        # The estimate was by the widest core: cells of mixed SMT width may have given more.
        self._totals.settle({name: amount - estimate.get(name, 0) for name, amount in taken.items()})
        return plan

    def commit(self, *vm_ids: UUID) -> None:
        """The VM stands as it was reserved, resized or moved: what it held before a change becomes free.

        Raises KeyError if nothing is held.
        """
        self._settled(lambda: self._details.commit(vm_ids))

    def revert(self, *vm_ids: UUID) -> None:
        """Takes back the resize or move that is pending for each of these VMs; it always finds its place free.

        VMs that moved into each other's places are reverted in one call: alone, `vm.wrong_state` says who is in the
        way. Without a pending change nothing happens. Raises KeyError if nothing is held.
        """
        self._settled(lambda: self._details.revert(vm_ids))

    def release(self, vm_id: UUID) -> bool:
        """Gives back all a VM holds; False if it held nothing."""
        self._totals.begin()
        released = self._details.release(vm_id)
        if released is None:
            self._totals.settle({})
            return False
        held, taken = released
        self._totals.forget(held.name, vm_id, taken)
        return True

    # --- changing a VM that is there ----------------------------------------------------------------------------

    def resize(self, vm_id: UUID, vcpus: int, memory_mib: int) -> NumaPlan:
        """The plan of this VM with so many vCPUs and so much memory; vCPUs that stay keep their CPUs.

        Until `commit` or `revert` it holds both, what it had and what it gets, so neither can fail for lack of room.
        Raises `vm.not_found`, `vm.wrong_state` (not ours, or a change is pending), `request.invalid` (not whole huge
        pages), and what `reserve` raises; a refusal changes nothing.
        """
        return self._changed(lambda: self._details.resize(vm_id, vcpus, memory_mib))

    def repin(self, moves: Sequence[Move]) -> dict[UUID, NumaPlan]:
        """Moves VMs to these CPUs and cells, all or none; the plans by VM. They may trade places.

        Until `commit` or `revert` each holds where it was and where it goes: memory needs room in both. Raises
        `vm.not_found`, `vm.wrong_state` (a CPU belongs to another VM, not ours, a change is pending), `request.invalid`
        (breaks a rule of placement) and `host.no_capacity` (memory).
        """
        return self._changed(lambda: self._details.repin(moves))

    # --- following what is there --------------------------------------------------------------------------------

    def adopt(self, domain: Domain) -> None:
        """Enters a domain that exists, whatever that does to the sums: it is there. Known ones are left alone."""
        adopted = self._details.adopt(domain)
        if adopted is not None:
            held, taken = adopted
            self._totals.enter(held.name, held.vm_id, taken)

    def follow(
        self, domains: Iterable[Domain], held_before: Mapping[UUID, Holding] | frozenset[UUID] = frozenset()
    ) -> None:
        """Brings the ledger in line with the domains that are there.

        `held_before` is `held()` from before the domains were read: what was created, changed or deleted since is not
        judged by a picture older than itself. Domains made by hand are adopted; what a committed VM held is released
        when its domain is gone. A mere reservation is left alone: its domain is yet to come. CPUs that somebody pinned
        a VM to by hand are its own as long as it is there, beside those it was granted: nobody else gets them. With
        `held_ids()` alone no changes are followed.
        """
        present = {domain.vm_id: domain for domain in domains}
        for held in self.holdings():
            if held.committed and held.vm_id in held_before and held.vm_id not in present:
                self.release(held.vm_id)
        # Whoever can be in one cell only comes first: the memory of the others is then split over what is left.
        for domain in sorted(present.values(), key=_cells_named):
            if domain.vm_id not in held_before:
                self.adopt(domain)
            elif isinstance(held_before, Mapping):
                self._observe(domain, held_before[domain.vm_id])

    def mark_drive(self, drive: str, state: DriveState) -> None:
        """Says how an NVMe drive is that nobody holds; without effect on one that is held."""
        self._settled(lambda: self._details.mark_drive(drive, state))

    def audit(self, domains: Iterable[Domain]) -> tuple[Finding, ...]:
        """How the domains, as just read, differ from what is held: see `ledger.audit`."""
        return audit(domains, self._details.holdings(), self._empty_pool)

    # --- looking ------------------------------------------------------------------------------------------------

    def holding(self, vm_id: UUID) -> Holding | None:
        return self._details.holding(vm_id)

    def holdings(self) -> tuple[Holding, ...]:
        return self._details.holdings()

    def held(self) -> Mapping[UUID, Holding]:
        """Who holds what at this moment."""
        return self._details.held()

    def held_ids(self) -> frozenset[UUID]:
        return frozenset(self._details.held())

    def pool(self) -> CpuPool:
        """The CPUs as they are held now; a value, for planning ahead."""
        return self._details.pool()

    def totals(self) -> Totals:
        """Free amounts can be below zero after `adopt` took in more than the host should hold."""
        return self._totals.totals()

    def drives(self) -> Mapping[str, DriveState]:
        """The NVMe drives for VMs, by their PCI addresses."""
        return self._details.drives()

    def drive_uses(self, drive: str) -> int:
        """How often domains have come to hold an NVMe drive in this ledger's life, those included that it was rebuilt
        from; a grant alone is no use."""
        return self._details.drive_uses(drive)

    def cells(self) -> tuple[CellReport, ...]:
        """Each cell as the report shows it; `…_free` is what the next VM could get."""
        return self._details.cells()

    def pools(self) -> tuple[PoolReport, ...]:
        """Each storage pool as the report shows it, by name."""
        free = self.totals().free
        return tuple(
            PoolReport(name=name, size_mib=size_mib, free_mib=max(0, free[disk_resource(name)]))
            for name, size_mib in self._pools_mib.items()
        )

    # ------------------------------------------------------------------------------------------------------------

    def _changed(self, change: Callable[[], tuple[_Result, Amounts]]) -> _Result:
        """Changes the details, then the totals by as much."""
        self._totals.begin()
        taken: Amounts = {}
        try:
            result, taken = change()
        finally:
            self._totals.settle(taken)
        return result

    def _observe(self, domain: Domain, seen: Holding) -> None:
        self._settled(lambda: self._details.observe(domain, seen))

    def _settled(self, change: Callable[[], Amounts]) -> None:
        self._changed(lambda: (None, change()))

    def _refuse_impossible(self, request: PinRequest) -> None:
        """Not a matter of what is free: the empty host refuses it, in its own words."""
        across = request.shared or request.policy.multi_cell
        if not across and request.vcpus > self._largest[request.smt]:
            plan_pins(self._empty_pool, request)

    def _estimate(self, claim: Claim) -> Amounts:
        resource, amount = memory_amount(claim.memory_mib, claim.policy.huge_page_kib)
        drives = drives_per_cell(claim.nvme_drives, claim.cells) * len(set(claim.cells))
        wanted = {resource: amount, disk_resource(claim.pool): claim.disk_mib, NVME_DRIVES: drives}
        if claim.policy.cpus is CpuPolicy.SHARED:
            return wanted | {SHARED: claim.vcpus}
        known = self._empty_pool.topology.by_cell
        width = max((known[cell].threads_per_core for cell in claim.cells if cell in known), default=1)
        cores = claim.vcpus if claim.policy.smt is SmtPolicy.ISOLATE else -(-claim.vcpus // width)
        return {CORES: cores} | wanted


def _cells_named(domain: Domain) -> int:
    ours = domain.metadata
    return len(ours.cells if ours else domain.memory_cells) or _ANYWHERE
