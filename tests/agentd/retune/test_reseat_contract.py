# SPDX-License-Identifier: Apache-2.0
"""Moving a running domain through the port: one suite on the fake and on a real libvirt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4
from xml.etree import ElementTree

import pytest

from ppec_agentd.hypervisor import DomainDefinition, Seat
from ppec_contract.errors import PpecError
from ppec_contract.vm import VcpuPin
from ppec_lab.hypervisor_hosts import LibvirtHost, SuiteHost

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def crossed(guest: DomainDefinition) -> tuple[VcpuPin, ...]:
    """Its pins the other way round: the one move that a host of two CPUs and one cell has to offer."""
    pins = guest.metadata.pins
    return tuple(VcpuPin(vcpu=pin.vcpu, pcpu=other.pcpu) for pin, other in zip(pins, reversed(pins), strict=True))


async def test_a_running_domain_is_moved_and_its_definition_is_not(host: SuiteHost) -> None:
    guest = host.definition()
    vm_id, cells = guest.metadata.vm_id, guest.metadata.cells
    async with host.opened() as hypervisor:
        await hypervisor.define(guest)
        await hypervisor.start(vm_id)
        for _ in range(2):
            await hypervisor.reseat(vm_id, Seat(crossed(guest), cells))
            moved = await hypervisor.domain(vm_id)
            assert moved is not None
            assert moved.pins == crossed(guest)
            assert moved.memory_cells == cells
            assert moved.metadata == guest.metadata
        await hypervisor.destroy(vm_id)
        off = await hypervisor.domain(vm_id)
        assert off is not None


async def test_a_move_with_metadata_and_definition_outlives_a_restart(host: SuiteHost) -> None:
    guest = host.definition()
    vm_id = guest.metadata.vm_id
    metadata = replace(guest.metadata, pins=crossed(guest))
    async with host.opened() as hypervisor:
        await hypervisor.define(guest)
        await hypervisor.start(vm_id)
        await hypervisor.reseat(vm_id, Seat(metadata.pins, metadata.cells))
        await hypervisor.annotate(metadata)
        await hypervisor.redefine(DomainDefinition(metadata))
        running = await hypervisor.domain(vm_id)
        await hypervisor.destroy(vm_id)
        await hypervisor.start(vm_id)
        again = await hypervisor.domain(vm_id)
        for seen in (running, again):
            assert seen is not None
            assert seen.metadata == metadata
            assert seen.pins == metadata.pins


async def test_what_does_not_run_or_is_not_there_is_not_moved(host: SuiteHost) -> None:
    guest = host.definition()
    seat = Seat(crossed(guest), guest.metadata.cells)
    async with host.opened() as hypervisor:
        await _refused("vm.not_found", hypervisor.reseat(uuid4(), seat))
        await hypervisor.define(guest)
        await _refused("vm.wrong_state", hypervisor.reseat(guest.metadata.vm_id, seat))


async def _refused(code: str, call: Any) -> None:
    with pytest.raises(PpecError) as caught:
        await call
    assert caught.value.code == code


@pytest.mark.libvirt
async def test_qemus_own_threads_and_vcpus_yet_to_come_move_along(libvirtd: Any, tmp_path: Path) -> None:
    """What the port doesn't show: the emulator's and the I/O thread's pins, and those of unplugged vCPUs."""
    real = LibvirtHost(libvirtd, tmp_path, 2)
    guest = real.definition()
    guest = replace(guest, emulator_cpus=(0,), metadata=replace(guest.metadata, max_vcpus=4))
    vm_id = guest.metadata.vm_id
    try:
        async with real.opened() as hypervisor:
            await hypervisor.define(guest)
            await hypervisor.start(vm_id)
            metadata = replace(guest.metadata, pins=crossed(guest))
            await hypervisor.reseat(vm_id, Seat(metadata.pins, metadata.cells, emulator_cpus=(1,)))
            await hypervisor.redefine(replace(guest, metadata=metadata, emulator_cpus=(1,)))
        for words in (("dumpxml",), ("dumpxml", "--inactive")):
            document = real.virsh(*words, str(vm_id))
            tune = ElementTree.fromstring(document).find("cputune")
            assert tune is not None
            own = {str(pin.vcpu): str(pin.pcpu) for pin in metadata.pins}
            pins = {pin.get("vcpu"): pin.get("cpuset") for pin in tune.findall("vcpupin")}
            assert {vcpu: pins[vcpu] for vcpu in own} == own
            assert {cpuset for vcpu, cpuset in pins.items() if vcpu not in own} <= {"0-1"}
            assert [pin.get("cpuset") for pin in tune.findall("emulatorpin")] == ["1"]
            assert [pin.get("cpuset") for pin in tune.findall("iothreadpin")] == ["1"]
    finally:
        real.sweep()
