# SPDX-License-Identifier: Apache-2.0
"""What a host is told of a VM: its spec from the record, the allocation and the granted addresses. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from uuid import UUID

from ppec_contract.vm import Nic, RootDisk, VmSpec
from ppec_orchestrator.store.ipdb import GrantedAddress
from ppec_orchestrator.store.vms import PlacedVm

_OUI = (0x52, 0x54, 0x00)


def vm_spec(placed: PlacedVm) -> VmSpec:
    """The same for the same record, whenever it is asked: a repeated run must ask for the same VM."""
    return VmSpec(
        vm_id=placed.vm_id,
        name=placed.name,
        vcpus=placed.vcpus,
        memory_mib=placed.memory_mib,
        cells=placed.cells,
        root_disk=RootDisk(size_mib=placed.disk_mib, image=placed.image),
        nics=nics(placed.vm_id, placed.addresses),
        user_data=placed.user_data,
        tags=dict(placed.tags),
    )


def nics(vm_id: UUID, addresses: Sequence[GrantedAddress]) -> tuple[Nic, ...]:
    """One NIC per bridge, with all the VM's addresses there."""
    by_bridge: dict[str, list[GrantedAddress]] = {}
    for one in addresses:
        by_bridge.setdefault(one.bridge, []).append(one)
    return tuple(_nic(vm_id, bridge, mine) for bridge, mine in by_bridge.items())


def _nic(vm_id: UUID, bridge: str, addresses: Sequence[GrantedAddress]) -> Nic:
    nameservers = dict.fromkeys(server for one in addresses for server in one.nameservers)
    gateways = {one.address.version: one.gateway for one in addresses if one.gateway is not None}
    return Nic.model_validate(
        {
            "mac": mac_address(vm_id, bridge, addresses),
            "bridge": bridge,
            "addresses": tuple(one.address for one in addresses),
            "gateway4": gateways.get(4),
            "gateway6": gateways.get(6),
            "nameservers": tuple(nameservers)[:4],
        }
    )


def mac_address(vm_id: UUID, bridge: str, addresses: Sequence[GrantedAddress]) -> str:
    """From the NIC's IPv4 address, which is unique where the MAC has to be; without one, from VM and bridge.

    Three hashed bytes alone would meet twice in a /16 half full. And when a VM moves off a host that can't be reached,
    its new address gives it another MAC than the copy that may still run there.
    """
    ipv4 = next((one.address.ip.packed for one in addresses if one.address.version == 4), None)
    tail = ipv4[-3:] if ipv4 else hashlib.sha256(f"{vm_id}/{bridge}".encode()).digest()[:3]
    return ":".join(f"{byte:02x}" for byte in (*_OUI, *tail))
