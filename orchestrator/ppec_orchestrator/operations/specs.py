# SPDX-License-Identifier: Apache-2.0
"""What a host is told of a VM: its spec from the record, the allocation and the granted addresses. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from ppec_contract.vm import Nic, NumaPolicy, RootDisk, VmSpec
from ppec_orchestrator.store.serving import GrantedAddress
from ppec_orchestrator.store.vms import PlacedVm


def vm_spec(placed: PlacedVm) -> VmSpec:
    """The same for the same record, whenever it is asked: a repeated run must ask for the same VM."""
    return VmSpec(
        vm_id=placed.vm_id,
        name=placed.name,
        vcpus=placed.vcpus,
        memory_mib=placed.memory_mib,
        max_vcpus=placed.max_vcpus,
        max_memory_mib=placed.max_memory_mib,
        numa=placed.numa,
        cells=placed.cells,
        root_disk=RootDisk(size_mib=placed.disk_mib, image=placed.image, pool=placed.pool),
        nvme_drives=placed.nvme_drives,
        nics=nics(placed.vm_id, placed.addresses),
        user_data=placed.user_data,
    )


def told(spec: VmSpec) -> dict[str, Any]:
    """The spec as it travels. What says nothing beyond its default stays at home: agents from before
    `Capability.VM_POLICIES`, or of drives and pools, refuse what they don't know, and they can make ordinary VMs."""
    numa = NumaPolicy().model_dump(mode="json")
    ordinary = {"max_vcpus": None, "max_memory_mib": None, "numa": numa, "nvme_drives": 0}
    whole = spec.model_dump(mode="json", exclude=None if spec.root_disk.pool else {"root_disk": {"pool"}})
    return {name: value for name, value in whole.items() if name not in ordinary or value != ordinary[name]}


def nics(vm_id: UUID, addresses: Sequence[GrantedAddress]) -> tuple[Nic, ...]:
    """One NIC per bridge, with all the VM's addresses there. The first address of each family has the VM's gateway:
    a guest with two default routes would answer on the wrong one."""
    by_bridge: dict[str, list[GrantedAddress]] = {}
    for one in addresses:
        by_bridge.setdefault(one.bridge, []).append(one)
    first: dict[int, GrantedAddress] = {}
    for one in addresses:
        first.setdefault(one.address.version, one)
    return tuple(
        _nic(mac_address(vm_id, number), bridge, mine, [one for one in first.values() if one in mine])
        for number, (bridge, mine) in enumerate(by_bridge.items())
    )


def _nic(mac: str, bridge: str, addresses: Sequence[GrantedAddress], routers: Sequence[GrantedAddress]) -> Nic:
    nameservers = dict.fromkeys(server for one in addresses for server in one.nameservers)
    gateways = {one.address.version: one.gateway for one in routers if one.gateway is not None}
    return Nic.model_validate(
        {
            "mac": mac,
            "bridge": bridge,
            "addresses": tuple(one.address for one in addresses),
            "gateway4": gateways.get(4),
            "gateway6": gateways.get(6),
            "nameservers": tuple(nameservers)[:4],
        }
    )


def mac_address(vm_id: UUID, number: int) -> str:
    """Of a VM's NIC by its number: the same wherever the VM stands and whatever its addresses are.

    Locally administered, unicast, 45 hashed bits: two of a million VMs meet on one wire with a chance of one in
    seventy. The first byte stays below 0x80, because libvirt keeps 0xfe for the host's side of a NIC.
    """
    first, *rest = hashlib.sha256(vm_id.bytes + number.to_bytes(2, "big")).digest()[:6]
    return ":".join(f"{byte:02x}" for byte in ((first & 0x7C) | 0x02, *rest))
