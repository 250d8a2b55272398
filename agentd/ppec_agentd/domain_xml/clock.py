# SPDX-License-Identifier: Apache-2.0
"""``<clock>``: the guest's hardware clock keeps UTC; which timers exist depends on the architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ppec_agentd.domain_xml.element import At, Element


@dataclass(frozen=True, kw_only=True)
class Timer(Element):
    TAG = "timer"
    name: Annotated[str, At("@name")]
    present: Annotated[bool | None, At("@present")] = None
    tick_policy: Annotated[str | None, At("@tickpolicy")] = None


@dataclass(frozen=True, kw_only=True)
class Clock(Element):
    TAG = "clock"
    offset: Annotated[str, At("@offset")] = "utc"
    timers: Annotated[tuple[Timer, ...], At("")] = ()
