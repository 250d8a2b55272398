# SPDX-License-Identifier: Apache-2.0
"""The two hosts of the contract suite: the fake, and a real libvirtd of its own with tiny emulated guests."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol
from uuid import UUID, uuid4
from xml.etree import ElementTree

from ppec_agentd.fake_hypervisor import FakeHypervisor, FakeOptions
from ppec_agentd.hypervisor import BridgeNic, Disk, Domain, DomainDefinition, DomainMetadata, Hypervisor
from ppec_agentd.topology import declare_topology
from ppec_contract.errors import PpecError
from ppec_contract.vm import VcpuPin, VmState
from ppec_lab.private_libvirtd import PrivateLibvirtd

_names = itertools.count(1)


class SuiteHost(Protocol):
    """What the suite does to a host beside the port: things operators and accidents do."""

    def opened(self, **options: Any) -> contextlib.AbstractAsyncContextManager[Hypervisor]:
        """An agent's hypervisor, open. Guests are deaf to the power button."""

    def definition(self, **changes: Any) -> DomainDefinition:
        """A VM that starts; `changes` are fields of its metadata."""

    async def make_by_hand(self, hypervisor: Hypervisor, name: str, vm_id: UUID) -> None: ...

    async def pause(self, hypervisor: Hypervisor, vm_id: UUID) -> None: ...

    async def break_start(self, hypervisor: Hypervisor, definition: DomainDefinition) -> None:
        """Have the next start of this VM fail."""

    async def cut_off(self, hypervisor: Hypervisor) -> None: ...

    async def come_back(self, hypervisor: Hypervisor) -> None: ...


def definition(place: Path, pcpus: tuple[int, int], **changes: Any) -> DomainDefinition:
    name = f"guest-{next(_names)}"
    disk = place / f"{name}.qcow2"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "1M"]
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    metadata = DomainMetadata(
        vm_id=uuid4(),
        name=name,
        operation_id="op-1",
        cells=(0,),
        vcpus=2,
        memory_mib=64,
        disk_mib=1,
        image_sha256="ab" * 32,
        pins=tuple(VcpuPin(vcpu=vcpu, pcpu=pcpu) for vcpu, pcpu in enumerate(pcpus)),
        pool="fast",
    )
    return DomainDefinition(replace(metadata, **changes), disks=(Disk(str(disk), "qcow2", boot_order=1),))


def with_nic(plain: DomainDefinition) -> DomainDefinition:
    return replace(plain, nics=(BridgeNic("52:54:00:00:00:01", "br0"),))


class FakeHost:
    """Reopening finds the domains again through the state file, in another object as in another process."""

    def __init__(self, place: Path) -> None:
        self._place = place

    @contextlib.asynccontextmanager
    async def opened(self, **options: Any) -> AsyncIterator[FakeHypervisor]:
        topology = declare_topology("cores=4")
        fake = FakeHypervisor(
            FakeOptions(topology, state_file=self._place / "domains.json", deaf_guests=True, **options)
        )
        await fake.open()
        try:
            yield fake
        finally:
            await fake.close()

    def definition(self, **changes: Any) -> DomainDefinition:
        return definition(self._place, (1, 2), **changes)

    async def make_by_hand(self, hypervisor: Hypervisor, name: str, vm_id: UUID) -> None:
        _fake(hypervisor).make_by_hand(Domain(vm_id, name, VmState.STOPPED, 1, 32))

    async def pause(self, hypervisor: Hypervisor, vm_id: UUID) -> None:
        domain = await hypervisor.domain(vm_id)
        assert domain is not None
        _fake(hypervisor).make_by_hand(replace(domain, state=VmState.PAUSED))

    async def break_start(self, hypervisor: Hypervisor, definition: DomainDefinition) -> None:
        error = PpecError("vm.start_failed", "no", subject=f"vm {definition.metadata.vm_id}")
        _fake(hypervisor).faults.fail("start", error)

    async def cut_off(self, hypervisor: Hypervisor) -> None:
        _fake(hypervisor).cut_off()

    async def come_back(self, hypervisor: Hypervisor) -> None:
        _fake(hypervisor).come_back()


def _fake(hypervisor: Hypervisor) -> FakeHypervisor:
    assert isinstance(hypervisor, FakeHypervisor)
    return hypervisor


class LibvirtHost:
    """A private libvirtd; guests have an empty disk, so that they stay in their firmware and hear nothing."""

    def __init__(self, daemon: PrivateLibvirtd, place: Path, cpus: int) -> None:
        self.daemon = daemon
        self._place = place
        self._cpus = cpus

    @contextlib.asynccontextmanager
    async def opened(self, **options: Any) -> AsyncIterator[Hypervisor]:
        # Only here: the fake needs no libvirt.
        from ppec_agentd.libvirt_hypervisor import LibvirtHypervisor, LibvirtOptions

        hypervisor = LibvirtHypervisor(LibvirtOptions(uri=self.daemon.uri, domain_type="qemu", **options))
        await hypervisor.open()
        try:
            yield hypervisor
        finally:
            await hypervisor.close()

    def definition(self, **changes: Any) -> DomainDefinition:
        return definition(self._place, (0, self._cpus - 1), **changes)

    def virsh(self, *words: str, check: bool = True) -> str:
        done = subprocess.run(
            ["virsh", "-q", "-c", self.daemon.uri, *words], check=check, capture_output=True, text=True, timeout=60
        )
        return done.stdout.strip()

    async def make_by_hand(self, hypervisor: Hypervisor, name: str, vm_id: UUID) -> None:
        domain = ElementTree.Element("domain", type="qemu")
        for tag, text in (("name", name), ("uuid", str(vm_id)), ("memory", "32768"), ("vcpu", "1")):
            ElementTree.SubElement(domain, tag).text = text
        machine = ElementTree.SubElement(domain, "os")
        ElementTree.SubElement(machine, "type", arch="x86_64", machine="q35").text = "hvm"
        path = self._place / f"{name}.xml"
        path.write_bytes(ElementTree.tostring(domain))
        self.virsh("define", str(path))

    async def pause(self, hypervisor: Hypervisor, vm_id: UUID) -> None:
        self.virsh("suspend", str(vm_id))

    async def break_start(self, hypervisor: Hypervisor, definition: DomainDefinition) -> None:
        self._forget_disk(Path(definition.disks[0].path))

    async def cut_off(self, hypervisor: Hypervisor) -> None:
        self.daemon.kill_libvirtd()

    async def come_back(self, hypervisor: Hypervisor) -> None:
        self.daemon.start_libvirtd()

    def _forget_disk(self, path: Path) -> None:
        path.unlink()

    def sweep(self) -> None:
        """End and remove every domain, so that tests don't see one another's."""
        for name in self.virsh("list", "--all", "--name").split():
            self.virsh("destroy", name, check=False)
            self.virsh("undefine", name)
