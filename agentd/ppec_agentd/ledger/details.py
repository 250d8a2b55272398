# SPDX-License-Identifier: Apache-2.0
"""The second section of the ledger: which VM holds which CPUs and drives, and how much memory of which cell.

Every change is planned first and entered whole or not at all. Methods that change something return the amounts it took
(negative: gave back), for the totals.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from uuid import UUID

from ppec_agentd.hypervisor import Domain
from ppec_agentd.ledger import rebuild
from ppec_agentd.ledger.changes import Planner, not_held, refuse_change, refuse_overlap
from ppec_agentd.ledger.claims import (
    CORES,
    NVME_DRIVES,
    SHARED,
    Amounts,
    Claim,
    Holding,
    Move,
    added,
    disk_resource,
    memory_amount,
    negated,
)
from ppec_agentd.ledger.drives import CellDrives, DriveState
from ppec_agentd.ledger.memory import CellMemory
from ppec_agentd.numa import CpuPool, NumaPlan
from ppec_agentd.topology import Cell
from ppec_contract.errors import PpecError
from ppec_contract.host import CellReport, HugePagesReport


class DetailsSection:
    """Under a lock of its own, held for arithmetic alone."""

    def __init__(self, pool: CpuPool, memory: CellMemory, drives: CellDrives) -> None:
        self._usable = {
            cpu: core.cpus[0] for cell in pool.topology.cells for core in pool.usable_of(cell) for cpu in core.cpus
        }
        self._pool = pool
        self._memory = memory
        self._drives = drives
        self._holders: Counter[int] = Counter()
        self._holdings: dict[UUID, Holding] = {}
        self._lock = threading.Lock()

    # --- changing -----------------------------------------------------------------------------------------------

    def reserve(self, claim: Claim) -> tuple[NumaPlan, Amounts]:
        """Raises `vm.exists`, `host.no_capacity` and what `numa.plan_pins` raises."""
        with self._lock:
            if claim.vm_id in self._holdings:
                raise PpecError("vm.exists", f"{claim.subject} is held on this host already", subject=claim.subject)
            held = self._planner().admitted(claim)
            return held.plan, self._enter(held)

    def resize(self, vm_id: UUID, vcpus: int, memory_mib: int) -> tuple[NumaPlan, Amounts]:
        """Raises `vm.not_found`, `vm.wrong_state`, `request.invalid`, `host.no_capacity`, `vm.odd_vcpus` and
        `vm.exceeds_socket`."""
        with self._lock:
            held = self._changeable(vm_id)
            resized = replace(self._planner(held).resized(held, vcpus, memory_mib), before=held)
            return resized.plan, self._swap([resized])

    def repin(self, moves: Sequence[Move]) -> tuple[dict[UUID, NumaPlan], Amounts]:
        """Raises `vm.not_found`, `vm.wrong_state`, `request.invalid`, `host.no_capacity` and `vm.exists`."""
        with self._lock:
            before = {move.vm_id: self._changeable(move.vm_id) for move in moves}
            if len(before) != len(moves):
                raise PpecError("request.invalid", "the moves name a VM twice", subject="request")
            moved = [self._planner().moved(before[move.vm_id], move) for move in moves]
            refuse_overlap(moved, self._others(before))
            taken = self._swap([replace(held, before=before[held.vm_id]) for held in moved])
            try:
                self._refuse_crowded(moved)
            except PpecError:
                self._swap(list(before.values()))
                raise
            return {held.vm_id: held.plan for held in moved}, taken

    def commit(self, vm_ids: Iterable[UUID]) -> Amounts:
        """Raises KeyError."""
        with self._lock:
            held = [self._holdings[vm_id] for vm_id in vm_ids]
            self._drives.use(drive for one in held if not one.committed for drive in one.drives)
            self._holdings |= {one.vm_id: replace(one, committed=True) for one in held if not one.pending}
            return self._swap([replace(one, committed=True, before=None) for one in held if one.pending])

    def revert(self, vm_ids: Iterable[UUID]) -> Amounts:
        """VMs that no change is pending for are left alone. Raises KeyError, and `vm.wrong_state` for an overlap."""
        with self._lock:
            held = {vm_id: self._holdings[vm_id] for vm_id in vm_ids}
            back = [then for now in held.values() if (then := now.before) is not None]
            refuse_overlap(back, self._others(held))
            return self._swap(back)

    def release(self, vm_id: UUID) -> tuple[Holding, Amounts] | None:
        with self._lock:
            held = self._holdings.get(vm_id)
            return None if held is None else (held, self._leave(vm_id))

    def adopt(self, domain: Domain) -> tuple[Holding, Amounts] | None:
        """None if it is known already."""
        with self._lock:
            if domain.vm_id in self._holdings:
                return None
            held = rebuild.holding_of(domain, self._pool, self._memory, self._drives)
            return held, self._enter(held)

    def observe(self, domain: Domain, seen: Holding) -> Amounts:
        """`seen` is what it held before the domain was read: if it changed since, the domain tells nothing new."""
        with self._lock:
            if self._holdings.get(domain.vm_id) is not seen or seen.pending or not seen.committed:
                return {}
            if rebuild.as_held(domain, seen, self._pool, self._drives):
                return {}
            taken = self._leave(domain.vm_id)
            now = rebuild.observed(domain, seen, self._pool, self._memory, self._drives)
            return added(taken, self._enter(now))

    def mark_drive(self, drive: str, state: DriveState) -> Amounts:
        with self._lock:
            return {NVME_DRIVES: self._drives.mark(drive, state)}

    # --- looking ------------------------------------------------------------------------------------------------

    def holding(self, vm_id: UUID) -> Holding | None:
        with self._lock:
            return self._holdings.get(vm_id)

    def holdings(self) -> tuple[Holding, ...]:
        with self._lock:
            return tuple(self._holdings.values())

    def held(self) -> dict[UUID, Holding]:
        with self._lock:
            return dict(self._holdings)

    def pool(self) -> CpuPool:
        with self._lock:
            return self._pool

    def drives(self) -> dict[str, DriveState]:
        with self._lock:
            return self._drives.states()

    def drive_uses(self, drive: str) -> int:
        with self._lock:
            return self._drives.uses(drive)

    def cells(self) -> tuple[CellReport, ...]:
        with self._lock:
            return tuple(self._cell_report(cell) for cell in self._pool.topology.cells)

    def _cell_report(self, cell: Cell) -> CellReport:
        pool, memory = self._pool, self._memory
        shared = len(pool.shared_of(cell))
        return CellReport(
            cell=cell.cell,
            socket=cell.socket,
            threads_per_core=cell.threads_per_core,
            cores=len(cell.cores),
            cores_reserved=len(pool.reserved_of(cell)) + shared,
            cores_free=len(pool.free_of(cell)),
            memory_mib=cell.memory_mib,
            memory_reserved_mib=memory.reserved_mib(cell.cell),
            memory_free_mib=max(0, memory.free_mib(cell.cell)),
            cores_shared=shared,
            shared_vcpus=pool.shared_capacity(cell),
            shared_vcpus_free=max(0, pool.shared_free(cell)),
            huge_pages=tuple(
                HugePagesReport(
                    size_kib=pages.size_kib,
                    pages=pages.count,
                    pages_free=max(0, memory.free_mib(cell.cell, pages.size_kib)) * 1024 // pages.size_kib,
                )
                for pages in cell.huge_pages
            ),
            nvme_drives=self._drives.count(cell.cell, DriveState.FREE, DriveState.HELD, DriveState.SETTLING),
            nvme_drives_free=self._drives.count(cell.cell, DriveState.FREE),
        )

    # --- under the lock -----------------------------------------------------------------------------------------

    def _planner(self, without: Holding | None = None) -> Planner:
        """`without`: as if this VM's shared vCPUs were free, for planning them anew."""
        pool = self._pool
        return Planner(pool.share(_negative(without.shared_by_cell)) if without else pool, self._memory, self._drives)

    def _changeable(self, vm_id: UUID) -> Holding:
        held = self._holdings.get(vm_id)
        if held is None:
            raise not_held(vm_id)
        refuse_change(held)
        return held

    def _others(self, but: Mapping[UUID, Holding]) -> list[Holding]:
        return [held.kept() for vm_id, held in self._holdings.items() if vm_id not in but]

    def _refuse_crowded(self, moved: Iterable[Holding]) -> None:
        """After the fact, as several VMs may move into one cell: what each needs must have been there."""
        for held in moved:
            self._planner().refuse_crowded(held)

    def _enter(self, held: Holding) -> Amounts:
        self._holdings[held.vm_id] = held
        kept = held.kept()
        cores = self._count(kept.cpus, lambda cpu: self._holders[cpu] == 0)
        self._holders.update(kept.cpus)
        self._pool = self._pool.take(kept.cpus).share(kept.shared_by_cell)
        self._memory.take(kept.memory_by_cell_mib, kept.page_kib)
        if kept.committed:
            self._drives.use(kept.drives)
        return {**_amounts(kept, cores), NVME_DRIVES: self._drives.take(kept.drives)}

    def _leave(self, vm_id: UUID) -> Amounts:
        kept = self._holdings.pop(vm_id).kept()
        self._holders.subtract(kept.cpus)
        # CPUs of a foreign domain may be shared with others: only what nobody holds any more becomes free.
        free = frozenset(cpu for cpu in kept.cpus if self._holders[cpu] == 0)
        self._pool = replace(self._pool, taken=self._pool.taken - free).share(_negative(kept.shared_by_cell))
        self._memory.give(kept.memory_by_cell_mib, kept.page_kib)
        # Gives no free drives back: they settle first.
        self._drives.give(kept.drives)
        return negated(_amounts(kept, self._count(free, lambda cpu: True)))

    def _swap(self, fresh: Sequence[Holding]) -> Amounts:
        """Enters these in place of what the same VMs held."""
        taken: Amounts = {}
        for held in fresh:
            taken = added(taken, self._leave(held.vm_id))
        for held in fresh:
            taken = added(taken, self._enter(held))
        return taken

    def _count(self, cpus: Iterable[int], counts: Callable[[int], bool]) -> int:
        """Cores among these CPUs that VMs may have: a foreign domain on reserved cores takes nothing from them."""
        return len({self._usable[cpu] for cpu in cpus if cpu in self._usable and counts(cpu)})


def _amounts(held: Holding, cores: int) -> Amounts:
    resource, amount = memory_amount(held.memory_mib, held.page_kib)
    shared = sum(held.shared_by_cell.values())
    return {CORES: cores, resource: amount, disk_resource(held.pool): held.disk_mib, SHARED: shared}


def _negative(by_cell: Mapping[int, int]) -> dict[int, int]:
    return {cell: -amount for cell, amount in by_cell.items()}
