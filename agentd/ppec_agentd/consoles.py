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
from ppec_contract.errors import PpecError
from ppec_contract.guest import MAX_CONSOLE_TAIL_BYTES, ReadConsole, ReadConsoleReply
from ppec_contract.vm import VmState

log = structlog.get_logger(__name__)
MOST_READERS = 16
LOOK_EVERY_S = 0.1
SIGN_OF_LIFE_S = 5.0


class _Watched:
    """One VM's console while somebody reads it."""

    def __init__(self, path: Path) -> None:
        self.window = Window(MAX_CONSOLE_TAIL_BYTES)
        self.readers = 0
        self.news = asyncio.Condition()
        self._follower = LogFollower(path)
        self._task: asyncio.Task[None] | None = None
        self._begun = asyncio.Lock()

    async def begin(self) -> None:
        async with self._begun:
            if self._task is None:
                self.window.put(await asyncio.to_thread(self._follower.tail, MAX_CONSOLE_TAIL_BYTES))
                self._task = asyncio.create_task(self._follow(), name="console")

    async def end(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        self._follower.close()

    async def _follow(self) -> None:
        while True:
            try:
                data = await asyncio.to_thread(self._follower.read)
            except OSError as error:
                log.warning("console_log_unreadable", why=str(error))
                data = b""
            if data:
                async with self.news:
                    self.window.put(data)
                    self.news.notify_all()
            else:
                await asyncio.sleep(LOOK_EVERY_S)

    async def wait(self, position: int, timeout_s: float) -> None:
        """Until the window goes on behind `position`, or so long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self.news:
                await self.news.wait_for(lambda: self.window.end > position)


class Consoles:
    """The consoles of one host's VMs."""

    def __init__(self, hypervisor: Hypervisor, vms_dir: Path) -> None:
        self._hypervisor = hypervisor
        self._vms_dir = vms_dir
        self._watched: dict[UUID, _Watched] = {}

    async def read(self, request: ReadConsole, *, follow: bool) -> AsyncGenerator[ReadConsoleReply, None]:
        """Pieces of the console, in order. Raises `vm.not_found`, `vm.wrong_state` for a domain PPEC did not make,
        `agent.busy` when too many read."""
        state = (await self._found(request.vm_id)).state
        async with self._watching(request.vm_id) as watched:
            window = watched.window
            position = max(window.begin, window.end - request.tail_bytes)
            shown: VmState | None = None
            while True:
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
                await watched.wait(position, SIGN_OF_LIFE_S)
                if window.end == position:
                    domain = await self._look(request.vm_id)
                    if domain is None:
                        return
                    state = domain.state if isinstance(domain, Domain) else state

    async def write(self, vm_id: UUID, data: bytes) -> None:
        """Raises as `read` does, and as the port's `type_on_console`. What is typed is logged nowhere."""
        await self._found(vm_id)
        await self._hypervisor.type_on_console(vm_id, data)

    async def _look(self, vm_id: UUID) -> Domain | bool | None:
        """The domain; None if it is gone; False if that can't be told now."""
        try:
            return await self._hypervisor.domain(vm_id)
        except PpecError:
            return False

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
    async def _watching(self, vm_id: UUID) -> AsyncIterator[_Watched]:
        if sum(watched.readers for watched in self._watched.values()) >= MOST_READERS:
            raise PpecError(
                "agent.busy",
                f"{MOST_READERS} readers watch consoles of this host already",
                hint="Try again when one has left.",
                subject="console",
            )
        watched = self._watched.get(vm_id)
        if watched is None:
            watched = self._watched[vm_id] = _Watched(VmFolder(self._vms_dir, vm_id).console_log)
        watched.readers += 1
        try:
            await watched.begin()
            yield watched
        finally:
            watched.readers -= 1
            if not watched.readers:
                self._watched.pop(vm_id, None)
                await watched.end()
