# SPDX-License-Identifier: Apache-2.0
"""The views of simulated hosts: guests that say their name, and consoles that a test writes and that echo."""

from __future__ import annotations

import asyncio
import base64
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar
from uuid import UUID

from ppec_contract.errors import PpecError
from ppec_contract.guest import (
    GuestInfo,
    QueryGuests,
    QueryGuestsReply,
    ReadConsole,
    ReadConsoleReply,
    WriteConsole,
    WriteConsoleReply,
)
from ppec_contract.model import Model
from ppec_contract.vm import VmInfo, VmState
from ppec_orchestrator.dispatch.simulated import SimulatedFleet
from ppec_orchestrator.host_views.port import HostDoor, unreachable, view_of

M = TypeVar("M", bound=Model)
# Readers look that often: what changes a simulated fleet has no event loop.
_LOOK_S = 0.01


class SimulatedViews:
    """Implements `port.HostViews` on a fleet in memory."""

    def __init__(self, fleet: SimulatedFleet) -> None:
        self.fleet = fleet
        # All that was ever written on each VM's console.
        self.consoles: dict[UUID, bytes] = defaultdict(bytes)
        # Hosts that don't answer, and guests without an agent.
        self.silent: set[str] = set()
        self.deaf: set[UUID] = set()
        # The lines open right now.
        self.lines = 0

    @asynccontextmanager
    async def line(self, door: HostDoor) -> AsyncIterator[SimulatedLine]:
        self.lines += 1
        try:
            yield SimulatedLine(self, door)
        finally:
            self.lines -= 1


class SimulatedLine:
    """Implements `port.HostLine`."""

    def __init__(self, views: SimulatedViews, door: HostDoor) -> None:
        self._views = views
        self._door = door

    async def ask(self, question: Model, answer: type[M], *, patience_s: float = 0.0) -> M:
        self._answer_or_raise(question)
        reply: Model
        if isinstance(question, QueryGuests):
            found = [self._vms[vm_id] for vm_id in question.vm_ids if vm_id in self._vms]
            reply = QueryGuestsReply(guests=tuple(self._guest(vm) for vm in found))
        elif isinstance(question, WriteConsole):
            reply = self._type(question)
        else:
            raise TypeError(f"no simulated host answers {type(question).__name__}")
        return answer.model_validate(reply.model_dump())

    async def follow(self, question: Model, answer: type[M]) -> AsyncGenerator[M, None]:
        self._answer_or_raise(question)
        if not isinstance(question, ReadConsole):
            raise TypeError(f"no simulated host tells {type(question).__name__} piece by piece")
        vm_id = question.vm_id
        self._found(vm_id)
        consoles = self._views.consoles
        position = max(len(consoles[vm_id]) - question.tail_bytes, 0)
        shown: VmState | None = None
        while True:
            vm = self._vms.get(vm_id)
            data, state = consoles[vm_id][position:], vm.state if vm is not None else None
            position += len(data)
            if data or state is not shown:
                text = base64.b64encode(data).decode()
                piece = ReadConsoleReply(data=text, state=state if state is not shown else None)
                shown = state
                yield answer.model_validate(piece.model_dump())
            if vm is None or not question.follow:
                return
            self._answer_or_raise(question)
            await asyncio.sleep(_LOOK_S)

    @property
    def _vms(self) -> dict[UUID, VmInfo]:
        return self._views.fleet.vms[self._door.host]

    def _answer_or_raise(self, question: Model) -> None:
        view_of(question)
        if self._door.host in self._views.silent:
            raise unreachable(self._door, "simulated silence")

    def _found(self, vm_id: UUID) -> VmInfo:
        if vm_id not in self._vms:
            raise PpecError("vm.not_found", f"vm {vm_id} is not on this host", subject=f"vm {vm_id}")
        return self._vms[vm_id]

    def _guest(self, vm: VmInfo) -> GuestInfo:
        hears = vm.state is VmState.RUNNING and vm.vm_id not in self._views.deaf
        return GuestInfo(
            vm_id=vm.vm_id,
            name=vm.name,
            agent_connected=hears,
            frozen=vm.vm_id in self._views.fleet.frozen,
            hostname=vm.name if hears else "",
        )

    def _type(self, typed: WriteConsole) -> WriteConsoleReply:
        vm = self._found(typed.vm_id)
        if vm.state not in (VmState.RUNNING, VmState.PAUSED):
            raise PpecError("vm.wrong_state", f"can't type to vm {vm.name}: it is off", subject=f"vm {vm.name}")
        data = base64.b64decode(typed.data)
        self._views.consoles[typed.vm_id] += data
        return WriteConsoleReply(written_bytes=len(data))
