# SPDX-License-Identifier: Apache-2.0
"""``<hostdev>``: a PCI device of the host, handed to the guest whole by VFIO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ppec_agentd.domain_xml.element import At, Element


@dataclass(frozen=True, kw_only=True)
class PciHostDevice(Element):
    """`managed`: libvirt takes the device from the host's driver when the domain starts, and gives it back at the end.

    The device reaches all of the guest's memory, so VFIO locks all of it at the start, and libvirt raises QEMU's limit
    for that by itself. Without the device's boot ROM: what the tenant before left there would be the guest's firmware.
    """

    TAG = "hostdev"
    mode: Annotated[str, At("@mode")] = "subsystem"
    type: Annotated[str, At("@type")] = "pci"
    managed: Annotated[bool, At("@managed")] = True
    domain: Annotated[str, At("source/address/@domain")]
    bus: Annotated[str, At("source/address/@bus")]
    slot: Annotated[str, At("source/address/@slot")]
    function: Annotated[str, At("source/address/@function")]
    rom: Annotated[bool, At("rom/@enabled")] = False


def pci_host_device(address: str) -> PciHostDevice:
    """The device at an address as the kernel writes it: 0000:3b:00.0."""
    domain, bus, rest = address.split(":")
    slot, function = rest.split(".")
    return PciHostDevice(domain=f"0x{domain}", bus=f"0x{bus}", slot=f"0x{slot}", function=f"0x{function}")
