# SPDX-License-Identifier: Apache-2.0
"""Typing on a guest's serial console, on libvirt: a stream that is open while somebody types, and not for long after.

Reading needs no stream: QEMU writes all output to the console's log, open stream or not (`consoles.py`). While one is
open the same output comes through it as well and has to be taken off, or the guest's port would fill up; so it is read
and thrown away, and closed soon: a libvirtd that hangs meanwhile would hold the guest's output up.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID
from weakref import WeakValueDictionary

import libvirt

from ppec_agentd.libvirt_connection import LibvirtConnection
from ppec_agentd.libvirt_domains import must_find, wrong_state
from ppec_contract.errors import PpecError

# QEMU looks once a second whether somebody has opened the port: a stream closed at once would lose what was typed.
IDLE_S = 5.0
TYPE_S = 10.0
_AGAIN = -2
_READ_BYTES = 64 * 1024
_EVENTS = libvirt.VIR_STREAM_EVENT_READABLE | libvirt.VIR_STREAM_EVENT_HANGUP | libvirt.VIR_STREAM_EVENT_ERROR


@dataclass(eq=False)
class _Input:
    """An open console. `ended` is set on libvirt's thread, when the guest or the connection has gone."""

    connection: Any
    stream: Any
    ended: bool = False
    closing: asyncio.TimerHandle | None = field(default=None)

    def take_off(self, stream: Any, events: int, _opaque: object) -> None:
        """libvirt's callback: throws away what the guest writes."""
        try:
            while isinstance(got := stream.recv(_READ_BYTES), bytes) and got:
                pass
            self.ended |= got == b""
        except libvirt.libvirtError:
            self.ended = True
        if self.ended or events & ~libvirt.VIR_STREAM_EVENT_READABLE:
            self.ended = True
            with contextlib.suppress(libvirt.libvirtError):
                stream.eventRemoveCallback()

    def close(self) -> None:
        """Blocks for as long as libvirt does."""
        for step in (self.stream.eventRemoveCallback, self.stream.abort):
            with contextlib.suppress(libvirt.libvirtError):
                step()


class LibvirtConsole:
    """The part of `LibvirtHypervisor` that types on consoles."""

    _connection: LibvirtConnection

    def __init__(self) -> None:
        self._inputs: dict[UUID, _Input] = {}
        self._typing: WeakValueDictionary[UUID, asyncio.Lock] = WeakValueDictionary()
        self._closing: set[asyncio.Task[None]] = set()

    async def type_on_console(self, vm_id: UUID, data: bytes) -> None:
        async with self._typing.setdefault(vm_id, asyncio.Lock()):
            known = self._inputs.get(vm_id)
            if known is not None and known.closing is not None:
                known.closing.cancel()
            given_up = threading.Event()

            def work(connection: Any) -> _Input:
                port = _type(connection, vm_id, known, data)
                if given_up.is_set():
                    # Nobody knows of it: it would keep everybody else from the console.
                    port.close()
                return port

            try:
                self._inputs[vm_id] = await self._connection.call("type on the console of", vm_id, work)
            except PpecError as error:
                given_up.set()
                await self._close(vm_id)
                if error.details.get("libvirt_code") == libvirt.VIR_ERR_OPERATION_FAILED:
                    raise _busy(vm_id) from error
                raise
            self._inputs[vm_id].closing = asyncio.get_running_loop().call_later(IDLE_S, self._close_soon, vm_id)

    async def close_consoles(self) -> None:
        for vm_id in list(self._inputs):
            await self._close(vm_id)

    def _close_soon(self, vm_id: UUID) -> None:
        task = asyncio.get_running_loop().create_task(self._close_idle(vm_id))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _close_idle(self, vm_id: UUID) -> None:
        async with self._typing.setdefault(vm_id, asyncio.Lock()):
            known = self._inputs.get(vm_id)
            # Somebody may have typed while this waited for its turn.
            if known is not None and known.closing is not None and known.closing.when() <= _now():
                await self._close(vm_id)

    async def _close(self, vm_id: UUID) -> None:
        known = self._inputs.pop(vm_id, None)
        if known is None:
            return
        if known.closing is not None:
            known.closing.cancel()
        with contextlib.suppress(PpecError):
            await self._connection.call("close the console of", vm_id, lambda _connection: known.close())


def _now() -> float:
    return asyncio.get_running_loop().time()


def _type(connection: Any, vm_id: UUID, known: _Input | None, data: bytes) -> _Input:
    if known is not None and (known.ended or known.connection is not connection):
        known.close()
        known = None
    port = known or _open(connection, vm_id)
    try:
        _send(vm_id, port, data)
    except BaseException:
        port.close()
        raise
    return port


def _open(connection: Any, vm_id: UUID) -> _Input:
    domain = must_find(connection, vm_id)
    if domain.isActive() == 0:
        raise wrong_state(vm_id, "type on the console of", "is off")
    stream = connection.newStream(libvirt.VIR_STREAM_NONBLOCK)
    domain.openConsole(None, stream, 0)
    port = _Input(connection, stream)
    stream.eventAddCallback(_EVENTS, port.take_off, None)
    return port


def _send(vm_id: UUID, port: _Input, data: bytes) -> None:
    left, end = memoryview(data), time.monotonic() + TYPE_S
    while left:
        sent = port.stream.send(bytes(left))
        if sent == _AGAIN:
            if time.monotonic() > end:
                raise PpecError(
                    "console.busy",
                    f"vm {vm_id} took {len(data) - len(left)} of {len(data)} bytes within {TYPE_S:g} s",
                    hint="Nothing in the guest reads its serial port.",
                    subject=f"vm {vm_id}",
                )
            time.sleep(0.02)
        else:
            left = left[sent:]


def _busy(vm_id: UUID) -> PpecError:
    return PpecError(
        "console.busy",
        f"somebody else has the console of vm {vm_id} open",
        hint="End the session of `virsh console` on the host, or wait for its end.",
        subject=f"vm {vm_id}",
    )
