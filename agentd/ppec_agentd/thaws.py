# SPDX-License-Identifier: Apache-2.0
"""No guest stays frozen for ever: each freeze has an end that outlives its caller, and the agent itself.

Before a guest is frozen, the end of it is written into the VM's folder (`frozen.json`). A task waits for it, and goes
on trying until the guest was thawed, is off, or is gone; a restarted agent finds the file. The end is wall-clock time,
and never farther off than the longest freeze there is, so that a clock set back holds nobody for long.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from uuid import UUID
from weakref import WeakValueDictionary

import structlog

from ppec_agentd.files import os_errors, write_whole
from ppec_agentd.guests import GuestPort
from ppec_contract.agent import MAX_FROZEN_S
from ppec_contract.errors import PpecError

log = structlog.get_logger(__name__)
RECORD = "frozen.json"
AGAIN_S = 5.0
LONGEST_PAUSE_S = 60.0


class Thaws:
    """The freezes of one host. `turn` keeps what is done to one guest's freeze in order."""

    def __init__(
        self, guests: GuestPort, vms_dir: Path, clock: Callable[[], float] = time.time, again_s: float = AGAIN_S
    ) -> None:
        self._guests = guests
        self._vms_dir = vms_dir
        self._clock = clock
        self._again_s = again_s
        self._turns: WeakValueDictionary[UUID, asyncio.Lock] = WeakValueDictionary()
        self._ends: dict[UUID, float] = {}
        self._moved: dict[UUID, asyncio.Event] = {}
        self._tasks: dict[UUID, asyncio.Task[None]] = {}

    @contextlib.asynccontextmanager
    async def turn(self, vm_id: UUID) -> AsyncIterator[None]:
        async with self._turns.setdefault(vm_id, asyncio.Lock()):
            yield

    def frozen(self, vm_id: UUID) -> bool:
        """By the host's own record: frozen, or about to be, or not known to be thawed."""
        return vm_id in self._ends

    async def thaw_after(self, vm_id: UUID, seconds: float) -> None:
        """Writes down the end of a freeze that begins or goes on, and waits for it. Raises `disk.full`."""
        end = self._clock() + seconds
        await asyncio.to_thread(self._write, vm_id, end)
        self._wait_until(vm_id, end)

    async def forget(self, vm_id: UUID) -> None:
        """The guest is frozen no more."""
        self._ends.pop(vm_id, None)
        self._move(vm_id)
        await asyncio.to_thread(self._record(vm_id).unlink, missing_ok=True)

    def resume(self) -> tuple[UUID, ...]:
        """After a restart: waits for all ends that are written down."""
        found = []
        for record in sorted(self._vms_dir.glob(f"*/{RECORD}")):
            with contextlib.suppress(ValueError):  # no VM's folder
                vm_id = UUID(record.parent.name)
                self._wait_until(vm_id, self._read(record))
                found.append(vm_id)
        return tuple(found)

    async def close(self) -> None:
        """Waits for nothing more; the records stay for the next agent."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _record(self, vm_id: UUID) -> Path:
        return self._vms_dir / str(vm_id) / RECORD

    def _write(self, vm_id: UUID, end: float) -> None:
        with os_errors(f"the freeze of vm {vm_id} can't be written down", f"vm {vm_id}"):
            write_whole(self._record(vm_id), json.dumps({"thaw_at_unix_s": end}).encode())

    def _read(self, record: Path) -> float:
        """Now, if it can't be read: to thaw too early does less harm than never."""
        try:
            return float(json.loads(record.read_bytes())["thaw_at_unix_s"])
        except (OSError, ValueError, TypeError, KeyError):
            return self._clock()

    def _wait_until(self, vm_id: UUID, end: float) -> None:
        self._ends[vm_id] = min(end, self._clock() + MAX_FROZEN_S)
        self._move(vm_id)
        if vm_id not in self._tasks:
            self._tasks[vm_id] = asyncio.create_task(self._thaw_in_time(vm_id), name=f"thaw {vm_id}")

    def _move(self, vm_id: UUID) -> None:
        if vm_id in self._moved:
            self._moved[vm_id].set()

    async def _thaw_in_time(self, vm_id: UUID) -> None:
        moved = self._moved[vm_id] = asyncio.Event()
        pause_s = self._again_s
        try:
            while (end := self._ends.get(vm_id)) is not None:
                moved.clear()
                if end > (now := self._clock()):
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(moved.wait(), end - now)
                    continue
                if await self._thawed(vm_id):
                    pause_s = self._again_s
                    continue
                # Cut short by a thaw or another freeze meanwhile: the end of that must not wait for this pause.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(moved.wait(), pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        finally:
            # With the last look at the end, and not when the loop gets to tell of the task: a freeze that begins in
            # between would count on this task, and nobody would ever thaw it.
            self._moved.pop(vm_id, None)
            self._tasks.pop(vm_id, None)

    async def _thawed(self, vm_id: UUID) -> bool:
        async with self.turn(vm_id):
            end = self._ends.get(vm_id)
            if end is None or end > self._clock():
                return True  # thawed, or frozen anew, while this waited for its turn
            try:
                await self._guests.thaw(vm_id)
            except PpecError as error:
                # A paused guest can't be thawed, and is frozen still when it runs on.
                if error.code != "vm.not_found":
                    log.warning("not_thawed_yet", vm_id=str(vm_id), code=error.code, why=error.message)
                    return False
            await self.forget(vm_id)
            log.warning("thawed_in_time", vm_id=str(vm_id))
            return True
