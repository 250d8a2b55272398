# SPDX-License-Identifier: Apache-2.0
"""``<maxMemory>`` and ``<memoryBacking>``: how far the guest's memory may grow, and the pages it is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ppec_agentd.domain_xml.element import At, Element


@dataclass(frozen=True, kw_only=True)
class MemoryMaximum(Element):
    """`slots` bounds how many DIMMs can be plugged. libvirt wants a NUMA cell in a guest that has this."""

    TAG = "maxMemory"
    slots: Annotated[int, At("@slots")]
    unit: Annotated[str, At("@unit")] = "KiB"
    size: Annotated[int, At("")]


@dataclass(frozen=True, kw_only=True)
class HugePage(Element):
    """Pages of one size, KiB; `nodeset` names the guest's cells that have them, None means all of a guest's memory."""

    TAG = "page"
    size: Annotated[int, At("@size")]
    unit: Annotated[str, At("@unit")] = "KiB"
    nodeset: Annotated[str | None, At("@nodeset")] = None


@dataclass(frozen=True, kw_only=True)
class MemoryBacking(Element):
    TAG = "memoryBacking"
    pages: Annotated[tuple[HugePage, ...], At("hugepages")]
