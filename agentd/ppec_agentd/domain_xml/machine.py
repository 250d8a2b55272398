# SPDX-License-Identifier: Apache-2.0
"""``<os>`` and ``<features>``: machine type, firmware, and the switches of the platform."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ppec_agentd.domain_xml.element import At, Element


@dataclass(frozen=True, kw_only=True)
class Machine(Element):
    """`firmware` "efi" has libvirt choose an UEFI image; None is the machine's own (SeaBIOS on q35)."""

    TAG = "os"
    firmware: Annotated[str | None, At("@firmware")] = None
    architecture: Annotated[str, At("type/@arch")]
    machine: Annotated[str, At("type/@machine")]
    type: Annotated[str, At("type")] = "hvm"


@dataclass(frozen=True, kw_only=True)
class Features(Element):
    """ACPI is what `shutdown` presses the power button of."""

    TAG = "features"
    acpi: Annotated[bool, At("acpi")] = True
    apic: Annotated[bool, At("apic")] = False
    vmport: Annotated[str | None, At("vmport/@state")] = None
