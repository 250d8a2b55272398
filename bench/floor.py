# SPDX-License-Identifier: Apache-2.0
"""Bare libvirt: what making and removing a VM costs with nothing around it, same libvirtd, same domain."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import uuid
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import libvirt


@dataclass
class Floor:
    """Makes copies of a VM that PPEC made: same XML, same image, another name, UUID, MAC and overlay.

    `removals_s` has for each `create` the seconds of what follows it.
    """

    uri: str
    directory: Path
    model_name: str

    def __post_init__(self) -> None:
        self.connection = libvirt.open(self.uri)
        self.model = self.connection.lookupByName(self.model_name).XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
        self.made = 0
        self.removals_s: list[float] = []
        disks = ET.fromstring(self.model).findall("devices/disk")
        (source,) = [disk.find("source") for disk in disks if disk.find("readonly") is None]
        assert source is not None
        overlay = source.attrib["file"]
        info = subprocess.run(
            ["qemu-img", "info", "-U", "--output=json", overlay], check=True, capture_output=True, text=True
        )
        image = json.loads(info.stdout)
        self.size = str(image["virtual-size"])
        self.backing = image["full-backing-filename"]
        self.backing_format = image["backing-filename-format"]

    def create(self, count: int = 1, at_once: int = 1) -> float:
        """Seconds for `count` VMs, overlay + define + start, `at_once` at a time.

        They are removed afterwards, as many at a time: destroy + undefine + unlink.
        """
        wanted = [self._xml() for _ in range(count)]
        with ThreadPoolExecutor(at_once) as pool:
            started_s = time.monotonic()
            domains = list(pool.map(self._create, wanted))
            created_s = time.monotonic()
            list(pool.map(_remove, domains, (overlay.parent for _, overlay in wanted)))
            self.removals_s.append(time.monotonic() - created_s)
        return created_s - started_s

    def close(self) -> None:
        self.connection.close()

    def _create(self, wanted: tuple[str, Path]) -> libvirt.virDomain:
        xml, overlay = wanted
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-b", self.backing, "-F", self.backing_format, str(overlay),
             self.size],
            check=True,
        )  # fmt: skip
        domain = self.connection.defineXML(xml)
        domain.create()
        return domain

    def _xml(self) -> tuple[str, Path]:
        self.made += 1
        root = ET.fromstring(self.model)
        name, identity = f"floor-{self.made}", uuid.uuid4()
        folder = self.directory / name
        folder.mkdir(parents=True)
        for element, text in (("name", name), ("uuid", str(identity))):
            found = root.find(element)
            assert found is not None
            found.text = text
        for disk in root.findall("devices/disk"):
            source, backing = disk.find("source"), disk.find("backingStore")
            if backing is not None:
                disk.remove(backing)
            # The seed is read-only and shared; the root disk is this VM's own.
            if source is not None and disk.find("readonly") is None:
                source.set("file", str(folder / "root.qcow2"))
        for mac in root.findall("devices/interface/mac"):
            mac.set("address", "52:54:00:" + ":".join(f"{b:02x}" for b in identity.bytes[:3]))
        for parent in root.iter():
            for log in parent.findall("log"):
                log.set("file", str(folder / "console.log"))
        return ET.tostring(root, encoding="unicode"), folder / "root.qcow2"


def _remove(domain: libvirt.virDomain, folder: Path) -> None:
    domain.destroy()
    domain.undefine()
    shutil.rmtree(folder)
