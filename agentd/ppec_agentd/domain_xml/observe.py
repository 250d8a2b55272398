# SPDX-License-Identifier: Apache-2.0
"""Read what libvirt shows of a domain. Pure; any domain, also one made by hand."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
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


@dataclass(frozen=True, slots=True)
class PluggedMemory:
    """A running domain's memory: what each of the guest's cells has, the most there can be, and the slots left.

    A guest that isn't shown cells has one, and none can be plugged into it.
    """

    cells_mib: tuple[int, ...]
    most_mib: int
    slots_free: int


# The path of a volume, by the names of its pool and itself; empty if it has none, or none that can be told now.
VolumePath = Callable[[str, str], str]
# What has a <source>: the disk, what it is built on, what it is copied to, where its data is.
_LAYERS = frozenset({"disk", "backingStore", "mirror", "dataStore"})


def observe(xml: str, state: VmState, volume_path: VolumePath = lambda _pool, _volume: "") -> Observed:
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
        vcpus=_vcpus(root),
        memory_mib=_mib(root.find("memory")),
        max_vcpus=int(root.findtext("vcpu", "1")),
        max_memory_mib=_mib(root.find("maxMemory")) or _mib(root.find("memory")),
        pins=tuple(_pins(root)),
        memory_cells=() if nodeset is None else parse_cpu_list(nodeset.get("nodeset", "")),
        metadata=metadata,
        macs=tuple(mac.get("address", "").lower() for mac in root.iterfind("devices/interface/mac")),
        disks=tuple(_disks(root, volume_path)),
        host_devices=tuple(_host_devices(root)),
    )
    return Observed(domain, damage)


def _attribute(root: ElementTree.Element, tag: str, name: str) -> str | None:
    found = root.find(tag)
    return None if found is None else found.get(name)


def _disks(root: ElementTree.Element, volume_path: VolumePath) -> Iterator[ObservedDisk]:
    """Each disk, then what libvirt says of its chain. An empty drive is none."""
    for disk in root.iterfind("devices/disk"):
        for layer in disk.iter():
            source = layer.find("source")
            if layer.tag in _LAYERS and source is not None:
                opened_as = layer.find("driver" if layer is disk else "format")
                yield _disk(source, "" if opened_as is None else opened_as.get("type", ""), volume_path)


def _disk(source: ElementTree.Element, opened_as: str, volume_path: VolumePath) -> ObservedDisk:
    path, pool = source.get("file") or source.get("dev") or "", source.get("pool")
    if not path and pool is not None:
        path = volume_path(pool, source.get("volume", ""))
    elsewhere = "" if path else " ".join(f"{key}={value}" for key, value in source.attrib.items())
    return ObservedDisk(path, opened_as, elsewhere)


def _host_devices(root: ElementTree.Element) -> Iterator[str]:
    """Handed over whole, or (by hand alone) driven by QEMU itself as a disk, a controller at a time."""
    for source in (*root.iterfind("devices/hostdev[@type='pci']/source"), *_nvme_sources(root)):
        address = source.find("address")
        if address is not None:
            domain, bus, slot, function = (
                int(address.get(part, "0"), 0) for part in ("domain", "bus", "slot", "function")
            )
            yield f"{domain:04x}:{bus:02x}:{slot:02x}.{function:x}"


def _nvme_sources(root: ElementTree.Element) -> Iterator[ElementTree.Element]:
    for disk in root.iterfind("devices/disk[@type='nvme']"):
        yield from disk.iterfind("source[@type='pci']")


def _pins(root: ElementTree.Element) -> Iterator[VcpuPin]:
    """Only one-to-one pins, of vCPUs that are there: one that floats over several CPUs owns none of them."""
    there = _vcpus_there(root)
    for pin in root.iterfind("cputune/vcpupin"):
        vcpu, cpus = int(pin.get("vcpu", "0")), parse_cpu_list(pin.get("cpuset", ""))
        if len(cpus) == 1 and vcpu in there:
            yield VcpuPin(vcpu=vcpu, pcpu=cpus[0])


def _vcpus_there(root: ElementTree.Element) -> Collection[int]:
    """libvirt keeps the pins of vCPUs that were unplugged, and may say of each whether it is there."""
    states = root.findall("vcpus/vcpu")
    if states:
        return {int(state.get("id", "0")) for state in states if state.get("enabled") == "yes"}
    return range(_vcpus(root))


def _vcpus(root: ElementTree.Element) -> int:
    current = _attribute(root, "vcpu", "current")
    return int(root.findtext("vcpu", "1") if current is None else current)


def plugged_memory(xml: str) -> PluggedMemory:
    """The memory of the running domain of `xml`, DIMMs included."""
    root = ElementTree.fromstring(xml)  # noqa: S314 - libvirt's own document, from its socket
    cells = {int(cell.get("id", "0")): int(cell.get("memory", "0")) // 1024 for cell in root.iterfind("cpu/numa/cell")}
    dimms = root.findall("devices/memory[@model='dimm']")
    for dimm in dimms:
        node = int(dimm.findtext("target/node", "0"))
        cells[node] = cells.get(node, 0) + _mib(dimm.find("target/size"))
    most = root.find("maxMemory")
    slots = 0 if most is None else int(most.get("slots") or "0")
    return PluggedMemory(
        cells_mib=tuple(cells[node] for node in sorted(cells)) or (_mib(root.find("memory")),),
        most_mib=_mib(root.find("memory") if most is None else most),
        slots_free=slots - len(dimms),
    )


def _mib(memory: ElementTree.Element | None) -> int:
    """libvirt shows sizes in KiB whatever unit it was given."""
    return 0 if memory is None else int(memory.text or "0") // 1024
