# SPDX-License-Identifier: Apache-2.0
"""``<rng>``: entropy for the guest's first boot, without which its key generation waits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ppec_agentd.domain_xml.element import At, Element


@dataclass(frozen=True, kw_only=True)
class Rng(Element):
    TAG = "rng"
    model: Annotated[str, At("@model")] = "virtio"
    backend: Annotated[str, At("backend/@model")] = "random"
    source: Annotated[str, At("backend")] = "/dev/urandom"
