# SPDX-License-Identifier: Apache-2.0
"""The hypervisor port's resizing on libvirt: the definition for the next start, and what is plugged while a VM runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Any
from uuid import UUID
from xml.etree import ElementTree

import libvirt

from ppec_agentd.domain_xml.architecture import rules_for
from ppec_agentd.domain_xml.build import HostProfile
from ppec_agentd.domain_xml.devices.memory import Dimm
from ppec_agentd.domain_xml.metadata import NAMESPACE, metadata_element, parse_metadata
from ppec_agentd.domain_xml.observe import PluggedMemory, observe, plugged_memory
from ppec_agentd.domain_xml.resized import resized_xml
from ppec_agentd.hypervisor import DomainDefinition, DomainMetadata
from ppec_agentd.libvirt_connection import LibvirtConnection, LibvirtOptions
from ppec_agentd.libvirt_domains import must_find, wrong_state
from ppec_agentd.libvirt_power import time_to_lock_s
from ppec_contract.vm import VcpuPin, VmState

_log = logging.getLogger(__name__)

# libvirt puts its own prefix on the root; the one that the text declares has to be another.
_PREFIX = "ppec-vm"
_LOOK_EVERY_S = 0.5
# libvirt waits for the guest by itself, some seconds for each vCPU that goes.
_PLUG_TIMEOUT_S = 60.0


class LibvirtResize:
    """The part of `LibvirtHypervisor` that resizes domains."""

    _connection: LibvirtConnection
    _options: LibvirtOptions
    _profile: HostProfile

    async def redefine(self, definition: DomainDefinition) -> None:
        vm_id = definition.metadata.vm_id

        def work(connection: Any) -> None:
            domain = must_find(connection, vm_id)
            xml = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
            _refuse_foreign(vm_id, xml)
            connection.defineXML(resized_xml(xml, definition, self._profile))

        await self._connection.call("resize", vm_id, work)

    async def annotate(self, metadata: DomainMetadata) -> None:
        text = ElementTree.tostring(metadata_element(metadata).render(), encoding="unicode")

        def work(connection: Any) -> None:
            domain = must_find(connection, metadata.vm_id)
            element, live = libvirt.VIR_DOMAIN_METADATA_ELEMENT, libvirt.VIR_DOMAIN_AFFECT_LIVE
            domain.setMetadata(element, text, _PREFIX, NAMESPACE, live)

        await self._connection.call("annotate", metadata.vm_id, work)

    async def set_vcpus(self, vm_id: UUID, vcpus: int, pins: tuple[VcpuPin, ...], timeout_s: float) -> int:
        loop, what = asyncio.get_running_loop(), "plug vCPUs of"
        end = loop.time() + timeout_s

        def work(connection: Any) -> tuple[int, int]:
            domain = must_find(connection, vm_id)
            now, most = _vcpus(vm_id, domain)
            if now < vcpus <= most:
                self._pin(connection, domain, [(pin.vcpu, (pin.pcpu,)) for pin in pins if now <= pin.vcpu < vcpus])
                domain.setVcpusFlags(vcpus, libvirt.VIR_DOMAIN_AFFECT_LIVE)
            elif vcpus < now:
                _unplug(connection, domain, vcpus)
            return now, _vcpus(vm_id, domain)[0]

        def fence_in(connection: Any) -> int:
            domain = must_find(connection, vm_id)
            now = _vcpus(vm_id, domain)[0]
            self._fence_in(connection, domain, now, before)
            return now

        before, now = await self._connection.call(what, vm_id, work, _PLUG_TIMEOUT_S)
        asked = now
        # In calls of their own: a guest that takes its time must not keep a thread that others need.
        while vcpus < now and vcpus < before and loop.time() < end:
            await asyncio.sleep(_LOOK_EVERY_S)
            now = await self._connection.call(what, vm_id, lambda connection: _count(connection, vm_id))
            if vcpus < now < asked:
                # libvirt asks for one at a time, and for no other once it has given up waiting for one.
                _, now = await self._connection.call(what, vm_id, work, _PLUG_TIMEOUT_S)
                asked = now
        return now if now >= before else await self._connection.call(what, vm_id, fence_in)

    async def grow_memory(self, vm_id: UUID, cells_mib: tuple[int, ...]) -> bool:
        block_mib = rules_for(self._profile.architecture).memory_block_mib

        def work(connection: Any) -> bool:
            domain = must_find(connection, vm_id)
            _must_run(vm_id, domain, "plug memory into")
            dimms = _dimms(plugged_memory(domain.XMLDesc()), cells_mib, block_mib)
            for dimm in dimms or ():
                text = ElementTree.tostring(dimm.render(), encoding="unicode")
                domain.attachDeviceFlags(text, libvirt.VIR_DOMAIN_AFFECT_LIVE)
            return dimms is not None

        timeout_s = await self._plug_timeout_s(vm_id, sum(cells_mib))
        return await self._connection.call("plug memory into", vm_id, work, timeout_s)

    async def _plug_timeout_s(self, vm_id: UUID, memory_mib: int) -> float:
        """Of a VM with devices of the host what is plugged is locked, too, before the call returns."""

        def locks_s(connection: Any) -> float:
            xml = must_find(connection, vm_id).XMLDesc()
            plugged_mib = max(0, memory_mib - sum(plugged_memory(xml).cells_mib))
            return time_to_lock_s(observe(xml, VmState.UNKNOWN).domain, plugged_mib)

        return self._options.call_timeout_s + await self._connection.call("look at", vm_id, locks_s)

    def _fence_in(self, connection: Any, domain: Any, now: int, before: int) -> None:
        """vCPUs that are gone keep their pins: plugged again by hand, they would run where another VM is by then."""
        pinned = domain.vcpuPinInfo(libvirt.VIR_DOMAIN_AFFECT_LIVE)
        own = {cpu for on_cpus in pinned[:now] for cpu, on in enumerate(on_cpus) if on}
        self._pin(connection, domain, [(vcpu, own) for vcpu in range(now, before)])

    def _pin(self, connection: Any, domain: Any, wanted: Iterable[tuple[int, Iterable[int]]]) -> None:
        """A declared topology's CPUs don't exist: there nothing is pinned."""
        if not self._profile.bind:
            return
        cpus = connection.getCPUMap()[0]
        for vcpu, on in wanted:
            chosen = set(on)
            bits = tuple(cpu in chosen for cpu in range(cpus))
            domain.pinVcpuFlags(vcpu, bits, libvirt.VIR_DOMAIN_AFFECT_LIVE)


def _vcpus(vm_id: UUID, domain: Any) -> tuple[int, int]:
    """How many there are, and how many there can be, while it runs. Raises `vm.wrong_state` if it doesn't."""
    _must_run(vm_id, domain, "plug vCPUs of")
    live = libvirt.VIR_DOMAIN_AFFECT_LIVE
    return domain.vcpusFlags(live), domain.vcpusFlags(live | libvirt.VIR_DOMAIN_VCPU_MAXIMUM)


