# SPDX-License-Identifier: Apache-2.0
"""``<controller>``: said only where libvirt's own choice is not wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ppec_agentd.domain_xml.element import At, Element


@dataclass(frozen=True, kw_only=True)
class NoUsb(Element):
    """libvirt adds USB controllers to a domain that doesn't refuse them; a server guest has no use for their timers."""

    TAG = "controller"
    type: Annotated[str, At("@type")] = "usb"
    model: Annotated[str, At("@model")] = "none"
