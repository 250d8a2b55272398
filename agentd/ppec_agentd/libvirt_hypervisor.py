# SPDX-License-Identifier: Apache-2.0
"""The hypervisor port on libvirt: each method is one blocking function that runs in a thread of `LibvirtConnection`.

The files named libvirt_… are the only ones that import libvirt: this one reads and defines domains, libvirt_power.py
switches them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from uuid import UUID

import libvirt

from ppec_agentd.domain_xml.build import HostProfile, domain_xml
from ppec_agentd.domain_xml.observe import observe
from ppec_agentd.hypervisor import Domain, DomainDefinition, EventCallback, HostFacts
from ppec_agentd.libvirt_connection import LibvirtConnection, LibvirtOptions
from ppec_agentd.libvirt_console import LibvirtConsole
from ppec_agentd.libvirt_domains import STATES, false_if_gone, find, find_name, unless, wrong_state
from ppec_agentd.libvirt_guest_agent import LibvirtGuestAgent
from ppec_agentd.libvirt_host_devices import LibvirtHostDevices
from ppec_agentd.libvirt_power import LibvirtPower
from ppec_agentd.libvirt_reseat import LibvirtReseat
from ppec_agentd.libvirt_resize import LibvirtResize
from ppec_agentd.lifecycle import EventFanout, wait_for_state
from ppec_agentd.local_host import choose_domain_type, read_local_host
from ppec_agentd.topology import parse_capabilities
from ppec_contract.errors import PpecError
from ppec_contract.vm import VmState

__all__ = ["LibvirtHypervisor", "LibvirtOptions"]

_log = logging.getLogger(__name__)

_UNDEFINE_ALL = (
    libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
    | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
)


class LibvirtHypervisor(
    LibvirtGuestAgent, LibvirtConsole, LibvirtPower, LibvirtResize, LibvirtReseat, LibvirtHostDevices
):
    """`Hypervisor` on one libvirt connection."""

    def __init__(self, options: LibvirtOptions | None = None) -> None:
        LibvirtGuestAgent.__init__(self)
        LibvirtConsole.__init__(self)
        self._options = options or LibvirtOptions()
        self._fanout = EventFanout()
        self._connection = LibvirtConnection(self._options, self._fanout)
        local = read_local_host()
        self._profile = HostProfile(
            architecture=local.architecture,
            domain_type=choose_domain_type(local, self._options.domain_type),
            bind=self._options.declared_topology is None,
            disk_cache=self._options.disk_cache,
        )

    async def open(self) -> None:
        await self._connection.open()

    async def close(self) -> None:
        await self.close_consoles()
        await self._connection.close()

    # What is there

    async def facts(self) -> HostFacts:
        def read(connection: Any) -> tuple[str, int, int]:
            return connection.getCapabilities(), connection.getLibVersion(), connection.getVersion()

        capabilities, libvirt_version, qemu_version = await self._connection.call("read the facts of", None, read)
        local = read_local_host()
        return HostFacts(
            topology=self._options.declared_topology or parse_capabilities(capabilities),
            architecture=local.architecture,
            domain_type=self._profile.domain_type,
            libvirt_version=_version(libvirt_version),
            qemu_version=_version(qemu_version),
            kernel_version=local.kernel_version,
            boot_id=local.boot_id,
            bridges=local.bridges,
        )

    async def domains(self) -> tuple[Domain, ...]:
        def read(connection: Any) -> list[Domain]:
            read_all = (self._observe(domain) for domain in connection.listAllDomains())
            return [domain for domain in read_all if domain is not None]

        listed = await self._connection.call("list the domains of", None, read)
        return tuple(sorted(listed, key=lambda domain: domain.vm_id))

    async def domain(self, vm_id: UUID) -> Domain | None:
        def read(connection: Any) -> Domain | None:
            there = find(connection, vm_id)
            return None if there is None else self._observe(there)

        return await self._connection.call("look at", vm_id, read)

    def _observe(self, domain: Any) -> Domain | None:
        """None if the domain vanished meanwhile."""
        try:
            state, xml = domain.state()[0], domain.XMLDesc()
            find_volume = partial(_volume_path, domain.connect())
            seen = observe(xml, STATES.get(state, VmState.UNKNOWN), find_volume)
            if not seen.domain.managed and domain.isActive() and domain.isPersistent():
                # By hand, a disk or a device may be given to the next start alone.
                later = observe(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE), VmState.STOPPED, find_volume)
                disks = dict.fromkeys((*seen.domain.disks, *later.domain.disks))
                devices = dict.fromkeys((*seen.domain.host_devices, *later.domain.host_devices))
                both = replace(seen.domain, disks=tuple(disks), host_devices=tuple(devices))
                seen = replace(seen, domain=both)
            if seen.domain.metadata is not None and seen.domain.metadata.pending and domain.isPersistent():
                later = observe(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE), VmState.STOPPED, find_volume)
                seen = replace(seen, domain=replace(seen.domain, next=later.domain.metadata))
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return None
            raise
        if seen.damage:
            _log.warning("domain %s is treated as foreign: %s", seen.domain.vm_id, seen.damage)
        metadata = seen.domain.metadata
        if metadata is None or self._profile.bind:
            return seen.domain
        there = tuple(pin for pin in metadata.pins if pin.vcpu < seen.domain.vcpus)
        return replace(seen.domain, pins=there, memory_cells=metadata.cells)

    def lingers(self, vm_id: UUID) -> bool:
        return self._connection.lingers(vm_id)

    # What changes it

    async def define(self, definition: DomainDefinition) -> bool:
        vm_id, name = definition.metadata.vm_id, definition.metadata.name
        xml = domain_xml(definition, self._profile)

        def work(connection: Any) -> bool:
            fresh = self._check_free(connection, vm_id, name)
            try:
                connection.defineXML(xml)
            except libvirt.libvirtError:
                # Somebody else may have taken the name since; if so this says it better.
                self._check_free(connection, vm_id, name)
                raise
            return fresh

        return await self._connection.call("define", vm_id, work)

    def _check_free(self, connection: Any, vm_id: UUID, name: str) -> bool:
        """Whether neither id nor name is in use; False if both are those of the same managed domain."""
        by_id, by_name = find(connection, vm_id), find_name(connection, name)
        if by_name is not None and by_name.UUIDString() != str(vm_id):
            raise _exists(vm_id, name, f"the name belongs to domain {by_name.UUIDString()}")
        if by_id is None:
            return True
        if by_id.name() != name:
            raise _exists(vm_id, name, f"the id belongs to domain {by_id.name()!r}")
        existing = self._observe(by_id)
        if existing is not None and not existing.managed:
            raise _exists(vm_id, name, "a domain of this id and name was not made by PPEC")
        return False

    async def undefine(self, vm_id: UUID) -> bool:
        def work(connection: Any) -> bool:
            domain = connection.lookupByUUIDString(str(vm_id))
            if domain.isActive():
                raise wrong_state(vm_id, "undefine", "runs")
            remove = partial(domain.undefineFlags, _UNDEFINE_ALL)
            # The slower of two at once may be told that a transient domain can't be undefined.
            return unless(False, remove, done=lambda: find(connection, vm_id) is None)

        return await self._connection.call("undefine", vm_id, partial(false_if_gone, work))

    async def wait_state(self, vm_id: UUID, state: VmState, timeout_s: float) -> bool:
        return await wait_for_state(self, vm_id, state, timeout_s)

    def on_event(self, callback: EventCallback) -> Callable[[], None]:
        return self._fanout.add(callback)


def _volume_path(connection: Any, pool: str, volume: str) -> str:
    """Empty if libvirt can't tell it now: it knows the volumes of active pools alone, as they were last read."""
    try:
        return str(connection.storagePoolLookupByName(pool).storageVolLookupByName(volume).path())
    except libvirt.libvirtError:
        return ""


def _version(number: int) -> str:
    """libvirt's version numbers: 9000000 is 9.0.0."""
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"


def _exists(vm_id: UUID, name: str, reason: str) -> PpecError:
    return PpecError("vm.exists", f"vm {name} ({vm_id}) can't be defined: {reason}", subject=f"vm {name}")
