# SPDX-License-Identifier: Apache-2.0
"""From a `DomainDefinition` and the host's profile to the domain's XML."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal
from xml.etree import ElementTree

from ppec_agentd.domain_xml.architecture import ArchitectureRules, rules_for
from ppec_agentd.domain_xml.devices.balloon import Balloon
from ppec_agentd.domain_xml.devices.channel import GuestAgentChannel
from ppec_agentd.domain_xml.devices.console import Console, Serial
from ppec_agentd.domain_xml.devices.controller import NoUsb
from ppec_agentd.domain_xml.devices.disk import FileDisk, disk_letters
from ppec_agentd.domain_xml.devices.hostdev import pci_host_device
from ppec_agentd.domain_xml.devices.interface import BridgeInterface
from ppec_agentd.domain_xml.devices.rng import Rng
from ppec_agentd.domain_xml.domain import DomainDocument
from ppec_agentd.domain_xml.element import Element
from ppec_agentd.domain_xml.metadata import metadata_element
from ppec_agentd.domain_xml.sizing import IOTHREAD, Sizing
from ppec_agentd.hypervisor import BridgeNic, Disk, DomainDefinition, DomainType
from ppec_contract.host import Architecture

DiskCache = Literal["none", "writeback"]


@dataclass(frozen=True, slots=True)
class HostProfile:
    """What every domain of one host has in common.

    `bind` false leaves out all pins and memory bindings: a declared topology's CPUs don't exist. `disk_cache` "none" is
    for production: O_DIRECT with native AIO, so that the guest's flush is the only cache control and migration is
    safe; a file system without O_DIRECT (tmpfs, some overlays) needs "writeback", QEMU's own default, as safe for data
    the guest flushed.
    """

    architecture: Architecture
    domain_type: DomainType
    bind: bool = True
    disk_cache: DiskCache = "none"


def domain_xml(definition: DomainDefinition, profile: HostProfile) -> str:
    """The domain's XML. Raises ``hypervisor.failed`` for an architecture without rules."""
    root = domain_document(definition, profile).render()
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def domain_document(definition: DomainDefinition, profile: HostProfile) -> DomainDocument:
    rules, vm = rules_for(profile.architecture), definition.metadata
    size = Sizing(definition, rules, profile.bind)
    return DomainDocument(
        type=profile.domain_type,
        name=vm.name,
        uuid=str(vm.vm_id),
        metadata=metadata_element(vm),
        memory_maximum=size.memory_maximum(),
        memory=vm.memory_mib * 1024,
        memory_backing=size.memory_backing(),
        vcpu_cpuset=size.vcpu_cpuset(),
        vcpus_now=size.vcpus_now,
        vcpus=size.most_vcpus,
        vcpu_states=tuple(size.vcpu_states()),
        iothreads=1 if definition.disks else None,
        cputune=size.cputune(iothreads=bool(definition.disks)),
        numatune=size.numatune(),
        machine=rules.machine,
        features=rules.features,
        cpu=rules.cpu(profile.domain_type, size.topology(), size.guest_cells()),
        clock=rules.clock,
        devices=tuple(_devices(definition, profile, rules)),
    )


def _devices(definition: DomainDefinition, profile: HostProfile, rules: ArchitectureRules) -> Iterator[Element]:
    for index, disk in enumerate(definition.disks):
        yield _disk(index, disk, profile.disk_cache)
    yield NoUsb()
    yield from (_interface(nic) for nic in definition.nics)
    log = definition.console_log or None
    yield Serial(log_file=log, log_append="on" if log else None, target_type=rules.serial_target)
    yield Console()
    yield GuestAgentChannel()
    yield from (pci_host_device(address) for address in definition.metadata.nvme_drives)
    yield Balloon()
    yield Rng()


def _disk(index: int, disk: Disk, cache: DiskCache) -> FileDisk:
    return FileDisk(
        format=disk.format,
        cache=cache,
        # QEMU refuses native AIO without O_DIRECT.
        io="native" if cache == "none" else "threads",
        discard=None if disk.read_only else "unmap",
        iothread=IOTHREAD,
        source=disk.path,
        target=disk_letters(index),
        read_only=disk.read_only,
        boot_order=disk.boot_order,
    )


def _interface(nic: BridgeNic) -> BridgeInterface:
    return BridgeInterface(mac=nic.mac, bridge=nic.bridge)
