# SPDX-License-Identifier: Apache-2.0
"""Disks of domains made by hand on a real libvirt: volumes, chains it has found, and what only the next start gets."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID, uuid4
from xml.etree import ElementTree

import pytest

from ppec_agentd.hypervisor import Domain, ObservedDisk
from ppec_agentd.image_eviction import chains_of
from ppec_agentd.places import Places
from ppec_lab.hypervisor_hosts import LibvirtHost
from ppec_lab.private_libvirtd import private_libvirtd

pytestmark = pytest.mark.libvirt
A, B = "a" * 64, "b" * 64


@pytest.fixture
def host(tmp_path: Path) -> Iterator[LibvirtHost]:
    with private_libvirtd() as daemon:
        yield LibvirtHost(daemon, tmp_path, 1)


def overlay(path: Path, image: Path) -> Path:
    """In two layers."""
    image.parent.mkdir(exist_ok=True)
    image.write_bytes(bytes(1 << 20))
    mid = path.with_suffix(".mid")
    for name, backing, backing_format in ((mid, image, "raw"), (path, mid, "qcow2")):
        command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", backing_format, "-b", str(backing), str(name)]
        subprocess.run(command, check=True, timeout=60)
    return path


def element(parent: ElementTree.Element, tag: str, text: str = "", **attributes: str) -> ElementTree.Element:
    made = ElementTree.SubElement(parent, tag, attributes)
    made.text = text
    return made


def disk_element(kind: str, target: str, **source: str) -> ElementTree.Element:
    disk = ElementTree.Element("disk", type=kind, device="disk")
    element(disk, "driver", name="qemu", type="qcow2")
    element(disk, "source", **source)
    element(disk, "target", dev=target, bus="virtio")
    return disk


def define(host: LibvirtHost, place: Path, disk: ElementTree.Element) -> UUID:
    vm_id = uuid4()
    domain = ElementTree.Element("domain", type="qemu")
    for tag, text in (("name", "by-hand"), ("uuid", str(vm_id)), ("memory", "32768"), ("vcpu", "1")):
        element(domain, tag, text)
    element(element(domain, "os"), "type", "hvm", arch="x86_64", machine="q35")
    element(domain, "devices").append(disk)
    path = place / "by-hand.xml"
    path.write_bytes(ElementTree.tostring(domain))
    host.virsh("define", str(path))
    return vm_id


def seen(host: LibvirtHost) -> Domain:
    async def look() -> Domain:
        async with host.opened() as hypervisor:
            (domain,) = await hypervisor.domains()
            return domain

    return asyncio.run(look())


def test_a_volume_is_found_while_its_pool_is_active(host: LibvirtHost, tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    pool.mkdir()
    path = overlay(pool / "disk.qcow2", tmp_path / "images" / f"{A}.raw")
    host.virsh("pool-define-as", "stock", "dir", "--target", str(pool))
    define(host, tmp_path, disk_element("volume", "vda", pool="stock", volume=path.name))
    assert seen(host).disks == (ObservedDisk("", "qcow2", "pool=stock volume=disk.qcow2"),)
    assert chains_of([seen(host)], Places(tmp_path / "vms")).untold != set()
    host.virsh("pool-start", "stock")
    assert seen(host).disks == (ObservedDisk(str(path), "qcow2"),)
    chains = chains_of([seen(host)], Places(tmp_path / "vms"))
    assert (chains.named, chains.untold) == ({A}, set())


def test_a_running_domains_chain_and_its_next_disk_count(host: LibvirtHost, tmp_path: Path) -> None:
    now = overlay(tmp_path / "now.qcow2", tmp_path / "images" / f"{A}.raw")
    vm_id = define(host, tmp_path, disk_element("file", "vda", file=str(now)))
    host.virsh("start", str(vm_id))
    try:
        then = overlay(tmp_path / "then.qcow2", tmp_path / "images" / f"{B}.raw")
        added = tmp_path / "added.xml"
        added.write_bytes(ElementTree.tostring(disk_element("file", "vdb", file=str(then))))
        host.virsh("attach-device", str(vm_id), str(added), "--config")
        domain = seen(host)
        assert domain.disks == (
            ObservedDisk(str(now), "qcow2"),
            ObservedDisk(str(now.with_suffix(".mid")), "qcow2"),
            ObservedDisk(str(tmp_path / "images" / f"{A}.raw"), "raw"),
            ObservedDisk(str(then), "qcow2"),
        )
        chains = chains_of([domain], Places(tmp_path / "vms"))
        assert (chains.named, chains.untold) == ({A, B}, set())
    finally:
        host.virsh("destroy", str(vm_id))
