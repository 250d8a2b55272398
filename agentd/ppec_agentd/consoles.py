# SPDX-License-Identifier: Apache-2.0
"""Serial consoles as streams: one follower per watched VM, any number of readers behind it, each at its own pace.

The follower reads the VM's console log, which QEMU and virtlogd write whoever watches: nobody here can hold a guest up,
and a restart of libvirtd cuts no stream. What it reads goes into a window of fixed size; a reader that falls behind
its beginning is told how much it missed. The last reader's leaving ends the follower.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from uuid import UUID

import structlog

from ppec_agentd.console_log import READ_BYTES, LogFollower, Window
from ppec_agentd.disks import VmFolder
from ppec_agentd.hypervisor import Domain, Hypervisor
from ppec_agentd.lifecycle import LOOK_AGAIN_S
from ppec_contract.errors import PpecError
from ppec_contract.guest import MAX_CONSOLE_TAIL_BYTES, ReadConsole, ReadConsoleReply
from ppec_contract.vm import VmState

log = structlog.get_logger(__name__)
MOST_READERS = 16
LOOK_EVERY_S = 0.1
SIGN_OF_LIFE_S = 5.0


class _Watched:
    """One VM's console while somebody reads it; `state` is the VM's, None once it is gone."""

    def __init__(self, hypervisor: Hypervisor, domain: Domain, path: Path) -> None:
        self.window = Window(MAX_CONSOLE_TAIL_BYTES)
        self.state: VmState | None = domain.state
        self.readers = 0
        self._hypervisor = hypervisor
        self._vm_id = domain.vm_id
        self._news = asyncio.Condition()
        self._follower = LogFollower(path)
        self._tasks: tuple[asyncio.Task[None], ...] = ()
        self._begun = asyncio.Lock()

    async def begin(self) -> None:
        async with self._begun:
            if not self._tasks:
                self.window.put(await asyncio.to_thread(self._follower.tail, MAX_CONSOLE_TAIL_BYTES))
                self._tasks = (
                    asyncio.create_task(self._follow(), name="console"),
                    asyncio.create_task(self._follow_state(), name="console-state"),
                )

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # A read that was begun goes on in its thread, whoever was cancelled.
        await asyncio.to_thread(self._follower.close)

    async def _follow(self) -> None:
        while True:
            try:
                data = await asyncio.to_thread(self._follower.read)
            except OSError as error:
                log.warning("console_log_unreadable", why=str(error))
                data = b""
            if data:
                async with self._news:
                    self.window.put(data)
                    self._news.notify_all()
            else:
                await asyncio.sleep(LOOK_EVERY_S)

    async def _follow_state(self) -> None:
        """Here and not in the readers: a hypervisor that hangs keeps none of them waiting."""
        changed = asyncio.Event()
        remove = self._hypervisor.on_event(lambda event: changed.set() if event.vm_id == self._vm_id else None)
        try:
            while self.state is not None:
                changed.clear()
                with suppress(PpecError):
                    domain = await self._hypervisor.domain(self._vm_id)
                    if domain is None:
                        # Its last words come first.
                        await asyncio.sleep(2 * LOOK_EVERY_S)
                    async with self._news:
                        self.state = domain.state if domain else None
                        self._news.notify_all()
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_AGAIN_S):
                        await changed.wait()
        finally:
            remove()

    async def wait(self, position: int, state: VmState | None, timeout_s: float) -> None:
        """Until the window goes on behind `position`, the VM's state is another one, or so long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._news:
                await self._news.wait_for(lambda: self.window.end > position or self.state is not state)


class Consoles:
    """The consoles of one host's VMs."""

    def __init__(self, hypervisor: Hypervisor, vms_dir: Path) -> None:
        self._hypervisor = hypervisor
        self._vms_dir = vms_dir
        self._watched: dict[UUID, _Watched] = {}

    async def read(self, request: ReadConsole, *, follow: bool) -> AsyncGenerator[ReadConsoleReply, None]:
        """Pieces of the console, in order. Raises `vm.not_found`, `vm.wrong_state` for a domain PPEC did not make,
        `agent.busy` when too many read."""
        domain = await self._found(request.vm_id)
        async with self._watching(domain) as watched:
            window = watched.window
            position = max(window.begin, window.end - request.tail_bytes)
            shown: VmState | None = None
            while True:
                state = watched.state
                data, skipped = window.take(position, READ_BYTES if follow else MAX_CONSOLE_TAIL_BYTES)
                position += skipped + len(data)
                yield ReadConsoleReply(
                    data=base64.b64encode(data).decode(),
                    skipped_bytes=skipped,
                    state=None if state is shown else state,
                )
                shown = state
                if not follow:
                    return
                if window.end > position:
                    continue
                if state is None:
                    return
                await watched.wait(position, state, SIGN_OF_LIFE_S)

    async def write(self, vm_id: UUID, data: bytes) -> None:
        """Raises as `read` does, and as the port's `type_on_console`. What is typed is logged nowhere."""
        await self._found(vm_id)
        await self._hypervisor.type_on_console(vm_id, data)

    async def _found(self, vm_id: UUID) -> Domain:
        domain = await self._hypervisor.domain(vm_id)
        if domain is None:
            raise PpecError("vm.not_found", f"vm {vm_id} is not on this host", subject=f"vm {vm_id}")
        if not domain.managed:
            raise PpecError(
                "vm.wrong_state",
                f"vm {domain.name} was not made by PPEC, which keeps no console of it",
                hint="Use virsh on the host for domains made by hand.",
                subject=f"vm {domain.name}",
            )
        return domain

    @asynccontextmanager
    async def _watching(self, domain: Domain) -> AsyncIterator[_Watched]:
        vm_id = domain.vm_id
        if sum(watched.readers for watched in self._watched.values()) >= MOST_READERS:
            raise PpecError(
                "agent.busy",
                f"{MOST_READERS} readers watch consoles of this host already",
                hint="Try again when one has left.",
                subject="console",
            )
        watched = self._watched.get(vm_id)
        if watched is None or watched.state is None:
            path = VmFolder(self._vms_dir, vm_id).console_log
            watched = self._watched[vm_id] = _Watched(self._hypervisor, domain, path)
        watched.readers += 1
        try:
            await watched.begin()
            yield watched
        finally:
            watched.readers -= 1
            if not watched.readers:
                # Another one may have come in its place while this one's VM was deleted and made anew.
                if self._watched.get(vm_id) is watched:
                    del self._watched[vm_id]
                await watched.end()
