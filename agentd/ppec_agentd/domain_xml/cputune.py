# SPDX-License-Identifier: Apache-2.0
"""``<cputune>`` and ``<numatune>``: which host CPUs run a domain's threads, which cells hold its memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ppec_agentd.domain_xml.element import At, Element


@dataclass(frozen=True, kw_only=True)
class VcpuPinning(Element):
    TAG = "vcpupin"
    vcpu: Annotated[int, At("@vcpu")]
    cpuset: Annotated[str, At("@cpuset")]


@dataclass(frozen=True, kw_only=True)
class IothreadPinning(Element):
    TAG = "iothreadpin"
    iothread: Annotated[int, At("@iothread")]
    cpuset: Annotated[str, At("@cpuset")]


@dataclass(frozen=True, kw_only=True)
class CpuTune(Element):
    """`emulator` and `iothreads` name reserved cores, so that QEMU's own work never takes a vCPU's core."""

    TAG = "cputune"
    vcpus: Annotated[tuple[VcpuPinning, ...], At("")]
    emulator: Annotated[str | None, At("emulatorpin/@cpuset")] = None
    iothreads: Annotated[tuple[IothreadPinning, ...], At("")] = ()


@dataclass(frozen=True, kw_only=True)
class GuestCellBinding(Element):
    """The host cells that a guest's cell has its memory from."""

    TAG = "memnode"
    guest_cell: Annotated[int, At("@cellid")]
    mode: Annotated[str, At("@mode")] = "strict"
    nodeset: Annotated[str, At("@nodeset")]


@dataclass(frozen=True, kw_only=True)
class NumaTune(Element):
    """An allocation that doesn't fit the cells fails in place of silently going to a remote one.

    `restrictive` has the control group alone keep the memory there, and so it can be moved while the domain runs;
    `strict` binds it in QEMU as well, for good. libvirt wants the guest's own cells bound the same way.
    """

    TAG = "numatune"
    mode: Annotated[str, At("memory/@mode")]
    nodeset: Annotated[str, At("memory/@nodeset")]
    guest_cells: Annotated[tuple[GuestCellBinding, ...], At("")] = ()
