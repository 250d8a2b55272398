# SPDX-License-Identifier: Apache-2.0
"""What only a real libvirt shows: threads pinned, a daemon that hangs, a declared topology, damaged metadata."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from uuid import UUID
from xml.etree import ElementTree

import pytest

from ppec_agentd.hypervisor import Domain, EventKind, Hypervisor
from ppec_agentd.libvirt_hypervisor import LibvirtHypervisor, LibvirtOptions
from ppec_agentd.libvirt_power import time_to_lock_s
from ppec_agentd.topology import declare_topology
from ppec_contract.errors import PpecError
from ppec_contract.vm import VcpuPin, VmState
from ppec_lab.hypervisor_hosts import LibvirtHost
from ppec_lab.private_libvirtd import private_libvirtd

pytestmark = [pytest.mark.anyio, pytest.mark.libvirt]
SOON_S = 60


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def shared_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LibvirtHost]:
    with private_libvirtd() as daemon:
        yield LibvirtHost(daemon, tmp_path_factory.mktemp("guests"), os.cpu_count() or 1)


@pytest.fixture
def host(shared_host: LibvirtHost) -> Iterator[LibvirtHost]:
    yield shared_host
    shared_host.sweep()


def signal_libvirtd(host: LibvirtHost, number: signal.Signals) -> None:
    pid = (host.daemon.base_dir / "libvirtd.pid").read_text().strip()
    host.daemon.run("kill", f"-{int(number)}", pid)


def document(host: LibvirtHost, vm_id: UUID) -> ElementTree.Element:
    return ElementTree.fromstring(host.virsh("dumpxml", str(vm_id)))


async def next_event(hypervisor: Hypervisor, kind: EventKind) -> asyncio.Event:
    heard = asyncio.Event()
    hypervisor.on_event(lambda event: heard.set() if event.kind is kind else None)
    return heard


async def test_vcpus_really_run_where_they_are_pinned(host: LibvirtHost) -> None:
    guest = replace(host.definition(), emulator_cpus=(0,))
    async with host.opened() as hypervisor:
        await hypervisor.define(guest)
        await hypervisor.start(guest.metadata.vm_id)
    vm_id = str(guest.metadata.vm_id)
    in_force = [line.split() for line in host.virsh("vcpupin", vm_id).splitlines() if line.strip()[:1].isdigit()]
    assert in_force == [[str(pin.vcpu), str(pin.pcpu)] for pin in guest.metadata.pins]
    assert host.virsh("emulatorpin", vm_id).split()[-1] == "0"
    assert host.virsh("iothreadinfo", vm_id).split()[-2:] == ["1", "0"]
    placed = [line.split() for line in host.virsh("numatune", vm_id).splitlines()]
    assert placed == [["numa_mode", ":", "restrictive"], ["numa_nodeset", ":", "0"]]


async def test_a_declared_topology_is_reported_and_never_applied(host: LibvirtHost) -> None:
    """Pins on CPUs this machine doesn't have: granted and remembered, unknown to libvirt."""
    pins = (VcpuPin(vcpu=0, pcpu=5), VcpuPin(vcpu=1, pcpu=13))
    guest = host.definition(cells=(1,), pins=pins)
    topology = declare_topology("sockets=2,cores=4,threads=2")
    async with host.opened(declared_topology=topology) as hypervisor:
        assert (await hypervisor.facts()).topology is topology
        await hypervisor.define(guest)
        assert await hypervisor.start(guest.metadata.vm_id) is True
        domain = await hypervisor.domain(guest.metadata.vm_id)
    assert domain is not None
    assert (domain.state, domain.pins, domain.memory_cells) == (VmState.RUNNING, pins, (1,))
    shown = document(host, guest.metadata.vm_id)
    assert shown.find("cputune/vcpupin") is None
    assert shown.find("numatune") is None


async def test_pins_changed_by_hand_are_seen(host: LibvirtHost) -> None:
    guest = host.definition()
    async with host.opened() as hypervisor:
        await hypervisor.define(guest)
        await hypervisor.start(guest.metadata.vm_id)
        host.virsh("vcpupin", str(guest.metadata.vm_id), "1", "0", "--live")
        domain = await hypervisor.domain(guest.metadata.vm_id)
    assert domain is not None
    assert domain.pins[1] == VcpuPin(vcpu=1, pcpu=0)
    assert domain.metadata == guest.metadata


async def test_metadata_damaged_by_hand_makes_a_domain_foreign(host: LibvirtHost) -> None:
    guest = host.definition()
    vm_id = guest.metadata.vm_id
    async with host.opened() as hypervisor:
        await hypervisor.define(guest)
        damage = ("metadata", str(vm_id), "https://ppec.cloud/domain/1", "--key", "ppec", "--set", "<vm id='x'/>")
        host.virsh(*damage, "--config")
        domain = await hypervisor.domain(vm_id)
        assert domain is not None
        assert not domain.managed
        with pytest.raises(PpecError) as caught:
            await hypervisor.define(guest)
    assert caught.value.code == "vm.exists"


async def test_a_daemon_that_hangs_fails_calls_in_time_and_then_goes_on(host: LibvirtHost) -> None:
    """More calls than may linger: they are refused, end when the daemon goes on, and the connection is the same."""
    guest = host.definition()
    async with host.opened(call_timeout_s=2.0) as hypervisor:
        await hypervisor.define(guest)
        await hypervisor.start(guest.metadata.vm_id)
        lost = await next_event(hypervisor, EventKind.DISCONNECTED)
        signal_libvirtd(host, signal.SIGSTOP)
        try:
            for _ in range(6):
                answers = await asyncio.gather(*(hypervisor.domains() for _ in range(8)), return_exceptions=True)
                assert [getattr(answer, "code", answer) for answer in answers] == ["hypervisor.unavailable"] * 8
        finally:
            signal_libvirtd(host, signal.SIGCONT)
        async with asyncio.timeout(SOON_S):
            while True:
                with contextlib.suppress(PpecError):
                    domain = await hypervisor.domain(guest.metadata.vm_id)
                    break
        assert domain is not None
        assert domain.state is VmState.RUNNING
        assert not lost.is_set()


async def test_a_guest_with_devices_of_the_hosts_may_take_longer_to_start_the_larger_it_is() -> None:
    plain = Domain(UUID(int=1), "vm", VmState.STOPPED, 2, 1024 * 1024)
    assert time_to_lock_s(plain) == 0
    assert time_to_lock_s(replace(plain, host_devices=("0000:3b:00.0",))) == 1024


async def test_nobody_there_is_said_at_once(short_dir: Path) -> None:
    hypervisor = LibvirtHypervisor(LibvirtOptions(uri=f"qemu+unix:///system?socket={short_dir}/none"))
    with pytest.raises(PpecError) as caught:
        await hypervisor.open()
    assert caught.value.code == "hypervisor.unavailable"
    assert caught.value.details["libvirt_code"]
    await hypervisor.close()
