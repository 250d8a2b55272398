# SPDX-License-Identifier: Apache-2.0
"""The hypervisor port's switches on libvirt: power, reset, pause."""

from __future__ import annotations

from functools import partial
from typing import Any
from uuid import UUID

import libvirt

from ppec_agentd.domain_xml.observe import observe
from ppec_agentd.hypervisor import Domain
from ppec_agentd.libvirt_connection import LibvirtConnection, LibvirtOptions
from ppec_agentd.libvirt_domains import STATES, false_if_gone, find, must_find, unless, wrong_state
from ppec_contract.vm import VmState

# A guest that has a device of the host's has all its memory made and locked before it starts: so much in a second on a
# slow host. libvirt answers only then.
LOCKED_MIB_PER_S = 1024


class LibvirtPower:
    """The part of `LibvirtHypervisor` that switches domains."""

    _connection: LibvirtConnection
    _options: LibvirtOptions

    async def start(self, vm_id: UUID) -> bool:
        def work(connection: Any) -> bool:
            domain = must_find(connection, vm_id)
            state, reason = domain.state()
            # As long as another call is starting it: `create` waits for the end of that.
            starting = (state, reason) == (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_STARTING_UP)
            if STATES.get(state) is VmState.PAUSED and not starting:
                raise wrong_state(vm_id, "start", "is paused")
            already = domain.isActive() == 1 and not starting
            return unless(already, domain.create, done=lambda: domain.isActive() == 1)

        return await self._connection.call("start", vm_id, work, await self._start_timeout_s(vm_id))

    async def _start_timeout_s(self, vm_id: UUID) -> float:
        def locks_s(connection: Any) -> float:
            domain = find(connection, vm_id)
            return 0.0 if domain is None else time_to_lock_s(observe(domain.XMLDesc(), VmState.UNKNOWN).domain)

        return self._options.start_timeout_s + await self._connection.call("look at", vm_id, locks_s)

    async def shutdown(self, vm_id: UUID) -> bool:
        def work(connection: Any) -> bool:
            domain = must_find(connection, vm_id)
            # ACPI alone: the default may ask a guest agent first and wait for one that never answers.
            press = partial(domain.shutdownFlags, libvirt.VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN)
            return unless(domain.isActive() == 0, press, done=lambda: domain.isActive() == 0)

        return await self._connection.call("shut down", vm_id, work)

    async def destroy(self, vm_id: UUID) -> bool:
        def work(connection: Any) -> bool:
            domain = connection.lookupByUUIDString(str(vm_id))
            return unless(domain.isActive() == 0, domain.destroy, done=lambda: domain.isActive() == 0)

        return await self._connection.call("destroy", vm_id, partial(false_if_gone, work))

    async def reboot(self, vm_id: UUID) -> bool:
        def work(connection: Any) -> bool:
            domain = must_find(connection, vm_id)
            # Not the guest agent, as for `shutdown`. QEMU goes on: libvirt resets it when the guest has shut down.
            press = partial(domain.reboot, libvirt.VIR_DOMAIN_REBOOT_ACPI_POWER_BTN)
            return unless(domain.isActive() == 0, press, done=lambda: domain.isActive() == 0)

        return await self._connection.call("reboot", vm_id, work)

    async def reset(self, vm_id: UUID) -> bool:
        def work(connection: Any) -> bool:
            domain = must_find(connection, vm_id)
            return unless(domain.isActive() == 0, domain.reset, done=lambda: domain.isActive() == 0)

        return await self._connection.call("reset", vm_id, work)

    async def pause(self, vm_id: UUID) -> bool:
        def work(connection: Any) -> bool:
            domain = must_find(connection, vm_id)
            return _switch(vm_id, domain, "pause", VmState.PAUSED)

        return await self._connection.call("pause", vm_id, work)

    async def resume(self, vm_id: UUID) -> bool:
        def work(connection: Any) -> bool:
            domain = must_find(connection, vm_id)
            return _switch(vm_id, domain, "resume", VmState.RUNNING)

        return await self._connection.call("resume", vm_id, work)


def time_to_lock_s(domain: Domain, memory_mib: int | None = None) -> float:
    """How much longer the domain may take to start than one without devices of the host, or to be given `memory_mib`
    while it runs."""
    locked_mib = domain.memory_mib if memory_mib is None else memory_mib
    return locked_mib / LOCKED_MIB_PER_S if domain.host_devices else 0.0


def _switch(vm_id: UUID, domain: Any, what: str, wanted: VmState) -> bool:
    if domain.isActive() == 0:
        raise wrong_state(vm_id, what, "is off")
    act = domain.suspend if wanted is VmState.PAUSED else domain.resume
    return unless(_state(domain) is wanted, act, done=lambda: _state(domain) is wanted)


def _state(domain: Any) -> VmState:
    return STATES.get(domain.state()[0], VmState.UNKNOWN)
