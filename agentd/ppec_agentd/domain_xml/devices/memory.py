# SPDX-License-Identifier: Apache-2.0
"""``<memory model="dimm">``: memory that is plugged into a running guest, and was not there before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ppec_agentd.domain_xml.element import At, Element


@dataclass(frozen=True, kw_only=True)
class Dimm(Element):
    """`size` is KiB, `guest_cell` the guest's own number. It has its host cells and pages from that cell's."""

    TAG = "memory"
    model: Annotated[str, At("@model")] = "dimm"
    size: Annotated[int, At("target/size")]
    unit: Annotated[str, At("target/size/@unit")] = "KiB"
    guest_cell: Annotated[int, At("target/node")]
