# SPDX-License-Identifier: Apache-2.0
"""PPEC's element in a domain's ``<metadata>``: written by `VmMetadata`, read back by `parse_metadata`.

The namespace ends in the version of this layout. libvirt keeps one element per namespace and returns it as it got it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated
from uuid import UUID
from xml.etree import ElementTree

from ppec_agentd.domain_xml.element import At, Element
from ppec_agentd.hypervisor import DomainMetadata
from ppec_contract.vm import VcpuPin

NAMESPACE = "https://ppec.cloud/domain/1"
ElementTree.register_namespace("ppec", NAMESPACE)


def _tag(name: str) -> str:
    return f"{{{NAMESPACE}}}{name}"


@dataclass(frozen=True, kw_only=True)
class CellMetadata(Element):
    TAG = _tag("cell")
    cell: Annotated[int, At("@id")]


@dataclass(frozen=True, kw_only=True)
class PinMetadata(Element):
    TAG = _tag("pin")
    vcpu: Annotated[int, At("@vcpu")]
    pcpu: Annotated[int, At("@pcpu")]


@dataclass(frozen=True, kw_only=True)
class VmMetadata(Element):
    TAG = _tag("vm")
    vm_id: Annotated[str, At("@id")]
    name: Annotated[str, At("@name")]
    operation_id: Annotated[str, At("@operation")]
    vcpus: Annotated[int, At("@vcpus")]
    memory_mib: Annotated[int, At("@memory_mib")]
    disk_mib: Annotated[int, At("@disk_mib")]
    image_sha256: Annotated[str, At("@image_sha256")]
    cells: Annotated[tuple[CellMetadata, ...], At("")]
    pins: Annotated[tuple[PinMetadata, ...], At("")]


def metadata_element(metadata: DomainMetadata) -> VmMetadata:
    return VmMetadata(
        vm_id=str(metadata.vm_id),
        name=metadata.name,
        operation_id=metadata.operation_id,
        vcpus=metadata.vcpus,
        memory_mib=metadata.memory_mib,
        disk_mib=metadata.disk_mib,
        image_sha256=metadata.image_sha256,
        cells=tuple(CellMetadata(cell=cell) for cell in metadata.cells),
        pins=tuple(PinMetadata(vcpu=pin.vcpu, pcpu=pin.pcpu) for pin in metadata.pins),
    )


def parse_metadata(metadata: ElementTree.Element | None) -> DomainMetadata | None:
    """Our element inside ``<metadata>``; None if there is none.

    Raises ValueError if there is one and it is damaged, which only a hand edit does.
    """
    vm = None if metadata is None else metadata.find(_tag("vm"))
    if vm is None:
        return None
    try:
        return DomainMetadata(
            vm_id=UUID(vm.attrib["id"]),
            name=vm.attrib["name"],
            operation_id=vm.attrib["operation"],
            cells=tuple(int(cell.attrib["id"]) for cell in vm.findall(_tag("cell"))),
            vcpus=int(vm.attrib["vcpus"]),
            memory_mib=int(vm.attrib["memory_mib"]),
            disk_mib=int(vm.attrib["disk_mib"]),
            image_sha256=vm.attrib["image_sha256"],
            pins=tuple(
                VcpuPin(vcpu=int(pin.attrib["vcpu"]), pcpu=int(pin.attrib["pcpu"])) for pin in vm.findall(_tag("pin"))
            ),
        )
    except KeyError as error:
        raise ValueError(f"PPEC's metadata has no attribute {error}") from error
