# SPDX-License-Identifier: Apache-2.0
"""``<domain>``: the document, its fields in the order libvirt itself writes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ppec_agentd.domain_xml.clock import Clock
from ppec_agentd.domain_xml.cpu import Cpu
from ppec_agentd.domain_xml.cputune import CpuTune, NumaTune
from ppec_agentd.domain_xml.element import At, Element
from ppec_agentd.domain_xml.machine import Features, Machine
from ppec_agentd.domain_xml.metadata import VmMetadata


@dataclass(frozen=True, kw_only=True)
class DomainDocument(Element):
    """Memory is KiB here, as libvirt counts it. A guest that powers off or panics stays off: PPEC decides what next."""

    TAG = "domain"
    type: Annotated[str, At("@type")]
    name: Annotated[str, At("name")]
    uuid: Annotated[str, At("uuid")]
    metadata: Annotated[VmMetadata, At("metadata")]
    memory_unit: Annotated[str, At("memory/@unit")] = "KiB"
    memory: Annotated[int, At("memory")]
    vcpu_placement: Annotated[str, At("vcpu/@placement")] = "static"
    vcpus: Annotated[int, At("vcpu")]
    iothreads: Annotated[int | None, At("iothreads")] = None
    cputune: Annotated[CpuTune | None, At("")] = None
    numatune: Annotated[NumaTune | None, At("")] = None
    machine: Annotated[Machine, At("")]
    features: Annotated[Features, At("")]
    cpu: Annotated[Cpu, At("")]
    clock: Annotated[Clock, At("")]
    on_poweroff: Annotated[str, At("on_poweroff")] = "destroy"
    on_reboot: Annotated[str, At("on_reboot")] = "restart"
    on_crash: Annotated[str, At("on_crash")] = "destroy"
    devices: Annotated[tuple[Element, ...], At("devices")]
