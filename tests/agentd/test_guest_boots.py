# SPDX-License-Identifier: Apache-2.0
"""The domain XML carries a real guest: it boots from its overlay, talks through its bridge, and obeys the button."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path
from uuid import uuid4

import pytest

from ppec_agentd.hypervisor import BridgeNic, Disk, DomainDefinition, DomainMetadata
from ppec_agentd.libvirt_hypervisor import LibvirtHypervisor, LibvirtOptions
from ppec_agentd.numa import CpuPool, PinRequest, plan_pins
from ppec_contract.vm import VmState
from ppec_lab.conditions import wait_until
from ppec_lab.guest_image import guest_image
from ppec_lab.private_libvirtd import PrivateLibvirtd, private_libvirtd

pytestmark = [pytest.mark.libvirt, pytest.mark.slow]


def overlay(place: Path) -> Path:
    path = place / "root.qcow2"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(guest_image()), "-F", "qcow2", str(path), "256M"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return path


async def live(daemon: PrivateLibvirtd, root: Path, console: Path) -> None:
    hypervisor = LibvirtHypervisor(LibvirtOptions(uri=daemon.uri, domain_type="qemu"))
    await hypervisor.open()
    try:
        facts = await hypervisor.facts()
        plan = plan_pins(CpuPool(facts.topology, reserved_cores=0), PinRequest(2, (0,)))
        metadata = DomainMetadata(uuid4(), "web-1", "op-1", plan.cells, 2, 256, 256, "ab" * 32, plan.pins)
        definition = DomainDefinition(
            metadata,
            disks=(Disk(str(root), "qcow2", boot_order=1),),
            nics=(BridgeNic("52:54:00:00:77:01", "br-lab"),),
            threads_per_core=plan.threads_per_core,
            console_log=str(console),
        )
        await hypervisor.define(definition)
        assert await hypervisor.start(metadata.vm_id) is True

        def said_ready() -> bool:
            return console.exists() and "ppec-guest ready" in console.read_text(errors="replace")

        await asyncio.to_thread(wait_until, said_ready, "the guest says on its console that it is up", timeout_s=240)
        assert await hypervisor.shutdown(metadata.vm_id) is True
        assert await hypervisor.wait_state(metadata.vm_id, VmState.STOPPED, 240) is True
    finally:
        await hypervisor.close()


def test_a_guest_boots_and_powers_off(tmp_path: Path) -> None:
    with private_libvirtd(own_network=True) as daemon:
        daemon.run("ip", "link", "add", "br-lab", "type", "bridge")
        daemon.run("ip", "link", "set", "br-lab", "up")
        asyncio.run(live(daemon, overlay(tmp_path), tmp_path / "console.log"))
