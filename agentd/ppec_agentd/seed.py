# SPDX-License-Identifier: Apache-2.0
"""The NoCloud seed: a small ISO with meta-data, user-data and network-config, as cloud-init reads it.

Source: cloud-init's documentation of the NoCloud datasource and of network config version 2. Meta-data and network
config are written as JSON, which is valid YAML and leaves nothing to inject into; user data is the tenant's bytes.
Equal VMs get equal bytes, so a seed can be compared, and a repeated step writes what was there.
"""

from __future__ import annotations

import io
import json
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from ppec_contract.vm import Nic, VmSpec

VOLUME_LABEL = "cidata"
EMPTY_USER_DATA = "#cloud-config\n{}\n"
# 1 January 2000: what "no particular time" looks like in a directory.
_YEAR_SINCE_1900 = 100


def network_config(nics: tuple[Nic, ...]) -> dict[str, Any]:
    """Network config version 2: each NIC is found by its MAC address, whatever the guest calls it."""
    return {"version": 2, "ethernets": {f"nic{number}": _ethernet(nic) for number, nic in enumerate(nics)}}


def _ethernet(nic: Nic) -> dict[str, Any]:
    gateways: list[IPv4Address | IPv6Address] = [g for g in (nic.gateway4, nic.gateway6) if g is not None]
    ethernet: dict[str, Any] = {"match": {"macaddress": nic.mac}, "dhcp4": False, "dhcp6": False}
    if nic.addresses:
        ethernet["addresses"] = [str(address) for address in nic.addresses]
    if gateways:
        # cloud-init 22.4 (Debian 12) turns "default" into an IPv4 route in some of its renderers: name the network.
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
    """The ISO 9660 image with Joliet and Rock Ridge names. Blocks for some milliseconds: call it in a thread."""
    # Imported here: a large module, and an agent at rest never needs it.
    import pycdlib

    iso = pycdlib.PyCdlib()
    iso.new(interchange_level=3, joliet=3, rock_ridge="1.09", vol_ident=VOLUME_LABEL)
    for number, (name, content) in enumerate(sorted(seed_files(vm).items())):
        iso.add_fp(
            io.BytesIO(content), len(content), iso_path=f"/FILE{number}.;1", rr_name=name, joliet_path=f"/{name}"
        )
    _without_times(iso)
    image = io.BytesIO()
    iso.write_fp(image)
    iso.close()
    return _without_modification_date(image.getvalue())


def _without_times(iso: Any) -> None:
    """pycdlib stamps everything with the present; a seed has no time, so that equal VMs get equal bytes."""
    from pycdlib.dates import VolumeDescriptorDate

    for volume in (iso.pvd, iso.joliet_vd):
        for field in ("volume_creation_date", "volume_effective_date"):
            unspecified = VolumeDescriptorDate()
            unspecified.new(0.0)
            setattr(volume, field, unspecified)
        root = volume.root_directory_record()
        for record in (root, *root.children):
            _set_date(record.date)
            if record.rock_ridge is not None:
                for entries in (record.rock_ridge.dr_entries, record.rock_ridge.ce_entries):
                    _set_rock_ridge_dates(getattr(entries, "tf_record", None))


def _without_modification_date(image: bytes) -> bytes:
    """pycdlib fills it in as it writes. It stands at bytes 831-847 of both volume descriptors (ECMA-119 8.4.27)."""
    changed = bytearray(image)
    for sector in (16, 17):
        start = sector * 2048 + 830
        changed[start : start + 17] = b"0" * 16 + b"\0"
    return bytes(changed)


def _set_rock_ridge_dates(times: Any) -> None:
    for field in ("creation_time", "access_time", "modification_time", "attribute_change_time"):
        date = getattr(times, field, None)
        if date is not None:
            _set_date(date)


def _set_date(date: Any) -> None:
    date.years_since_1900, date.month, date.day_of_month = _YEAR_SINCE_1900, 1, 1
    date.hour = date.minute = date.second = date.gmtoffset = 0