def _must_run(vm_id: UUID, domain: Any, what: str) -> None:
    if not domain.isActive():
        raise wrong_state(vm_id, what, "is off")


def _count(connection: Any, vm_id: UUID) -> int:
    return _vcpus(vm_id, must_find(connection, vm_id))[0]


def _unplug(connection: Any, domain: Any, vcpus: int) -> None:
    """Asks the guest; whoever wants to know looks how many are left, for it may also obey later."""
    try:
        domain.setVcpusFlags(vcpus, libvirt.VIR_DOMAIN_AFFECT_LIVE)
    except libvirt.libvirtError as error:
        if not connection.isAlive():
            raise
        _log.info("vm %s keeps vCPUs: %s", domain.UUIDString(), error.get_error_message())


def _dimms(now: PluggedMemory, wanted_mib: tuple[int, ...], block_mib: int) -> list[Dimm] | None:
    """What to plug so that each of the guest's cells has so much; None if that can't be had without a new start."""
    if not block_mib or len(now.cells_mib) != len(wanted_mib) or sum(wanted_mib) > now.most_mib:
        return None
    missing = [wanted - has for wanted, has in zip(wanted_mib, now.cells_mib, strict=True)]
    if any(mib < 0 or mib % block_mib for mib in missing) or sum(map(bool, missing)) > now.slots_free:
        return None
    return [Dimm(size=mib * 1024, guest_cell=cell) for cell, mib in enumerate(missing) if mib]


def _refuse_foreign(vm_id: UUID, xml: str) -> None:
    root = ElementTree.fromstring(xml)  # noqa: S314 - libvirt's own document
    try:
        ours = parse_metadata(root.find("metadata"))
    except ValueError:
        ours = None
    if ours is None:
        raise wrong_state(vm_id, "resize", "was not made by PPEC")
