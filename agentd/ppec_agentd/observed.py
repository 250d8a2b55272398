# SPDX-License-Identifier: Apache-2.0
"""From libvirt's domain, as the port shows it, to the contract's VM."""

from __future__ import annotations

from ppec_agentd.domain_xml.architecture import rules_for
from ppec_agentd.domain_xml.sizing import Sizing
from ppec_agentd.hypervisor import Domain, DomainDefinition
from ppec_contract.vm import MOST_SEEN_MIB, MOST_SEEN_VCPUS, Size, VmInfo, VmState
from ppec_contract.words import MAX_CELLS, MAX_MACS, MAX_PINS, short


def vm_info(domain: Domain) -> VmInfo:
    """What is known of it, within the contract's bounds: for a domain PPEC did not make, what libvirt says."""
    ours = domain.metadata
    return VmInfo(
        vm_id=domain.vm_id,
        name=short(domain.name),
        state=domain.state,
        managed=domain.managed,
        vcpus=min(domain.vcpus, MOST_SEEN_VCPUS),
        memory_mib=min(domain.memory_mib, MOST_SEEN_MIB),
        cells=ours.cells if ours else domain.memory_cells[:MAX_CELLS],
        pins=domain.pins[:MAX_PINS],
        disk_mib=ours.disk_mib if ours else 0,
        image_sha256=ours.image_sha256 if ours else "",
        macs=domain.macs[:MAX_MACS],
        operation_id=ours.operation_id if ours else "",
        max_vcpus=min(domain.max_vcpus, MOST_SEEN_VCPUS),
        max_memory_mib=min(domain.max_memory_mib, MOST_SEEN_MIB),
        numa=ours.numa if ours else None,
        pending=Size(vcpus=domain.next.vcpus, memory_mib=domain.next.memory_mib) if domain.next else None,
        nvme_drives=ours.nvme_drives if ours else (),
        pool=ours.pool if ours else "",
    )


def started_info(definition: DomainDefinition, architecture: str) -> VmInfo:
    """The VM that was just started from this definition, as it will be seen."""
    vm, size = definition.metadata, Sizing(definition, rules_for(architecture), bind=True)
    return VmInfo(
        vm_id=vm.vm_id,
        name=vm.name,
        state=VmState.RUNNING,
        managed=True,
        vcpus=vm.vcpus,
        memory_mib=vm.memory_mib,
        cells=vm.cells,
        pins=vm.pins,
        disk_mib=vm.disk_mib,
        image_sha256=vm.image_sha256,
        macs=tuple(nic.mac for nic in definition.nics),
        operation_id=vm.operation_id,
        max_vcpus=size.most_vcpus,
        max_memory_mib=size.most_memory_mib,
        numa=vm.numa,
        nvme_drives=vm.nvme_drives,
        pool=vm.pool,
    )
