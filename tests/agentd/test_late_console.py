# SPDX-License-Identifier: Apache-2.0
"""Typing that libvirt takes longer for than anybody waits leaves no console open."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest

pytest.importorskip("libvirt")

from ppec_agentd.libvirt_console import LibvirtConsole
from ppec_contract.errors import PpecError

VM = UUID(int=7)


class Libvirt:
    """A connection, its one domain and that one's console: what is called on any of them."""

    def __init__(self) -> None:
        self.typed, self.opened, self.aborted = b"", 0, 0

    def lookupByUUIDString(self, _vm_id: str) -> Libvirt:
        return self

    def newStream(self, _flags: int) -> Libvirt:
        return self

    def isActive(self) -> int:
        return 1

    def openConsole(self, _device: None, _stream: Libvirt, _flags: int) -> None:
        self.opened += 1

    def eventAddCallback(self, *_arguments: object) -> None:
        pass

    def eventRemoveCallback(self) -> None:
        pass

    def send(self, data: bytes) -> int:
        self.typed += data
        return len(data)

    def abort(self) -> None:
        self.aborted += 1


class SlowConnection:
    """Gives each call up; `late` are those that libvirt is still at work on."""

    def __init__(self) -> None:
        self.late: list[Callable[[Any], object]] = []

    async def call(self, _what: str, _vm_id: UUID, work: Callable[[Any], object], _timeout_s: float = 0) -> object:
        self.late.append(work)
        raise PpecError("hypervisor.unavailable", "no answer in time")


class Console(LibvirtConsole):
    def __init__(self, connection: Any) -> None:
        super().__init__()
        self._connection = connection


def test_a_console_that_is_opened_after_its_deadline_is_closed_at_once() -> None:
    connection, libvirt = SlowConnection(), Libvirt()
    with pytest.raises(PpecError) as refused:
        asyncio.run(Console(connection).type_on_console(VM, b"x"))
    assert refused.value.code == "hypervisor.unavailable"
    for work in connection.late:
        work(libvirt)
    assert (libvirt.typed, libvirt.opened, libvirt.aborted) == (b"x", 1, 1)
