# SPDX-License-Identifier: Apache-2.0
"""What a VM would hold after an admission, a resize or a move. Nothing is entered here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from uuid import UUID

from ppec_agentd.ledger.claims import Claim, Holding, Move, memory_amount, no_capacity
from ppec_agentd.ledger.drives import CellDrives
from ppec_agentd.ledger.memory import CellMemory
from ppec_agentd.ledger.rebuild import plan_of
from ppec_agentd.numa import CpuPool, NumaPlan, PinRequest, plan_pins, replan
from ppec_agentd.numa.shared import shared_by_cell
from ppec_contract.errors import PpecError
from ppec_contract.vm import CpuPolicy, NumaPolicy, whole_huge_pages


@dataclass(frozen=True, slots=True)
class Planner:
    """Plans against the host as it is held now."""

    pool: CpuPool
    memory: CellMemory
    drives: CellDrives

    def admitted(self, claim: Claim) -> Holding:
        _refuse_part_pages(claim.subject, claim.memory_mib, claim.policy)
        plan = plan_pins(self.pool, claim.request())
        memory = self.memory.split(claim.subject, claim.memory_mib, plan.cells, claim.policy.huge_page_kib)
        return Holding(
            vm_id=claim.vm_id,
            name=claim.name,
            plan=with_memory(claim.subject, plan, memory),
            cpus=frozenset(plan.cpus),
            memory_by_cell_mib=memory,
            disk_mib=claim.disk_mib,
            committed=False,
            policy=claim.policy,
            vcpus=claim.vcpus,
            max_vcpus=claim.max_vcpus,
            max_memory_mib=claim.max_memory_mib,
            shared_by_cell=self._shared(plan, claim.vcpus),
            pool=claim.pool,
            drives=self.drives.choose(claim.subject, claim.nvme_drives, claim.cells),
            locked=claim.nvme_drives > 0,
        )

    def resized(self, held: Holding, vcpus: int, memory_mib: int) -> Holding:
        _refuse_part_pages(held.subject, memory_mib, held.policy)
        request = PinRequest(vcpus, held.plan.cells, held.subject, held.policy, held.max_vcpus)
        plan = replan(self.pool, held.plan, request)
        memory = self.memory.resplit(held.subject, memory_mib, held.memory_by_cell_mib, held.page_kib)
        return replace(
            held,
            plan=with_memory(held.subject, plan, memory),
            # Its domain may have been found on CPUs that it was never granted: those stay its own.
            cpus=frozenset(plan.cpus) | (held.cpus - frozenset(held.plan.cpus)),
            memory_by_cell_mib=memory,
            vcpus=vcpus,
            max_vcpus=max(vcpus, held.max_vcpus) if held.max_vcpus else 0,
            max_memory_mib=max(memory_mib, held.max_memory_mib) if held.max_memory_mib else 0,
            shared_by_cell=self._shared(plan, vcpus),
        )

    def moved(self, held: Holding, move: Move) -> Holding:
        self._refuse_wrong_move(held, move)
        request = PinRequest(held.vcpus, move.cells, held.subject, held.policy, held.max_vcpus)
        plan = plan_of(self.pool, request, move.pins)
        memory = self.memory.forced(held.memory_mib, plan.cells, held.page_kib)
        if set(plan.cells) == set(held.plan.cells):
            memory = dict(held.memory_by_cell_mib)
        return replace(
            held,
            plan=with_memory(held.subject, plan, memory),
            cpus=frozenset(plan.cpus),
            memory_by_cell_mib=memory,
            shared_by_cell=self._shared(plan, held.vcpus),
        )

    def refuse_crowded(self, held: Holding) -> None:
        """Raises `host.no_capacity` if a cell of this VM, entered already, now holds more than it has."""
        for cell in held.plan.cells:
            over = -self.memory.free_mib(cell, held.page_kib)
            wanted = held.memory_by_cell_mib.get(cell, 0)
            if over > 0 and wanted:
                resource, amount = memory_amount(wanted, held.page_kib)
                free = memory_amount(max(0, wanted - over), held.page_kib)[1]
                raise no_capacity(held.subject, resource, amount, free, (cell,))
            shared = held.shared_by_cell.get(cell, 0)
            over = -self.pool.shared_free(self.pool.topology.by_cell[cell])
            if over > 0 and shared:
                raise no_capacity(held.subject, "shared_vcpus", shared, max(0, shared - over), (cell,))

    def _shared(self, plan: NumaPlan, vcpus: int) -> Mapping[int, int]:
        return shared_by_cell(self.pool, plan.cells, vcpus) if plan.shared_cpus else {}

    def _refuse_wrong_move(self, held: Holding, move: Move) -> None:
        """The rules that `plan_pins` keeps by itself, for pins that somebody else chose."""
        dedicated = held.policy.cpus is CpuPolicy.DEDICATED
        pcpus = [pin.pcpu for pin in move.pins]
        known = self.pool.topology.cell_of_cpu
        usable = {
            cpu: core.socket
            for number in set(move.cells) & self.pool.topology.by_cell.keys()
            for core in self.pool.usable_of(self.pool.topology.by_cell[number])
            for cpu in core.cpus
        }
        wrong = ""
        if held.plan.guest_cells:
            wrong = "its guest was shown the cells it is on, and stays there"
        elif held.locked:
            wrong = "it has devices of the host (NVMe drives), and its memory is locked where it is"
        elif not move.cells or not set(move.cells) <= self.pool.topology.by_cell.keys():
            wrong = f"this host has no cells {list(move.cells)}"
        elif sorted(pin.vcpu for pin in move.pins) != list(range(held.vcpus if dedicated else 0)):
            wrong = f"it has {held.vcpus if dedicated else 0} vCPUs to pin; the move pins {len(pcpus)}"
        elif len(set(pcpus)) != len(pcpus):
            wrong = "two of its vCPUs would run on one CPU"
        elif outside := sorted(cpu for cpu in pcpus if cpu not in usable):
            wrong = f"CPUs {outside} are reserved, shared, or not on cells {list(move.cells)}"
        elif len({usable[cpu] for cpu in pcpus if cpu in known}) > 1:
            wrong = "a VM stays on one socket"
        if wrong:
            raise PpecError(
                "request.invalid",
                f"{held.subject} can't be moved: {wrong}",
                subject=held.subject,
                details={"cells": list(move.cells), "cpus": pcpus},
            )


def with_memory(subject: str, plan: NumaPlan, memory: Mapping[int, int]) -> NumaPlan:
    """The plan with the memory of each guest cell. Raises `host.no_capacity` for a guest cell left without any."""
    guest_cells = tuple(replace(cell, memory_mib=memory.get(cell.cell, 0)) for cell in plan.guest_cells)
    for cell in guest_cells:
        if not cell.memory_mib:
            raise no_capacity(subject, "memory_mib", 1, 0, (cell.cell,))
    return replace(plan, guest_cells=guest_cells)


def refuse_overlap(moved: Iterable[Holding], others: Iterable[Holding]) -> None:
    """Raises `vm.wrong_state` if any of these would be on a CPU of another."""
    owner = {cpu: held for held in others for cpu in held.cpus}
    for held in moved:
        clash = sorted(cpu for cpu in held.cpus if cpu in owner)
        if clash:
            raise PpecError(
                "vm.wrong_state",
                f"{held.subject}: CPUs {clash} belong to {owner[clash[0]].subject}",
                hint="Plan again: the host has changed since.",
                subject=held.subject,
                details={"cpus": clash, "held_by": str(owner[clash[0]].vm_id)},
            )
        owner |= dict.fromkeys(held.cpus, held)


def refuse_change(held: Holding) -> None:
    """Raises `vm.wrong_state` for a VM that is being changed already, or that PPEC did not make."""
    if held.foreign or held.pending:
        why = "was not made by PPEC and is left alone" if held.foreign else "is being resized or moved already"
        raise PpecError("vm.wrong_state", f"{held.subject} {why}", subject=held.subject)


def not_held(vm_id: UUID) -> PpecError:
    return PpecError("vm.not_found", f"vm {vm_id} is not on this host", subject=f"vm {vm_id}")


def _refuse_part_pages(subject: str, memory_mib: int, policy: NumaPolicy) -> None:
    try:
        whole_huge_pages(memory_mib, policy)
    except ValueError as error:
        raise PpecError("request.invalid", f"{subject}: {error}", subject=subject) from error
