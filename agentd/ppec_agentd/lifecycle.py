# SPDX-License-Identifier: Apache-2.0
"""Lifecycle events inside the agent: hand them to whoever listens, and wait for a state by them.

Shared by the hypervisor adapters.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from uuid import UUID

from ppec_agentd.hypervisor import EventCallback, Hypervisor, HypervisorEvent
from ppec_contract.errors import PpecError
from ppec_contract.vm import VmState

# libvirt drops events in corners of its own (a domain destroyed while a restarted daemon still reconnects to it is off
# without "stopped"), so a wait looks again after this long even if nothing was heard.
LOOK_AGAIN_S = 5.0

_log = logging.getLogger(__name__)


class EventFanout:
    """The listeners of one hypervisor. Used on the event loop's thread only."""

    def __init__(self) -> None:
        self._callbacks: list[EventCallback] = []

    def add(self, callback: EventCallback) -> Callable[[], None]:
        self._callbacks.append(callback)

        def remove() -> None:
            if callback in self._callbacks:
                self._callbacks.remove(callback)

        return remove

    def send(self, event: HypervisorEvent) -> None:
        """Call every listener; one that raises is logged and does not keep the others from the event."""
        for callback in tuple(self._callbacks):
            try:
                callback(event)
            except Exception:
                _log.exception("a listener failed on event %s of %s", event.kind, event.vm_id)


async def wait_for_state(hypervisor: Hypervisor, vm_id: UUID, state: VmState, timeout_s: float) -> bool:
    """`Hypervisor.wait_state`: look, then look again after each event about the domain or the connection."""
    woken = asyncio.Event()

    def wake(event: HypervisorEvent) -> None:
        if event.vm_id in (vm_id, None):
            woken.set()

    # Listening starts before the first look, so that no change falls between the two.
    remove = hypervisor.on_event(wake)
    try:
        async with asyncio.timeout(timeout_s) as deadline:
            while True:
                woken.clear()
                domain = await hypervisor.domain(vm_id)
                if domain is None:
                    raise vm_not_found(vm_id)
                if domain.state == state:
                    return True
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_AGAIN_S):
                        await woken.wait()
    except TimeoutError:
        if not deadline.expired():
            raise
        return False
    finally:
        remove()


def vm_not_found(vm_id: UUID) -> PpecError:
    return PpecError("vm.not_found", f"this host has no VM {vm_id}", subject=f"vm {vm_id}")
