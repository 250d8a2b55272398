# SPDX-License-Identifier: Apache-2.0
"""A real guest's own agent: what it says, a freeze that stops its writes, an end that comes by itself, a real reboot.

The guest is the Debian image of the lab, with Debian's qemu-guest-agent, under emulation: slow, so one boot serves all.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from ppec_agentd.actions.context import Steps
from ppec_agentd.actions.freeze import freeze, thaw
from ppec_agentd.actions.power import reboot
from ppec_agentd.guests import GuestSays
from ppec_agentd.hypervisor import BridgeNic, Disk, DomainDefinition
from ppec_agentd.iso_image import iso_image
from ppec_agentd.thaws import Thaws
from ppec_contract.errors import PpecError
from ppec_lab.conditions import wait_until
from ppec_lab.debian_guest_image import debian_guest_image
from ppec_lab.hypervisor_hosts import LibvirtHost
from ppec_lab.private_libvirtd import PrivateLibvirtd, private_libvirtd

# Minutes of an emulated Debian: left to `make test-long`.
pytestmark = [pytest.mark.anyio, pytest.mark.libvirt, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1800)]
BOOT_S = 480


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Host:
    """As much of a `HostContext` as freezing takes."""

    def __init__(self, hypervisor: Any, vms_dir: Path) -> None:
        self.hypervisor = hypervisor
        self.thaws = Thaws(hypervisor, vms_dir, again_s=1)


def overlay(path: Path) -> Path:
    command = [
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        str(debian_guest_image()),
        "-F",
        "qcow2",
        str(path),
        "2G",
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return path


async def connected(hypervisor: Any, vm_id: Any) -> Any:
    async with asyncio.timeout(BOOT_S):
        while True:
            # An emulated guest that has just started may take its time.
            with contextlib.suppress(PpecError):
                if (says := await hypervisor.guest(vm_id, 10)) is not None:
                    return says
            await asyncio.sleep(1)


MAC = "52:54:00:00:77:02"
# The guest sends its agent the signals that are typed on its console.
LISTEN = (
    "systemctl stop serial-getty@ttyS0; (echo listening; while read -r word; do"
    ' systemctl kill -s "$word" qemu-guest-agent; echo "did $word"; done) </dev/ttyS0 >/dev/ttyS0 2>&1 &'
)
NETWORK = {"version": 2, "ethernets": {"n": {"match": {"macaddress": MAC}, "addresses": ["10.77.0.5/24"]}}}


@pytest.fixture(scope="module")
def daemon() -> Iterator[PrivateLibvirtd]:
    with private_libvirtd(own_network=True) as running:
        running.run("ip", "link", "add", "br-lab", "type", "bridge")
        running.run("ip", "link", "set", "br-lab", "up")
        yield running


def debian(host: LibvirtHost, place: Path) -> DomainDefinition:
    """A guest with the name `real` and an address, as its seed says."""
    guest = host.definition(memory_mib=512)
    folder = place / "vms" / str(guest.metadata.vm_id)
    folder.mkdir(parents=True)
    seed = folder / "seed.iso"
    files = {
        "meta-data": json.dumps({"instance-id": str(guest.metadata.vm_id), "local-hostname": "real"}).encode(),
        "user-data": b"#cloud-config\n" + json.dumps({"runcmd": [["sh", "-c", LISTEN]]}).encode(),
        "network-config": json.dumps(NETWORK).encode(),
    }
    seed.write_bytes(iso_image("cidata", files))
    disks = (Disk(str(overlay(folder / "root.qcow2")), "qcow2", boot_order=1), Disk(str(seed), "raw", read_only=True))
    log = str(folder / "console.log")
    return replace(guest, disks=disks, nics=(BridgeNic(MAC, "br-lab"),), console_log=log)


async def test_a_real_guest_is_asked_frozen_thawed_given_up_and_rebooted(
    daemon: PrivateLibvirtd, tmp_path: Path
) -> None:
    host = LibvirtHost(daemon, tmp_path, os.cpu_count() or 1)
    guest, other = debian(host, tmp_path), host.definition()
    vm_id = guest.metadata.vm_id
    async with host.opened(disk_cache="writeback") as hypervisor:
        for one in (guest, other):
            await hypervisor.define(one)
            await hypervisor.start(one.metadata.vm_id)
        says = await connected(hypervisor, vm_id)
        assert (says.os_id, says.os_version) == ("debian", "12")
        assert says.kernel.endswith("amd64")
        assert any(nic.name == "lo" and "127.0.0.1/8" in nic.addresses for nic in says.nics)
        async with asyncio.timeout(BOOT_S):
            while not named(await connected(hypervisor, vm_id)):  # noqa: ASYNC110 - a guest has no event for it
                await asyncio.sleep(1)
        context: Any = Host(hypervisor, tmp_path / "vms")
        await freeze_and_thaw(context, vm_id)
        await hang(hypervisor, vm_id, other.metadata.vm_id, Path(guest.console_log))
        qemu = host.virsh("domid", str(vm_id))
        outcome = await reboot(context, vm_id, Steps(vm_id, ""), BOOT_S, force=False)
        assert outcome.changed
        assert host.virsh("domid", str(vm_id)) == qemu
        # And it is really up again.
        assert (await connected(hypervisor, vm_id)).os_id == "debian"
        await context.thaws.close()


def named(says: GuestSays) -> bool:
    """Whether cloud-init has applied the seed."""
    addresses = [address for nic in says.nics if nic.mac == MAC for address in nic.addresses]
    return says.hostname == "real" and "10.77.0.5/24" in addresses


async def freeze_and_thaw(context: Any, vm_id: UUID) -> None:
    assert (await freeze(context, vm_id, Steps(vm_id, ""), 600)).changed
    assert not (await freeze(context, vm_id, Steps(vm_id, ""), 600)).changed
    # A frozen guest's agent takes nothing else, and says so at once.
    with pytest.raises(PpecError) as refused:
        await context.hypervisor.guest(vm_id, 10)
    assert refused.value.code == "guest.agent_failed"
    assert (await thaw(context, vm_id, Steps(vm_id, ""))).changed
    assert not (await thaw(context, vm_id, Steps(vm_id, ""))).changed

    await freeze(context, vm_id, Steps(vm_id, ""), 2)
    async with asyncio.timeout(BOOT_S):
        while context.thaws.frozen(vm_id):  # noqa: ASYNC110 - the end comes by itself
            await asyncio.sleep(0.2)
    assert await context.hypervisor.thaw(vm_id) is False


async def order(hypervisor: Any, vm_id: UUID, word: str, log: Path) -> None:
    """Has the guest send its agent a signal: typed on its console, and answered there."""
    await asyncio.to_thread(wait_until, lambda: said(log, "listening"), "the guest listens", timeout_s=BOOT_S)
    await hypervisor.type_on_console(vm_id, f"{word}\n".encode())
    await asyncio.to_thread(wait_until, lambda: said(log, f"did {word}"), "the guest did it", timeout_s=BOOT_S)


def said(log: Path, words: str) -> bool:
    return words in log.read_text(errors="replace")


async def hang(hypervisor: Any, vm_id: UUID, other: UUID, log: Path) -> None:
    """An agent that is connected and stopped: it is given up in time, and keeps no other call waiting."""
    await order(hypervisor, vm_id, "STOP", log)
    asked = [asyncio.create_task(hypervisor.guest(vm_id, 1)) for _ in range(12)]
    await asyncio.sleep(0.1)
    assert await hypervisor.pause(other) is True
    assert await hypervisor.resume(other) is True
    assert not all(task.done() for task in asked)
    for task in asked[:2]:
        with pytest.raises(PpecError) as silent:
            await task
        assert silent.value.code == "guest.agent_unavailable"
    for task in asked:
        task.cancel()
    await asyncio.gather(*asked, return_exceptions=True)
    await order(hypervisor, vm_id, "CONT", log)
    assert (await connected(hypervisor, vm_id)).os_id == "debian"
