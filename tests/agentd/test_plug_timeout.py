# SPDX-License-Identifier: Apache-2.0
"""How long libvirt may take to plug memory into a domain whose memory VFIO locks: a connection only notes it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest

from ppec_agentd.domain_xml.build import HostProfile
from ppec_agentd.libvirt_connection import LibvirtOptions
from ppec_agentd.libvirt_resize import LibvirtResize

VM = UUID(int=1)
GIB_KIB = 1024 * 1024
DEVICE = """<hostdev mode='subsystem' type='pci' managed='yes'>
  <source><address domain='0x0000' bus='0x3b' slot='0x00' function='0x0'/></source></hostdev>"""
XML = f"""<domain type='kvm'><name>vm</name><uuid>{VM}</uuid><memory>{GIB_KIB}</memory><vcpu>1</vcpu>
  <os><type arch='x86_64'>hvm</type></os><devices>%s</devices></domain>"""


class NotingConnection:
    """Runs what only looks, and notes the deadline of what plugs."""

    def __init__(self, xml: str) -> None:
        self.xml = xml
        self.timeouts_s: list[float | None] = []

    def lookupByUUIDString(self, _text: str) -> NotingConnection:
        return self

    def XMLDesc(self, _flags: int = 0) -> str:
        return self.xml

    async def call(self, what: str, _vm_id: UUID, work: Callable[[Any], Any], timeout_s: float | None = None) -> Any:
        if what == "look at":
            return work(self)
        self.timeouts_s.append(timeout_s)
        return True


@pytest.mark.parametrize(("devices", "longer_s"), [("", 0), (DEVICE, 511)])
def test_memory_that_is_locked_while_it_is_plugged_has_longer(devices: str, longer_s: int) -> None:
    connection = NotingConnection(XML % devices)
    resize = LibvirtResize()
    resize._connection = connection  # type: ignore[assignment]
    resize._options = LibvirtOptions(call_timeout_s=30)
    resize._profile = HostProfile("x86_64", "kvm")
    assert asyncio.run(resize.grow_memory(VM, (512 * 1024,)))
    assert connection.timeouts_s == [30 + longer_s]
