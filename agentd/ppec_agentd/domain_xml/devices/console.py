# SPDX-License-Identifier: Apache-2.0
"""``<serial>`` and ``<console>``: the guest's serial console on a pty, with an optional log file kept by virtlogd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ppec_agentd.domain_xml.element import At, Element


@dataclass(frozen=True, kw_only=True)
class Serial(Element):
    TAG = "serial"
    type: Annotated[str, At("@type")] = "pty"
    log_file: Annotated[str | None, At("log/@file")] = None
    log_append: Annotated[str | None, At("log/@append")] = None
    target_type: Annotated[str, At("target/@type")]
    port: Annotated[int, At("target/@port")] = 0


@dataclass(frozen=True, kw_only=True)
class Console(Element):
    """The same port again, under the name `virsh console` looks for."""

    TAG = "console"
    type: Annotated[str, At("@type")] = "pty"
    target_type: Annotated[str, At("target/@type")] = "serial"
    port: Annotated[int, At("target/@port")] = 0
