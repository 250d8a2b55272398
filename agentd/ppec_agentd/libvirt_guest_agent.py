# SPDX-License-Identifier: Apache-2.0
"""The hypervisor port's calls to agents inside guests, on libvirt.

libvirt waits for such an agent in a job of its own, so that other calls on the domain go on meanwhile. Here a few at a
time are asked, so that guests that don't answer take no more than a part of the agent's threads.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any, TypeVar
from uuid import UUID
from weakref import WeakValueDictionary
from xml.etree import ElementTree

import libvirt

from ppec_agentd.guests import GuestSays, guest_says, nobody_asked
from ppec_agentd.libvirt_connection import LibvirtConnection
from ppec_agentd.libvirt_domains import STATES, must_find, wrong_state
from ppec_contract.errors import PpecError
from ppec_contract.vm import VmState

T = TypeVar("T")

AT_ONCE = 4
FREEZE_S = 30.0
# libvirt first brings itself and the agent into step, which takes up to 5 s where no agent listens.
SYNC_S = 10.0
_CHANNEL = "devices/channel/target[@name='org.qemu.guest_agent.0']"
_QUESTIONS = (
    libvirt.VIR_DOMAIN_GUEST_INFO_HOSTNAME,
    libvirt.VIR_DOMAIN_GUEST_INFO_OS,
    libvirt.VIR_DOMAIN_GUEST_INFO_INTERFACES,
)
_SILENT = (libvirt.VIR_ERR_AGENT_UNRESPONSIVE, libvirt.VIR_ERR_AGENT_UNSYNCED)


class LibvirtGuestAgent:
    """The part of `LibvirtHypervisor` that talks to agents in guests."""

    _connection: LibvirtConnection

    def __init__(self) -> None:
        self._asked = asyncio.Semaphore(AT_ONCE)
        # An agent answers one at a time; the time it has is set on the domain.
        self._turns: WeakValueDictionary[UUID, asyncio.Lock] = WeakValueDictionary()

    async def guest(self, vm_id: UUID, timeout_s: float) -> GuestSays | None:
        def work(domain: Any) -> GuestSays | None:
            return guest_says(_answers(domain)) if _connected(domain) else None

        return await self._ask("query the agent in", vm_id, work, timeout_s)

    async def freeze(self, vm_id: UUID) -> None:
        def work(domain: Any) -> None:
            if domain.isActive() == 1 and not _connected(domain):
                raise nobody_asked(vm_id)
            domain.fsFreeze()

        await self._ask("freeze", vm_id, work, FREEZE_S)

    async def thaw(self, vm_id: UUID) -> bool:
        def work(domain: Any) -> bool:
            return bool(domain.isActive() == 1 and domain.fsThaw() > 0)

        return await self._ask("thaw", vm_id, work, FREEZE_S)

    async def _ask(self, what: str, vm_id: UUID, work: Callable[[Any], T], timeout_s: float) -> T:
        def ask(connection: Any) -> T:
            domain = must_find(connection, vm_id)
            if STATES.get(domain.state()[0]) is VmState.PAUSED:
                raise wrong_state(vm_id, what, "is paused")
            domain.agentSetResponseTimeout(math.ceil(timeout_s))
            return work(domain)

        # Each of the questions may be waited for, and the step before the first.
        longest_s = len(_QUESTIONS) * timeout_s + SYNC_S
        async with self._turns.setdefault(vm_id, asyncio.Lock()), self._asked:
            try:
                return await self._connection.call(what, vm_id, ask, longest_s)
            except PpecError as error:
                if error.code != "hypervisor.failed":
                    raise
                raise PpecError(
                    "guest.agent_failed",
                    f"the agent in vm {vm_id} refused: {error.details.get('reason', '')}",
                    hint="The reason is the guest's own; a frozen guest takes nothing but its thaw.",
                    subject=f"vm {vm_id}",
                ) from error


def _connected(domain: Any) -> bool:
    if domain.isActive() == 0:
        return False
    target = ElementTree.fromstring(domain.XMLDesc()).find(_CHANNEL)  # noqa: S314 - libvirt's own document
    return target is not None and target.get("state") == "connected"


def _answers(domain: Any) -> dict[str, Any]:
    """One question at a time: an agent that doesn't know one may know the others."""
    told: dict[str, Any] = {}
    refused = None
    for question in _QUESTIONS:
        try:
            told |= domain.guestInfo(question, 0)
        except libvirt.libvirtError as error:
            refused = error
            if error.get_error_code() in _SILENT:
                break
    if refused is not None and not told:
        raise refused
    return told
