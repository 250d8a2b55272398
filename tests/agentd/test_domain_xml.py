# SPDX-License-Identifier: Apache-2.0
"""Domain XML: golden files, libvirt's own schema, every declared field used, and the way back."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppec_agentd.domain_xml.build import HostProfile, domain_document, domain_xml
from ppec_agentd.domain_xml.devices.disk import disk_letters
from ppec_agentd.domain_xml.devices.memory import Dimm
from ppec_agentd.domain_xml.domain import DomainDocument
from ppec_agentd.domain_xml.element import At, Element
from ppec_agentd.domain_xml.metadata import metadata_element, parse_metadata
from ppec_agentd.domain_xml.observe import observe
from ppec_agentd.hypervisor import BridgeNic, Disk, DomainDefinition, DomainMetadata, ObservedDisk
from ppec_agentd.numa import GuestCell
from ppec_contract.errors import PpecError
from ppec_contract.vm import CpuPolicy, NumaPolicy, SmtPolicy, VcpuPin, VmState

GOLDEN = Path(__file__).parent / "golden"
VM_ID = UUID("5f9b2c1e-0d6a-4c7e-9f00-0000000000a1")


def metadata(vcpus: int, cells: tuple[int, ...], pcpus: tuple[int, ...]) -> DomainMetadata:
    return DomainMetadata(
        vm_id=VM_ID,
        name="web-1",
        operation_id="op-7",
        cells=cells,
        vcpus=vcpus,
        memory_mib=4096,
        disk_mib=20480,
        image_sha256="ab" * 32,
        pins=tuple(VcpuPin(vcpu=vcpu, pcpu=pcpu) for vcpu, pcpu in enumerate(pcpus)),
    )


DISKS = (
    Disk("/var/lib/ppec/vms/a1/root.qcow2", "qcow2", boot_order=1),
    Disk("/var/lib/ppec/vms/a1/seed.iso", "raw", read_only=True),
)
FULL = DomainDefinition(
    metadata(4, (1,), (5, 13, 6, 14)),
    DISKS,
    (BridgeNic("52:54:00:00:00:01", "br0"), BridgeNic("52:54:00:00:00:02", "br-storage")),
    emulator_cpus=(4, 12),
    threads_per_core=2,
    console_log="/var/log/ppec/consoles/a1.log",
)
BARE = DomainDefinition(metadata(2, (0,), (1, 2)))

KVM, TCG = HostProfile("x86_64", "kvm"), HostProfile("x86_64", "qemu")


def sized(vcpus: int, pcpus: tuple[int, ...], cells: tuple[int, ...] = (1,), **more: Any) -> DomainDefinition:
    """A VM on these CPUs; `more` are fields of the definition or of its metadata."""
    of_metadata = {name: more.pop(name) for name in list(more) if name in DomainMetadata.__slots__}
    own = dataclasses.replace(metadata(vcpus, cells, pcpus), **of_metadata)
    return dataclasses.replace(FULL, metadata=own, **({"threads_per_core": 1} | more))


TWO_CELLS = (GuestCell(0, (0, 1, 2, 3), 2048, (10, 21)), GuestCell(1, (4, 5, 6, 7), 2048, (21, 10)))
THREE_CELLS = (
    GuestCell(0, (0, 1, 4), 1024, (10, 21, 31)),
    GuestCell(1, (2, 3, 5), 2048, (21, 10, 31)),
    GuestCell(4, (), 1024, (31, 31, 10)),
)
SPANNING = NumaPolicy(multi_cell=True)

CASES: dict[str, tuple[DomainDefinition, HostProfile]] = {
    "x86_64-kvm": (FULL, KVM),
    "x86_64-tcg-writeback": (FULL, HostProfile("x86_64", "qemu", disk_cache="writeback")),
    "x86_64-declared-topology": (FULL, HostProfile("x86_64", "qemu", bind=False)),
    "x86_64-two-cells": (
        dataclasses.replace(FULL, metadata=metadata(4, (2, 3), (8, 9, 12, 13)), threads_per_core=1),
        KVM,
    ),
    "x86_64-no-devices-of-its-own": (BARE, TCG),
    "aarch64-kvm": (FULL, HostProfile("aarch64", "kvm")),
    "aarch64-tcg": (FULL, HostProfile("aarch64", "qemu")),
    # --- how it sits
    "x86_64-shared": (
        sized(4, (), numa=NumaPolicy(cpus=CpuPolicy.SHARED), shared_cpus=(2, 3, 10, 11), emulator_cpus=(0, 8)),
        KVM,
    ),
    "x86_64-shared-nothing-reserved": (
        sized(2, (), numa=NumaPolicy(cpus=CpuPolicy.SHARED), shared_cpus=(2, 3), emulator_cpus=()),
        KVM,
    ),
    "x86_64-isolate": (sized(4, (5, 6, 7, 8), numa=NumaPolicy(smt=SmtPolicy.ISOLATE)), KVM),
    "x86_64-require": (sized(4, (5, 13, 6, 14), numa=NumaPolicy(smt=SmtPolicy.REQUIRE), threads_per_core=2), KVM),
    "x86_64-two-guest-cells": (
        sized(8, (1, 9, 2, 10, 5, 13, 6, 14), (0, 1), numa=SPANNING, guest_cells=TWO_CELLS, threads_per_core=2),
        KVM,
    ),
    "x86_64-guest-cells-of-memory-only": (
        sized(4, (1, 2, 5, 6), (0, 1, 4), numa=SPANNING, guest_cells=THREE_CELLS, max_vcpus=6),
        KVM,
    ),
    "x86_64-two-guest-cells-declared": (
        sized(8, tuple(range(8)), (0, 1), numa=SPANNING, guest_cells=TWO_CELLS, threads_per_core=2),
        HostProfile("x86_64", "qemu", bind=False),
    ),
    "aarch64-two-guest-cells": (
        sized(8, tuple(range(8)), (0, 1), numa=SPANNING, guest_cells=TWO_CELLS, max_vcpus=12),
        HostProfile("aarch64", "kvm"),
    ),
    # --- what its memory is made of
    "x86_64-huge-pages-2-mib": (sized(4, (5, 13, 6, 14), numa=NumaPolicy(huge_page_kib=2048)), KVM),
    "x86_64-huge-pages-1-gib-two-guest-cells": (
        sized(
            *(8, (1, 9, 2, 10, 5, 13, 6, 14), (0, 1)),
            numa=NumaPolicy(multi_cell=True, huge_page_kib=1048576),
            guest_cells=TWO_CELLS,
        ),
        KVM,
    ),
    "x86_64-huge-pages-that-grow": (
        sized(4, (5, 13, 6, 14), numa=NumaPolicy(huge_page_kib=2048), max_memory_mib=8192),
        KVM,
    ),
    "aarch64-huge-pages": (
        sized(4, (5, 6, 7, 8), numa=NumaPolicy(huge_page_kib=2048)),
        HostProfile("aarch64", "kvm"),
    ),
    # --- how far it may grow
    "x86_64-growing-vcpus": (sized(4, (5, 13, 6, 14), max_vcpus=8, threads_per_core=2), KVM),
    "x86_64-shrinking-vcpus": (sized(4, (5, 13, 6, 14), max_vcpus=4, threads_per_core=2), TCG),
    "x86_64-growing-memory": (sized(2, (5, 13), max_memory_mib=16384), KVM),
    "x86_64-growing-both": (sized(2, (5, 13), max_vcpus=4, max_memory_mib=8192, threads_per_core=2), TCG),
    "x86_64-growing-shared": (
        sized(
            *(2, ()),
            numa=NumaPolicy(cpus=CpuPolicy.SHARED),
            shared_cpus=(2, 3, 10, 11),
            max_vcpus=4,
            max_memory_mib=8192,
        ),
        KVM,
    ),
    "aarch64-growing-both": (sized(2, (5, 6), max_vcpus=4, max_memory_mib=8192), HostProfile("aarch64", "kvm")),
    # --- what it has of the host's
    "x86_64-nvme-drives": (
        sized(4, (5, 13, 6, 14), nvme_drives=("0000:3b:00.0", "0001:c1:1f.7"), threads_per_core=2),
        KVM,
    ),
    "aarch64-nvme-drive": (sized(2, (5, 6), nvme_drives=("000c:01:00.0",)), HostProfile("aarch64", "kvm")),
    "x86_64-pending-resize": (
        sized(4, (5, 13, 6, 14), pending=True, max_vcpus=8, max_memory_mib=8192, threads_per_core=2),
        KVM,
    ),
    # --- where its disk is
    "x86_64-disk-in-a-pool": (
        sized(
            *(4, (5, 13, 6, 14)),
            pool="fast",
            disks=(Disk("/srv/fast/a1/root.qcow2", "qcow2", boot_order=1), DISKS[1]),
            threads_per_core=2,
        ),
        KVM,
    ),
}
# Devices that a domain gets while it runs, in the domain they make of it.
PLUGGED: dict[str, tuple[DomainDefinition, HostProfile, tuple[Element, ...]]] = {
    "x86_64-plugged-memory": (
        sized(2, (5, 13), max_memory_mib=8192),
        TCG,
        (Dimm(size=131072, guest_cell=0), Dimm(size=262144, guest_cell=0)),
    ),
}


def document(case: str) -> DomainDocument:
    if case in CASES:
        return domain_document(*CASES[case])
    definition, profile, plugged = PLUGGED[case]
    plain = domain_document(definition, profile)
    return dataclasses.replace(plain, devices=(*plain.devices, *plugged))


def text_of(case: str) -> str:
    root = document(case).render()
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


GOLDEN_CASES = (*CASES, *PLUGGED)


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_domain_xml_is_the_golden_file(case: str, regenerate_golden: bool) -> None:
    golden = GOLDEN / f"{case}.xml"
    found = text_of(case)
    if case in CASES:
        assert found == domain_xml(*CASES[case])
    if regenerate_golden:
        golden.write_text(found)
    assert found == golden.read_text(), "run with --regenerate-golden if the change is meant, and read the diff"


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.glob("*.xml")} == set(GOLDEN_CASES)


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_golden_files_are_valid_for_libvirts_schema(case: str) -> None:
    command = ["virt-xml-validate", str(GOLDEN / f"{case}.xml"), "domain"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def elements_of(value: object) -> Iterator[Element]:
    if isinstance(value, tuple):
        for item in value:
            yield from elements_of(item)
    elif isinstance(value, Element):
        yield value
        for field in dataclasses.fields(value):  # type: ignore[arg-type]
            yield from elements_of(getattr(value, field.name))


def declared(kind: type[Element]) -> Iterator[str]:
    for child in kind.__subclasses__():
        if child.__module__.startswith("ppec_agentd."):
            yield from (f"{child.__name__}.{field.name}" for field in dataclasses.fields(child))  # type: ignore[arg-type]
            yield from declared(child)


def test_every_declared_field_is_in_some_golden_file() -> None:
    used = {
        f"{type(element).__name__}.{field.name}"
        for case in GOLDEN_CASES
        for element in elements_of(document(case))
        for field in dataclasses.fields(element)  # type: ignore[arg-type]
        if getattr(element, field.name) not in (None, ())
    }
    assert set(declared(Element)) - used == set()


@pytest.mark.parametrize("case", CASES)
def test_what_is_built_is_read_back(case: str) -> None:
    definition, profile = CASES[case]
    seen = observe(domain_xml(definition, profile), VmState.STOPPED)
    domain = seen.domain
    assert seen.damage == ""
    assert domain.metadata == definition.metadata
    assert (domain.vm_id, domain.name, domain.vcpus) == (VM_ID, "web-1", definition.metadata.vcpus)
    assert domain.memory_mib == 4096
    assert domain.macs == tuple(nic.mac for nic in definition.nics)
    assert domain.disks == tuple(ObservedDisk(disk.path, disk.format) for disk in definition.disks)
    assert domain.host_devices == definition.metadata.nvme_drives
    assert domain.pins == (definition.metadata.pins if profile.bind else ())
    assert domain.memory_cells == (definition.metadata.cells if profile.bind else ())


XML_TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs"), exclude_characters="\ufffe\uffff"))
METADATA = st.builds(
    DomainMetadata,
    vm_id=st.uuids(),
    name=XML_TEXT,
    operation_id=XML_TEXT,
    cells=st.lists(st.integers(0, 99)).map(tuple),
    vcpus=st.integers(0, 512),
    memory_mib=st.integers(0, 2**40),
    disk_mib=st.integers(0, 2**40),
    image_sha256=XML_TEXT,
    pins=st.lists(st.builds(VcpuPin, vcpu=st.integers(0, 512), pcpu=st.integers(0, 4096))).map(tuple),
    numa=st.builds(
        NumaPolicy,
        cpus=st.just(CpuPolicy.DEDICATED),
        smt=st.sampled_from(SmtPolicy),
        multi_cell=st.booleans(),
        huge_page_kib=st.sampled_from((0, 2048, 1048576)),
    )
    | st.just(NumaPolicy(cpus=CpuPolicy.SHARED)),
    max_vcpus=st.integers(0, 512),
    max_memory_mib=st.integers(0, 2**40),
    guest_cells=st.lists(
        st.builds(
            GuestCell,
            cell=st.integers(0, 99),
            vcpus=st.sets(st.integers(0, 512)).map(sorted).map(tuple),
            memory_mib=st.integers(0, 2**40),
            distances=st.lists(st.integers(10, 254)).map(tuple),
        )
    ).map(tuple),
    pending=st.booleans(),
    pool=XML_TEXT,
    nvme_drives=st.lists(XML_TEXT).map(tuple),
)


@given(METADATA)
def test_metadata_survives_whatever_its_text_holds(value: DomainMetadata) -> None:
    text = ElementTree.tostring(metadata_element(value).render(), encoding="unicode")
    outer = ElementTree.Element("metadata")
    outer.append(ElementTree.fromstring(text))
    assert parse_metadata(outer) == value


@given(st.sampled_from(["</name><devices/>", "&xxe;", "<!DOCTYPE a>", "]]>", '" type="kvm', "{{ 7*7 }}", "$(id)"]))
def test_markup_in_a_path_stays_text(hostile: str) -> None:
    definition = dataclasses.replace(FULL, disks=(Disk(f"/vms/{hostile}", "raw"),), console_log=f"/log/{hostile}")
    xml = domain_xml(definition, HostProfile("x86_64", "qemu"))
    root = ElementTree.fromstring(xml)
    assert len(root.findall("devices")) == 1
    assert root.get("type") == "qemu"
    assert observe(xml, VmState.STOPPED).domain.disks == (ObservedDisk(f"/vms/{hostile}", "raw"),)


def test_domains_of_the_first_version_are_still_read() -> None:
    seen = observe((Path(__file__).parent / "first-version-domain.xml").read_text(), VmState.RUNNING)
    assert seen.damage == ""
    assert seen.domain.metadata == metadata(4, (1,), (5, 13, 6, 14))


def test_damaged_metadata_is_reported_and_not_believed() -> None:
    xml = domain_xml(FULL, HostProfile("x86_64", "qemu")).replace(' memory_mib="4096"', "")
    seen = observe(xml, VmState.RUNNING)
    assert not seen.domain.managed
    assert "memory_mib" in seen.damage


def test_a_domain_made_by_hand_is_read_without_metadata() -> None:
    xml = """<domain type='qemu'><name>pet</name><uuid>5f9b2c1e-0d6a-4c7e-9f00-0000000000b2</uuid>
        <memory unit='KiB'>65536</memory><vcpu cpuset='0-1'>3</vcpu>
        <cputune><vcpupin vcpu='0' cpuset='1'/><vcpupin vcpu='1' cpuset='0-1'/></cputune>
        <devices><disk type='block'><source dev='/dev/vg/pet'/></disk><disk device='cdrom'/>
        <disk type='file'><driver name='qemu' type='vmdk'/><source file='/srv/pet.vmdk'/>
        <backingStore type='file'><format type='raw'/><source file='/srv/base'/></backingStore></disk>
        <disk type='network'><driver name='qemu' type='raw'/><source protocol='rbd' name='pool/pet'/></disk>
        <disk type='nvme'><driver name='qemu' type='raw'/><source type='pci' managed='yes' namespace='1'>
        <address domain='0x0000' bus='0x02' slot='0x1f' function='0x1'/></source></disk>
        <hostdev mode='subsystem' type='pci' managed='no'><source>
        <address domain='0x0000' bus='0x01' slot='0x00' function='0x0'/></source>
        <address type='pci' domain='0x0000' bus='0x09' slot='0x00' function='0x0'/></hostdev>
        <hostdev mode='subsystem' type='usb'><source><vendor id='0x1'/><product id='0x2'/></source></hostdev>
        <interface type='network'><mac address='52:54:00:AA:00:01'/></interface></devices></domain>"""
    domain = observe(xml, VmState.PAUSED).domain
    assert not domain.managed
    assert (domain.state, domain.memory_mib, domain.vcpus) == (VmState.PAUSED, 64, 3)
    assert domain.pins == (VcpuPin(vcpu=0, pcpu=1),), "a vCPU that floats over two CPUs owns neither"
    assert domain.disks == (
        ObservedDisk("/dev/vg/pet"),
        *(ObservedDisk("/srv/pet.vmdk", "vmdk"), ObservedDisk("/srv/base", "raw")),
        ObservedDisk("", "raw", "protocol=rbd name=pool/pet"),
        ObservedDisk("", "raw", "type=pci managed=yes namespace=1"),
    )
    assert domain.host_devices == ("0000:01:00.0", "0000:02:1f.1")
    assert domain.macs == ("52:54:00:aa:00:01",)


@pytest.mark.parametrize("xml", ["<network/>", "<domain><name>x</name></domain>"])
def test_what_is_no_domain_is_refused(xml: str) -> None:
    with pytest.raises(ValueError, match="no domain"):
        observe(xml, VmState.STOPPED)


def test_an_architecture_without_rules_is_refused_by_name() -> None:
    with pytest.raises(PpecError, match="riscv64") as caught:
        domain_xml(FULL, HostProfile("riscv64", "qemu"))
    assert caught.value.code == "hypervisor.failed"


def test_disk_letters_go_on_after_z() -> None:
    assert [disk_letters(index) for index in (0, 1, 25, 26, 51, 52, 701, 702)] == [
        *("vda", "vdb", "vdz", "vdaa", "vdaz", "vdba", "vdzz", "vdaaa"),
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample(Element):
    TAG = "sample"
    flag: Annotated[bool, At("@flag")] = True
    present: Annotated[bool, At("a/present")] = True
    absent: Annotated[bool, At("a/absent")] = False
    text: Annotated[str, At("a/text")] = "<&>"
    missing: Annotated[str | None, At("b/@missing")] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placeless(Element):
    TAG = "placeless"
    value: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Formless(Element):
    TAG = "formless"
    value: Annotated[float, At("@value")] = 1.5


def test_the_declarative_base() -> None:
    rendered = ElementTree.tostring(Sample().render(), encoding="unicode")
    assert rendered == '<sample flag="yes"><a><present /><text>&lt;&amp;&gt;</text></a></sample>'
    with pytest.raises(TypeError, match=r"Placeless\.value"):
        Placeless().render()
    with pytest.raises(TypeError, match=r"1\.5"):
        Formless().render()
