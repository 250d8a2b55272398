# SPDX-License-Identifier: Apache-2.0
"""``<memballoon>``: how the guest's own memory figures reach libvirt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ppec_agentd.domain_xml.element import At, Element


@dataclass(frozen=True, kw_only=True)
class Balloon(Element):
    TAG = "memballoon"
    model: Annotated[str, At("@model")] = "virtio"
    stats_period_s: Annotated[int, At("stats/@period")] = 10
