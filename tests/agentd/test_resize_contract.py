# SPDX-License-Identifier: Apache-2.0
"""Resizing through the port: one suite on the fake and on a real libvirt with emulated guests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from ppec_agentd.hypervisor import Domain, DomainDefinition, Hypervisor
from ppec_contract.errors import PpecError
from ppec_contract.vm import VcpuPin, VmState
from ppec_lab.hypervisor_hosts import LibvirtHost, SuiteHost, with_nic
from ppec_lab.private_libvirtd import PrivateLibvirtd

pytestmark = pytest.mark.anyio
CPUS = os.cpu_count() or 1


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def real(libvirtd: PrivateLibvirtd, tmp_path: Path) -> Iterator[LibvirtHost]:
    found = LibvirtHost(libvirtd, tmp_path, CPUS)
    yield found
    found.sweep()


def resized(guest: DomainDefinition, vcpus: int, memory_mib: int, **more: Any) -> DomainDefinition:
    """The guest with another size; its vCPUs take turns on the host's CPUs."""
    pins = tuple(VcpuPin(vcpu=vcpu, pcpu=vcpu % CPUS) for vcpu in range(vcpus))
    metadata = replace(guest.metadata, vcpus=vcpus, memory_mib=memory_mib, pins=pins, **more)
    return DomainDefinition(metadata)


async def looked_at(hypervisor: Hypervisor, guest: DomainDefinition) -> Domain:
    domain = await hypervisor.domain(guest.metadata.vm_id)
    assert domain is not None
    return domain


async def started(hypervisor: Hypervisor, guest: DomainDefinition) -> None:
    await hypervisor.define(guest)
    await hypervisor.start(guest.metadata.vm_id)


async def refused(code: str, call: Any) -> None:
    with pytest.raises(PpecError) as caught:
        await call
    assert caught.value.code == code, str(caught.value)


async def test_a_domain_that_is_off_is_redefined_and_keeps_the_rest(host: SuiteHost) -> None:
    guest = with_nic(host.definition())
    async with host.opened() as hypervisor:
        await hypervisor.define(guest)
        before = await looked_at(hypervisor, guest)
        bigger = resized(guest, 4, 128, max_vcpus=6, max_memory_mib=256)
        await hypervisor.redefine(bigger)
        now = await looked_at(hypervisor, guest)
        assert (now.vcpus, now.memory_mib, now.max_vcpus, now.max_memory_mib) == (4, 128, 6, 256)
        assert (now.metadata, now.pins, now.next) == (bigger.metadata, bigger.metadata.pins, None)
        assert (now.disks, now.macs, now.state) == (before.disks, before.macs, VmState.STOPPED)
        await hypervisor.redefine(guest)
        assert await looked_at(hypervisor, guest) == before


async def test_what_runs_is_not_touched_by_its_next_start(host: SuiteHost) -> None:
    guest = host.definition()
    bigger = resized(guest, 4, 128)
    async with host.opened() as hypervisor:
        await started(hypervisor, guest)
        await hypervisor.annotate(replace(bigger.metadata, pending=True))
        first = await looked_at(hypervisor, guest)
        assert first.next == guest.metadata
        await hypervisor.redefine(bigger)
        now = await looked_at(hypervisor, guest)
        assert (now.vcpus, now.memory_mib, now.state) == (2, 64, VmState.RUNNING)
        assert (now.metadata, now.next) == (replace(bigger.metadata, pending=True), bigger.metadata)
        assert now.pins == guest.metadata.pins
        vm_id = guest.metadata.vm_id
        await hypervisor.destroy(vm_id)
        off = await looked_at(hypervisor, guest)
        assert (off.vcpus, off.memory_mib, off.metadata, off.next) == (4, 128, bigger.metadata, None)
        await hypervisor.start(vm_id)
        again = await looked_at(hypervisor, guest)
        assert (again.vcpus, again.memory_mib, again.pins) == (4, 128, bigger.metadata.pins)


async def test_vcpus_are_plugged_on_their_pins_as_far_as_there_are(host: SuiteHost) -> None:
    guest = host.definition(max_vcpus=4)
    vm_id, wanted = guest.metadata.vm_id, resized(guest, 4, 64).metadata.pins
    async with host.opened() as hypervisor:
        await started(hypervisor, guest)
        assert (await looked_at(hypervisor, guest)).max_vcpus == 4
        assert await hypervisor.set_vcpus(vm_id, 6, wanted, 0) == 2
        assert await hypervisor.set_vcpus(vm_id, 4, wanted, 0) == 4
        assert await hypervisor.set_vcpus(vm_id, 4, wanted, 0) == 4
        now = await looked_at(hypervisor, guest)
        assert now.vcpus == 4
        assert now.pins == (*guest.metadata.pins, *wanted[2:])
        # These guests are deaf: nothing is given back.
        assert await hypervisor.set_vcpus(vm_id, 2, wanted, 0) == 4
        assert (await looked_at(hypervisor, guest)).pins == now.pins


