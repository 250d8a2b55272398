# SPDX-License-Identifier: Apache-2.0
"""``<interface>``: a virtio NIC on a Linux bridge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ppec_agentd.domain_xml.element import At, Element


@dataclass(frozen=True, kw_only=True)
class BridgeInterface(Element):
    """Without a boot ROM: guests start from disk, and each ROM costs a second of firmware time under TCG."""

    TAG = "interface"
    type: Annotated[str, At("@type")] = "bridge"
    mac: Annotated[str, At("mac/@address")]
    bridge: Annotated[str, At("source/@bridge")]
    model: Annotated[str, At("model/@type")] = "virtio"
    rom: Annotated[bool, At("rom/@enabled")] = False
