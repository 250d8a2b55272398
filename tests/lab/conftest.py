# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the lab's own tests: a NoCloud seed and the XML of a guest that boots from it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest


@dataclass(frozen=True)
class GuestSpec:
    """What a test's guest is made of; paths are as seen by libvirt."""

    name: str
    disk: str
    seed: str
    console: str
    mac: str
    bridge: str
    memory_mib: int = 256


def guest_xml(spec: GuestSpec) -> str:
    domain = ElementTree.Element("domain", type="qemu")
    ElementTree.SubElement(domain, "name").text = spec.name
    ElementTree.SubElement(domain, "memory", unit="MiB").text = str(spec.memory_mib)
    ElementTree.SubElement(domain, "vcpu").text = "2"
    machine = ElementTree.SubElement(domain, "os")
    ElementTree.SubElement(machine, "type", arch="x86_64", machine="q35").text = "hvm"
    ElementTree.SubElement(ElementTree.SubElement(domain, "features"), "acpi")
    devices = ElementTree.SubElement(domain, "devices")
    for source, image_format, target in ((spec.disk, "qcow2", "vda"), (spec.seed, "raw", "vdb")):
        disk = ElementTree.SubElement(devices, "disk", type="file", device="disk")
        ElementTree.SubElement(disk, "driver", name="qemu", type=image_format)
        ElementTree.SubElement(disk, "source", file=source)
        ElementTree.SubElement(disk, "target", dev=target, bus="virtio")
    nic = ElementTree.SubElement(devices, "interface", type="bridge")
    ElementTree.SubElement(nic, "mac", address=spec.mac)
    ElementTree.SubElement(nic, "source", bridge=spec.bridge)
    ElementTree.SubElement(nic, "model", type="virtio")
    serial = ElementTree.SubElement(devices, "serial", type="file")
    ElementTree.SubElement(serial, "source", path=spec.console)
    return ElementTree.tostring(domain, encoding="unicode")


def write_seed(place: Path, metadata: dict[str, str], network: dict[str, Any], user_data: bytes) -> Path:
    """A NoCloud seed ``place/seed.iso``, made by xorriso and not by the code under test elsewhere."""
    files = place / "seed"
    files.mkdir(parents=True)
    (files / "meta-data").write_text(json.dumps(metadata))
    (files / "network-config").write_text(json.dumps(network))
    (files / "user-data").write_bytes(user_data)
    seed = place / "seed.iso"
    command = ["xorriso", "-as", "mkisofs", "-quiet", "-V", "cidata", "-J", "-r", "-o", str(seed), str(files)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return seed


def network_config(mac: str, addresses: list[str], gateway: str) -> dict[str, Any]:
    nic = {
        "match": {"macaddress": mac},
        "addresses": addresses,
        "routes": [{"to": "default", "via": gateway}],
        "nameservers": {"addresses": [gateway]},
    }
    return {"version": 2, "ethernets": {"net0": nic}}


@pytest.fixture
def seed_writer() -> Callable[[Path, dict[str, str], dict[str, Any], bytes], Path]:
    return write_seed


@pytest.fixture
def network_for() -> Callable[[str, list[str], str], dict[str, Any]]:
    return network_config


@pytest.fixture
def guest_domain() -> Callable[..., str]:
    def make(**values: Any) -> str:
        return guest_xml(GuestSpec(**values))

    return make
