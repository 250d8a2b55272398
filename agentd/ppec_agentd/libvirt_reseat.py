# SPDX-License-Identifier: Apache-2.0
"""The hypervisor port's moving of running domains between CPUs and cells, on libvirt."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from uuid import UUID

import libvirt

from ppec_agentd.domain_xml.build import HostProfile
from ppec_agentd.hypervisor import Seat
from ppec_agentd.libvirt_connection import LibvirtConnection
from ppec_agentd.libvirt_domains import must_find, wrong_state
from ppec_agentd.topology import format_cpu_list

# The kernel copies the memory while the call lasts: a large VM takes its time.
_RESEAT_TIMEOUT_S = 600.0
_LIVE = libvirt.VIR_DOMAIN_AFFECT_LIVE


class LibvirtReseat:
    """The part of `LibvirtHypervisor` that moves running domains."""

    _connection: LibvirtConnection
    _profile: HostProfile

    async def reseat(self, vm_id: UUID, seat: Seat) -> None:
        def work(connection: Any) -> None:
            domain = must_find(connection, vm_id)
            if not domain.isActive():
                raise wrong_state(vm_id, "move", "is off")
            # A declared topology's CPUs don't exist: there nothing is pinned.
            if self._profile.bind:
                _pin(connection, domain, seat)
                _bind(domain, seat)

        await self._connection.call("move", vm_id, work, _RESEAT_TIMEOUT_S)


def _pin(connection: Any, domain: Any, seat: Seat) -> None:
    cpus = connection.getCPUMap()[0]
    pinned = {pin.vcpu: (pin.pcpu,) for pin in seat.pins}
    own = tuple(pin.pcpu for pin in seat.pins)
    for vcpu in range(domain.vcpusFlags(_LIVE | libvirt.VIR_DOMAIN_VCPU_MAXIMUM)):
        # Those that may yet be plugged stay within the VM's own: where they were, others run from now on.
        domain.pinVcpuFlags(vcpu, _bits(cpus, pinned.get(vcpu, own)), _LIVE)
    if seat.emulator_cpus:
        domain.pinEmulator(_bits(cpus, seat.emulator_cpus), _LIVE)
        for thread in domain.ioThreadInfo(_LIVE):
            domain.pinIOThread(thread[0], _bits(cpus, seat.emulator_cpus), _LIVE)


def _bind(domain: Any, seat: Seat) -> None:
    """Memory that is there already needs no copying, nor the cpuset controller that copies it."""
    cells = format_cpu_list(seat.cells)
    if domain.numaParameters(_LIVE).get("numa_nodeset") != cells:
        domain.setNumaParameters({"numa_nodeset": cells}, _LIVE)


def _bits(cpus: int, chosen: Iterable[int]) -> tuple[bool, ...]:
    wanted = set(chosen)
    return tuple(cpu in wanted for cpu in range(cpus))
