# SPDX-License-Identifier: Apache-2.0
"""Read what libvirt shows of a domain. Pure; any domain, also one made by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from uuid import UUID
from xml.etree import ElementTree

from ppec_agentd.domain_xml.metadata import parse_metadata
from ppec_agentd.hypervisor import Domain, ObservedDisk
from ppec_agentd.topology import parse_cpu_list
from ppec_contract.vm import VcpuPin, VmState


@dataclass(frozen=True, slots=True)
class Observed:
    """A domain's document, understood. `damage` says why metadata of ours that is there could not be read."""

    domain: Domain
    damage: str = ""


def observe(xml: str, state: VmState) -> Observed:
    """The domain of `xml` (``virsh dumpxml``). Raises ValueError if it is no domain document."""
    root = ElementTree.fromstring(xml)  # noqa: S314 - libvirt's own document, from its socket
    uuid, name = root.findtext("uuid"), root.findtext("name")
    if root.tag != "domain" or not uuid or name is None:
        raise ValueError(f"a <{root.tag}> without uuid or name is no domain")
    damage = ""
    try:
        metadata = parse_metadata(root.find("metadata"))
    except ValueError as error:
        metadata, damage = None, str(error)
    nodeset = root.find("numatune/memory")
    domain = Domain(
        vm_id=UUID(uuid),
        name=name,
        state=state,
        vcpus=int(root.findtext("vcpu", "1")),
        memory_mib=_mib(root.find("memory")),
        pins=tuple(_pins(root)),
        memory_cells=() if nodeset is None else parse_cpu_list(nodeset.get("nodeset", "")),
        metadata=metadata,
        macs=tuple(mac.get("address", "").lower() for mac in root.iterfind("devices/interface/mac")),
        disks=tuple(_disks(root)),
    )
    return Observed(domain, damage)


def _disks(root: ElementTree.Element) -> Iterator[ObservedDisk]:
    """An empty drive and a disk of the network have no path here."""
    for disk in root.iterfind("devices/disk"):
        source, driver = disk.find("source"), disk.find("driver")
        path = "" if source is None else source.get("file") or source.get("dev") or ""
        if path:
            yield ObservedDisk(path, "" if driver is None else driver.get("type", ""))


def _pins(root: ElementTree.Element) -> Iterator[VcpuPin]:
    """Only one-to-one pins: a vCPU that floats over several CPUs owns none of them."""
    for pin in root.iterfind("cputune/vcpupin"):
        cpus = parse_cpu_list(pin.get("cpuset", ""))
        if len(cpus) == 1:
            yield VcpuPin(vcpu=int(pin.get("vcpu", "0")), pcpu=cpus[0])


def _mib(memory: ElementTree.Element | None) -> int:
    """libvirt shows sizes in KiB whatever unit it was given."""
    return 0 if memory is None else int(memory.text or "0") // 1024