async def test_memory_is_plugged_in_whole_blocks(host: SuiteHost) -> None:
    guest = host.definition(max_memory_mib=64 + 3 * 128)
    vm_id = guest.metadata.vm_id
    async with host.opened() as hypervisor:
        await started(hypervisor, guest)
        assert (await looked_at(hypervisor, guest)).max_memory_mib == 448
        for refused_mib in (65, 100, 576, 32):
            assert await hypervisor.grow_memory(vm_id, (refused_mib,)) is False
        assert (await looked_at(hypervisor, guest)).memory_mib == 64
        assert await hypervisor.grow_memory(vm_id, (192,)) is True
        assert await hypervisor.grow_memory(vm_id, (192,)) is True
        assert (await looked_at(hypervisor, guest)).memory_mib == 192
        assert await hypervisor.grow_memory(vm_id, (448,)) is True
        now = await looked_at(hypervisor, guest)
        assert (now.memory_mib, now.max_memory_mib) == (448, 448)


async def test_a_domain_without_maxima_does_not_grow(host: SuiteHost) -> None:
    guest = host.definition()
    vm_id = guest.metadata.vm_id
    async with host.opened() as hypervisor:
        await started(hypervisor, guest)
        assert await hypervisor.set_vcpus(vm_id, 4, resized(guest, 4, 64).metadata.pins, 0) == 2
        assert await hypervisor.grow_memory(vm_id, (192,)) is False
        now = await looked_at(hypervisor, guest)
        assert (now.vcpus, now.memory_mib, now.max_vcpus, now.max_memory_mib) == (2, 64, 2, 64)


async def test_wrong_states_and_strangers(host: SuiteHost) -> None:
    guest, pet = host.definition(), uuid4()
    vm_id, absent = guest.metadata.vm_id, host.definition()
    async with host.opened() as hypervisor:
        await refused("vm.not_found", hypervisor.redefine(absent))
        await refused("vm.not_found", hypervisor.annotate(absent.metadata))
        await refused("vm.not_found", hypervisor.set_vcpus(absent.metadata.vm_id, 4, (), 0))
        await refused("vm.not_found", hypervisor.grow_memory(absent.metadata.vm_id, (192,)))
        await hypervisor.define(guest)
        await refused("vm.wrong_state", hypervisor.annotate(guest.metadata))
        await refused("vm.wrong_state", hypervisor.set_vcpus(vm_id, 4, (), 0))
        await refused("vm.wrong_state", hypervisor.grow_memory(vm_id, (192,)))
        await host.make_by_hand(hypervisor, "pet", pet)
        stranger = replace(guest, metadata=replace(guest.metadata, vm_id=pet, name="pet"))
        await refused("vm.wrong_state", hypervisor.redefine(stranger))


@pytest.mark.libvirt
async def test_qemu_has_the_vcpus_and_the_memory(real: LibvirtHost) -> None:
    guest = real.definition(max_vcpus=4, max_memory_mib=512)
    vm_id, name = guest.metadata.vm_id, guest.metadata.name
    async with real.opened() as hypervisor:
        await started(hypervisor, guest)
        assert real.virsh("qemu-monitor-command", name, "--hmp", "info memory-devices") == ""
        await hypervisor.set_vcpus(vm_id, 4, resized(guest, 4, 64).metadata.pins, 0)
        await hypervisor.grow_memory(vm_id, (192,))
        cpus = real.virsh("qemu-monitor-command", name, '{"execute": "query-cpus-fast"}')
        assert cpus.count('"cpu-index"') == 4
        assert "size: 134217728" in real.virsh("qemu-monitor-command", name, "--hmp", "info memory-devices")
        pinned = [line.split() for line in real.virsh("vcpupin", name).splitlines()]
        assert pinned[2:] == [["2", str(2 % CPUS)], ["3", str(3 % CPUS)]]
        # Each thread is where libvirt says, and was from its first instruction.
        assert real.virsh("vcpuinfo", name).count("State:          running") == 4
        assert "<memory model='dimm'>" in real.virsh("dumpxml", name)
        assert "<memory model='dimm'>" not in real.virsh("dumpxml", "--inactive", name)
