# SPDX-License-Identifier: Apache-2.0
"""The guests of the fake hypervisor: what their agents say, whether they are frozen, what was typed to them."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING
from uuid import UUID

from ppec_agentd.guests import GuestSays, nobody_asked
from ppec_agentd.hypervisor import Domain
from ppec_contract.errors import PpecError
from ppec_contract.vm import VmState

if TYPE_CHECKING:
    from ppec_agentd.fake_hypervisor import FakeOptions


class FakeGuests:
    """The part of `FakeHypervisor` that is inside its guests. Deaf ones have no agent."""

    _begin: Callable[[str], Awaitable[Callable[[], None]]]
    _must_find: Callable[[UUID], Domain]
    _options: FakeOptions

    def __init__(self) -> None:
        self.sayings: dict[UUID, GuestSays] = {}
        self.frozen: set[UUID] = set()
        self.typed: defaultdict[UUID, bytearray] = defaultdict(bytearray)

    async def guest(self, vm_id: UUID, timeout_s: float) -> GuestSays | None:
        async with asyncio.timeout(timeout_s) as deadline:
            try:
                end = await self._begin("guest")
            except TimeoutError as error:
                raise _silent(vm_id) if deadline.expired() else error from error
        domain = self._on(vm_id)
        end()
        if domain.state is not VmState.RUNNING or self._options.deaf_guests:
            return None
        if vm_id in self.frozen:
            raise _takes_only_its_thaw(vm_id)
        return self.sayings.get(vm_id, GuestSays(hostname=domain.name))

    async def freeze(self, vm_id: UUID) -> None:
        end = await self._begin("freeze")
        if self._on(vm_id).state is not VmState.RUNNING:
            raise PpecError("vm.wrong_state", f"can't freeze vm {vm_id}: it is off", subject=f"vm {vm_id}")
        if self._options.deaf_guests:
            raise nobody_asked(vm_id)
        if vm_id in self.frozen:
            raise _takes_only_its_thaw(vm_id)
        self.frozen.add(vm_id)
        end()

    async def thaw(self, vm_id: UUID) -> bool:
        end = await self._begin("thaw")
        running = self._on(vm_id).state is VmState.RUNNING
        if running and self._options.deaf_guests:
            raise nobody_asked(vm_id)
        changed = running and vm_id in self.frozen
        self.frozen.discard(vm_id)
        end()
        return changed

    async def type_on_console(self, vm_id: UUID, data: bytes) -> None:
        end = await self._begin("type_on_console")
        if self._must_find(vm_id).state not in (VmState.RUNNING, VmState.PAUSED):
            raise PpecError("vm.wrong_state", f"can't type to vm {vm_id}: it is off", subject=f"vm {vm_id}")
        self.typed[vm_id] += data
        end()

    def _on(self, vm_id: UUID) -> Domain:
        domain = self._must_find(vm_id)
        if domain.state is VmState.PAUSED:
            raise PpecError("vm.wrong_state", f"can't reach into vm {vm_id}: it is paused", subject=f"vm {vm_id}")
        return domain


def _takes_only_its_thaw(vm_id: UUID) -> PpecError:
    return PpecError("guest.agent_failed", f"the agent in vm {vm_id} refused: frozen", subject=f"vm {vm_id}")


def _silent(vm_id: UUID) -> PpecError:
    return PpecError("guest.agent_unavailable", f"vm {vm_id}: no agent answers in the guest", subject=f"vm {vm_id}")
