# SPDX-License-Identifier: Apache-2.0
"""From libvirt's domain, as the port shows it, to the contract's VM."""

from __future__ import annotations

from ppec_agentd.hypervisor import Domain
from ppec_contract.vm import VmInfo


def vm_info(domain: Domain) -> VmInfo:
    """What is known of it: for a domain PPEC did not make, what libvirt says and no more."""
    ours = domain.metadata
    return VmInfo(
        vm_id=domain.vm_id,
        name=domain.name,
        state=domain.state,
        managed=domain.managed,
        vcpus=domain.vcpus,
        memory_mib=domain.memory_mib,
        cells=ours.cells if ours else domain.memory_cells,
        pins=domain.pins,
        disk_mib=ours.disk_mib if ours else 0,
        image_sha256=ours.image_sha256 if ours else "",
        macs=domain.macs,
        operation_id=ours.operation_id if ours else "",
    )
