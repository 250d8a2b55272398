# SPDX-License-Identifier: Apache-2.0
"""The fake hypervisor's resizing and moving: records that have a size and a seat now, and those of their next start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol
from uuid import UUID

from ppec_agentd.hypervisor import Domain, DomainDefinition, DomainMetadata, EventKind, Seat
from ppec_contract.errors import PpecError
from ppec_contract.vm import VcpuPin, VmState

OFF = (VmState.STOPPED, VmState.CRASHED)
# As on x86: see domain_xml/architecture.py.
MEMORY_BLOCK_MIB = 128


class _Records(Protocol):
    """What resizing needs of the fake."""

    @property
    def deaf_guests(self) -> bool: ...

    def _find(self, vm_id: UUID) -> Domain | None: ...

    def _must_find(self, vm_id: UUID) -> Domain: ...

    def _put(self, domain: Domain, kind: EventKind | None) -> None: ...

    async def _change(self, method: str, vm_id: UUID, effect: Callable[[], bool]) -> bool: ...


class FakeResize:
    """The part of `FakeHypervisor` that resizes and moves domains."""

    async def redefine(self: _Records, definition: DomainDefinition) -> None:
        wanted = definition.metadata
        found = self._find(wanted.vm_id)

        def effect() -> bool:
            domain = self._find(wanted.vm_id)
            if domain is None and found is not None:
                # Found before it was deleted, and defined afterwards: it comes back.
                domain = replace(found, state=VmState.STOPPED)
            if domain is None:
                domain = self._must_find(wanted.vm_id)
            if not domain.managed:
                raise _wrong_state(wanted.vm_id, "resize", "was not made by PPEC")
            later = replace(domain, next=wanted)
            self._put(started_anew(later) if domain.state in OFF else later, EventKind.DEFINED)
            return True

        await self._change("redefine", wanted.vm_id, effect)

    async def annotate(self: _Records, metadata: DomainMetadata) -> None:
        def effect() -> bool:
            domain = _running(self._must_find(metadata.vm_id), "annotate")
            # The definition keeps what it had: a record without one of its own for the next start gets it now.
            self._put(replace(domain, metadata=metadata, next=domain.next or domain.metadata), None)
            return True

        await self._change("annotate", metadata.vm_id, effect)

    async def set_vcpus(self: _Records, vm_id: UUID, vcpus: int, pins: tuple[VcpuPin, ...], timeout_s: float) -> int:
        def effect() -> bool:
            domain = _running(self._must_find(vm_id), "plug vCPUs of")
            grows = domain.vcpus < vcpus <= domain.max_vcpus
            if grows or (vcpus < domain.vcpus and not self.deaf_guests):
                stay = tuple(pin for pin in domain.pins if pin.vcpu < vcpus)
                new = tuple(pin for pin in pins if domain.vcpus <= pin.vcpu < vcpus)
                self._put(replace(domain, vcpus=vcpus, pins=stay + new), None)
            return True

        await self._change("set_vcpus", vm_id, effect)
        return self._must_find(vm_id).vcpus

    async def grow_memory(self: _Records, vm_id: UUID, cells_mib: tuple[int, ...]) -> bool:
        def effect() -> bool:
            domain = _running(self._must_find(vm_id), "plug memory into")
            more = sum(cells_mib) - domain.memory_mib
            possible = 0 <= more <= domain.max_memory_mib - domain.memory_mib and more % MEMORY_BLOCK_MIB == 0
            if possible and more:
                self._put(replace(domain, memory_mib=sum(cells_mib)), None)
            return possible

        return await self._change("grow_memory", vm_id, effect)

    async def reseat(self: _Records, vm_id: UUID, seat: Seat) -> None:
        def effect() -> bool:
            domain = _running(self._must_find(vm_id), "move")
            self._put(replace(domain, pins=seat.pins, memory_cells=seat.cells), None)
            return True

        await self._change("reseat", vm_id, effect)


def started_anew(domain: Domain) -> Domain:
    """The record as its definition makes it: what a domain is that stops, or is redefined while it is off."""
    later = domain.next
    if later is None:
        return domain
    return replace(
        domain,
        vcpus=later.vcpus,
        memory_mib=later.memory_mib,
        max_vcpus=max(later.vcpus, later.max_vcpus),
        max_memory_mib=max(later.memory_mib, later.max_memory_mib),
        pins=later.pins,
        memory_cells=later.cells,
        metadata=later,
        next=None,
    )


def shown(domain: Domain) -> Domain:
    """As libvirt shows it: the next start is looked at only where the metadata says that it differs."""
    return domain if domain.metadata is not None and domain.metadata.pending else replace(domain, next=None)


def _running(domain: Domain, what: str) -> Domain:
    if domain.state in OFF:
        raise _wrong_state(domain.vm_id, what, "is off")
    return domain


def _wrong_state(vm_id: UUID, what: str, found: str) -> PpecError:
    return PpecError("vm.wrong_state", f"can't {what} vm {vm_id}: it {found}", subject=f"vm {vm_id}")
