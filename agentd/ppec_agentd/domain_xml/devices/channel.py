# SPDX-License-Identifier: Apache-2.0
"""``<channel>``: the guest agent's way in; libvirt chooses the socket's path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ppec_agentd.domain_xml.element import At, Element


@dataclass(frozen=True, kw_only=True)
class GuestAgentChannel(Element):
    TAG = "channel"
    type: Annotated[str, At("@type")] = "unix"
    target_type: Annotated[str, At("target/@type")] = "virtio"
    name: Annotated[str, At("target/@name")] = "org.qemu.guest_agent.0"
