# SPDX-License-Identifier: Apache-2.0
"""The definition of a domain that is there, with another size; whatever else it says stays as it is.

Everything of a size is built anew, as for a new domain, and takes the place of the old. Building the whole document
would lose what was attached since, or set by hand.
"""

from __future__ import annotations

from xml.etree import ElementTree

from ppec_agentd.domain_xml.build import HostProfile, domain_document
from ppec_agentd.domain_xml.metadata import NAMESPACE
from ppec_agentd.domain_xml.sizing import IOTHREAD
from ppec_agentd.hypervisor import DomainDefinition

# What a size is made of, as children of <domain>.
_SIZED = (
    *("maxMemory", "memory", "currentMemory", "memoryBacking", "vcpu", "vcpus"),
    *("cputune", "numatune", "cpu"),
)


def resized_xml(xml: str, definition: DomainDefinition, profile: HostProfile) -> str:
    """The document `xml` (``virsh dumpxml --inactive``) with the size, pins and metadata of `definition`.

    DIMMs that were plugged into it go: their memory is there from the start now.
    """
    root = ElementTree.fromstring(xml)  # noqa: S314 - libvirt's own document, from its socket
    fresh = domain_document(definition, profile).render()
    _keep_iothread_pin(root, fresh)
    at = next((place for place, child in enumerate(root) if child.tag in _SIZED), len(root))
    for child in [child for child in root if child.tag in _SIZED]:
        root.remove(child)
    for offset, child in enumerate([child for child in fresh if child.tag in _SIZED]):
        root.insert(at + offset, child)
    devices = root.find("devices")
    if devices is not None:
        for dimm in devices.findall("memory[@model='dimm']"):
            devices.remove(dimm)
    _replace_metadata(root, fresh)
    return ElementTree.tostring(root, encoding="unicode")


def _keep_iothread_pin(root: ElementTree.Element, fresh: ElementTree.Element) -> None:
    """A size says nothing of disks, and so of the thread that serves them. It runs where QEMU's other threads do."""
    pinned, tune = root.find(f"cputune/iothreadpin[@iothread='{IOTHREAD}']"), fresh.find("cputune")
    if pinned is not None and tune is not None and tune.find("iothreadpin") is None:
        emulator = tune.find("emulatorpin")
        if emulator is not None:
            pinned.set("cpuset", emulator.get("cpuset", ""))
        tune.append(pinned)


def _replace_metadata(root: ElementTree.Element, fresh: ElementTree.Element) -> None:
    metadata, ours = root.find("metadata"), fresh.find("metadata")
    if ours is None:
        raise TypeError("a definition of ours always has metadata")
    if metadata is None:
        root.insert(0, ours)
        return
    for old in metadata.findall(f"{{{NAMESPACE}}}vm"):
        metadata.remove(old)
    metadata.extend(list(ours))
