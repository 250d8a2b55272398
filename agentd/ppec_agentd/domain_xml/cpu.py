# SPDX-License-Identifier: Apache-2.0
"""``<cpu>``: the model the guest sees and the shape its vCPUs seem to have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ppec_agentd.domain_xml.element import At, Element


@dataclass(frozen=True, kw_only=True)
class CpuFeature(Element):
    TAG = "feature"
    policy: Annotated[str, At("@policy")]
    name: Annotated[str, At("@name")]


@dataclass(frozen=True, kw_only=True)
class CpuTopology(Element):
    """libvirt wants sockets x cores x threads to be the vCPU count, of those that may yet be plugged as well."""

    TAG = "topology"
    sockets: Annotated[int, At("@sockets")] = 1
    cores: Annotated[int, At("@cores")]
    threads: Annotated[int, At("@threads")]


@dataclass(frozen=True, kw_only=True)
class CellDistance(Element):
    TAG = "sibling"
    cell: Annotated[int, At("@id")]
    value: Annotated[int, At("@value")]


@dataclass(frozen=True, kw_only=True)
class GuestNumaCell(Element):
    """A NUMA cell of the guest's own, KiB. One without vCPUs holds memory alone."""

    TAG = "cell"
    cell: Annotated[int, At("@id")]
    vcpus: Annotated[str | None, At("@cpus")] = None
    memory: Annotated[int, At("@memory")]
    memory_unit: Annotated[str, At("@unit")] = "KiB"
    distances: Annotated[tuple[CellDistance, ...], At("distances")] = ()


@dataclass(frozen=True, kw_only=True)
class Cpu(Element):
    """`check` none: libvirt asks the CPU model questions of QEMU only where a migration needs the answer."""

    TAG = "cpu"
    mode: Annotated[str, At("@mode")]
    check: Annotated[str, At("@check")] = "none"
    topology: Annotated[CpuTopology, At("")]
    features: Annotated[tuple[CpuFeature, ...], At("")] = ()
    cells: Annotated[tuple[GuestNumaCell, ...], At("numa")] = ()
