# SPDX-License-Identifier: Apache-2.0
"""``<disk>``: a virtio block device on a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ppec_agentd.domain_xml.element import At, Element


@dataclass(frozen=True, kw_only=True)
class FileDisk(Element):
    """`discard` unmap gives blocks the guest trims back to the host's file system."""

    TAG = "disk"
    type: Annotated[str, At("@type")] = "file"
    device: Annotated[str, At("@device")] = "disk"
    driver: Annotated[str, At("driver/@name")] = "qemu"
    format: Annotated[str, At("driver/@type")]
    cache: Annotated[str | None, At("driver/@cache")] = None
    io: Annotated[str | None, At("driver/@io")] = None
    discard: Annotated[str | None, At("driver/@discard")] = None
    iothread: Annotated[int | None, At("driver/@iothread")] = None
    source: Annotated[str, At("source/@file")]
    target: Annotated[str, At("target/@dev")]
    bus: Annotated[str, At("target/@bus")] = "virtio"
    read_only: Annotated[bool, At("readonly")] = False
    boot_order: Annotated[int | None, At("boot/@order")] = None


def disk_letters(index: int) -> str:
    """The device name of the n-th virtio disk: 0 is vda, 25 vdz, 26 vdaa."""
    letters = ""
    index += 1
    while index:
        index, letter = divmod(index - 1, 26)
        letters = chr(ord("a") + letter) + letters
    return f"vd{letters}"
