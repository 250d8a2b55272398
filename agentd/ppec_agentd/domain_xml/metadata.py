# SPDX-License-Identifier: Apache-2.0
"""PPEC's element in a domain's ``<metadata>``: written by `VmMetadata`, read back by `parse_metadata`.

The namespace ends in the version of this layout. libvirt keeps one element per namespace and returns it as it got it.
What was added since the first agents is left out where it says nothing, and may be missing when it is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated
from uuid import UUID
from xml.etree import ElementTree

from ppec_agentd.domain_xml.element import At, Element
from ppec_agentd.hypervisor import DomainMetadata
from ppec_agentd.numa import GuestCell
from ppec_agentd.topology import format_cpu_list, parse_cpu_list
from ppec_contract.vm import CpuPolicy, NumaPolicy, SmtPolicy, VcpuPin

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
class NumaMetadata(Element):
    TAG = _tag("numa")
    cpus: Annotated[str, At("@cpus")]
    smt: Annotated[str, At("@smt")]
    multi_cell: Annotated[bool, At("@multi_cell")]
    huge_page_kib: Annotated[int, At("@huge_page_kib")]


@dataclass(frozen=True, kw_only=True)
class GuestCellMetadata(Element):
    """The guest numbers its cells in the order of these; `vcpus` is a list like 0-3."""

    TAG = _tag("guest_cell")
    cell: Annotated[int, At("@cell")]
    vcpus: Annotated[str, At("@vcpus")]
    memory_mib: Annotated[int, At("@memory_mib")]
    distances: Annotated[str | None, At("@distances")] = None


@dataclass(frozen=True, kw_only=True)
class NvmeDriveMetadata(Element):
    TAG = _tag("nvme_drive")
    address: Annotated[str, At("@address")]


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
    max_vcpus: Annotated[int | None, At("@max_vcpus")] = None
    max_memory_mib: Annotated[int | None, At("@max_memory_mib")] = None
    pending: Annotated[bool | None, At("@pending")] = None
    pool: Annotated[str | None, At("@pool")] = None
    numa: Annotated[NumaMetadata | None, At("")] = None
    cells: Annotated[tuple[CellMetadata, ...], At("")]
    pins: Annotated[tuple[PinMetadata, ...], At("")]
    guest_cells: Annotated[tuple[GuestCellMetadata, ...], At("")] = ()
    nvme_drives: Annotated[tuple[NvmeDriveMetadata, ...], At("")] = ()


def metadata_element(metadata: DomainMetadata) -> VmMetadata:
    return VmMetadata(
        vm_id=str(metadata.vm_id),
        name=metadata.name,
        operation_id=metadata.operation_id,
        vcpus=metadata.vcpus,
        memory_mib=metadata.memory_mib,
        disk_mib=metadata.disk_mib,
        image_sha256=metadata.image_sha256,
        max_vcpus=metadata.max_vcpus or None,
        max_memory_mib=metadata.max_memory_mib or None,
        pending=metadata.pending or None,
        pool=metadata.pool or None,
        numa=None if metadata.numa == NumaPolicy() else _numa_element(metadata.numa),
        cells=tuple(CellMetadata(cell=cell) for cell in metadata.cells),
        pins=tuple(PinMetadata(vcpu=pin.vcpu, pcpu=pin.pcpu) for pin in metadata.pins),
        guest_cells=tuple(_guest_cell_element(cell) for cell in metadata.guest_cells),
        nvme_drives=tuple(NvmeDriveMetadata(address=address) for address in metadata.nvme_drives),
    )


def _numa_element(numa: NumaPolicy) -> NumaMetadata:
    return NumaMetadata(
        cpus=numa.cpus.value, smt=numa.smt.value, multi_cell=numa.multi_cell, huge_page_kib=numa.huge_page_kib
    )


def _guest_cell_element(cell: GuestCell) -> GuestCellMetadata:
    return GuestCellMetadata(
        cell=cell.cell,
        vcpus=format_cpu_list(cell.vcpus),
        memory_mib=cell.memory_mib,
        distances=" ".join(map(str, cell.distances)) or None,
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
            numa=_numa(vm.find(_tag("numa"))),
            max_vcpus=int(vm.get("max_vcpus", "0")),
            max_memory_mib=int(vm.get("max_memory_mib", "0")),
            guest_cells=tuple(_guest_cell(cell) for cell in vm.findall(_tag("guest_cell"))),
            pending=vm.get("pending") == "yes",
            pool=vm.get("pool", ""),
            nvme_drives=tuple(drive.attrib["address"] for drive in vm.findall(_tag("nvme_drive"))),
        )
    except KeyError as error:
        raise ValueError(f"PPEC's metadata has no attribute {error}") from error


def _numa(numa: ElementTree.Element | None) -> NumaPolicy:
    if numa is None:
        return NumaPolicy()
    return NumaPolicy(
        cpus=CpuPolicy(numa.attrib["cpus"]),
        smt=SmtPolicy(numa.attrib["smt"]),
        multi_cell=numa.attrib["multi_cell"] == "yes",
        huge_page_kib=int(numa.attrib["huge_page_kib"]),
    )


def _guest_cell(cell: ElementTree.Element) -> GuestCell:
    return GuestCell(
        int(cell.attrib["cell"]),
        parse_cpu_list(cell.attrib["vcpus"]),
        int(cell.attrib["memory_mib"]),
        tuple(map(int, cell.get("distances", "").split())),
    )
