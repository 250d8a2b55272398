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
from ppec_agentd.domain_xml.memory import MemoryBacking, MemoryMaximum
from ppec_agentd.domain_xml.metadata import VmMetadata


@dataclass(frozen=True, kw_only=True)
class VcpuState(Element):
    """Whether a vCPU is there, and whether it can be unplugged; `order` is that of plugging those that are there."""

    TAG = "vcpu"
    vcpu: Annotated[int, At("@id")]
    enabled: Annotated[bool, At("@enabled")]
    hotpluggable: Annotated[bool, At("@hotpluggable")]
    order: Annotated[int | None, At("@order")] = None


@dataclass(frozen=True, kw_only=True)
class DomainDocument(Element):
    """Memory is KiB here, as libvirt counts it. A guest that powers off or panics stays off: PPEC decides what next.

    `vcpus` is the most there can be; without `vcpus_now` all of them are there from the start. vCPUs that are not
    pinned one by one run on `vcpu_cpuset`.
    """

    TAG = "domain"
    type: Annotated[str, At("@type")]
    name: Annotated[str, At("name")]
    uuid: Annotated[str, At("uuid")]
    metadata: Annotated[VmMetadata, At("metadata")]
    memory_maximum: Annotated[MemoryMaximum | None, At("")] = None
    memory_unit: Annotated[str, At("memory/@unit")] = "KiB"
    memory: Annotated[int, At("memory")]
    memory_backing: Annotated[MemoryBacking | None, At("")] = None
    vcpu_placement: Annotated[str, At("vcpu/@placement")] = "static"
    vcpu_cpuset: Annotated[str | None, At("vcpu/@cpuset")] = None
    vcpus_now: Annotated[int | None, At("vcpu/@current")] = None
    vcpus: Annotated[int, At("vcpu")]
    vcpu_states: Annotated[tuple[VcpuState, ...], At("vcpus")] = ()
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
