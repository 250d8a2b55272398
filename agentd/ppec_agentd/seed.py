# SPDX-License-Identifier: Apache-2.0
"""The NoCloud seed: a small ISO with meta-data, user-data and network-config, as cloud-init reads it.

Source: cloud-init's documentation of the NoCloud datasource and of network config version 2. Meta-data and network
config are written as JSON, which is valid YAML and leaves nothing to inject into; user data is the tenant's bytes.
Equal VMs get equal bytes, so a seed can be compared, and a repeated step writes what was there.
"""

from __future__ import annotations

import json
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from ppec_agentd.iso_image import iso_image
from ppec_contract.vm import Nic, VmSpec

VOLUME_LABEL = "cidata"
EMPTY_USER_DATA = "#cloud-config\n{}\n"


def network_config(nics: tuple[Nic, ...]) -> dict[str, Any]:
    """Network config version 2: each NIC is found by its MAC address, whatever the guest calls it."""
    return {"version": 2, "ethernets": {f"nic{number}": _ethernet(nic) for number, nic in enumerate(nics)}}


def _ethernet(nic: Nic) -> dict[str, Any]:
    gateways: list[IPv4Address | IPv6Address] = [g for g in (nic.gateway4, nic.gateway6) if g is not None]
    ethernet: dict[str, Any] = {"match": {"macaddress": nic.mac}, "dhcp4": False, "dhcp6": False}
    if nic.addresses:
        ethernet["addresses"] = [str(address) for address in nic.addresses]
    if gateways:
        # The word "default" came late to netplan and to some of cloud-init's renderers; all know the networks.
        ethernet["routes"] = [{"to": _everything(gateway), "via": str(gateway)} for gateway in gateways]
    if nic.nameservers:
        ethernet["nameservers"] = {"addresses": [str(server) for server in nic.nameservers]}
    return ethernet


def _everything(gateway: IPv4Address | IPv6Address) -> str:
    return "0.0.0.0/0" if gateway.version == 4 else "::/0"


def seed_files(vm: VmSpec) -> dict[str, bytes]:
    """The three files by name. A new `instance-id` makes cloud-init configure anew; ours is the VM's id."""
    meta_data = {"instance-id": str(vm.vm_id), "local-hostname": vm.name}
    return {
        "meta-data": _json(meta_data),
        "user-data": (vm.user_data or EMPTY_USER_DATA).encode("utf-8", "surrogatepass"),
        "network-config": _json(network_config(vm.nics)),
    }


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"


def seed_iso(vm: VmSpec) -> bytes:
    """The image, found by its label."""
    return iso_image(VOLUME_LABEL, seed_files(vm))
