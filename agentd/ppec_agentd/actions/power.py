# SPDX-License-Identifier: Apache-2.0
"""Reboot, reset, pause and resume a VM that is on. None of them holds or gives back anything, so none has an undo."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from uuid import UUID

from ppec_agentd.actions.context import HostContext, Outcome, Steps, refuse_foreign, vm_not_found
from ppec_agentd.actions.stop import PRESS_EVERY_S
from ppec_agentd.hypervisor import Domain, EventKind, Hypervisor, HypervisorEvent
from ppec_agentd.observed import vm_info
from ppec_contract.agent import Stage
from ppec_contract.errors import PpecError
from ppec_contract.vm import VmState

_ENDS = (EventKind.REBOOTED, EventKind.STOPPED, EventKind.CRASHED)
ON = frozenset({VmState.RUNNING, VmState.PAUSED})


@dataclass(frozen=True, slots=True)
class Switch:
    """One switch of a machine: the stage it is, the states in which it can be used, and the use of it."""

    stage: Stage
    states: frozenset[VmState]
    use: Callable[[Hypervisor, UUID], Awaitable[bool]]


RESET = Switch(Stage.RESET, frozenset({VmState.RUNNING}), lambda hypervisor, vm_id: hypervisor.reset(vm_id))
PAUSE = Switch(Stage.PAUSE, ON, lambda hypervisor, vm_id: hypervisor.pause(vm_id))
RESUME = Switch(Stage.RESUME, ON, lambda hypervisor, vm_id: hypervisor.resume(vm_id))


async def switch(host: HostContext, vm_id: UUID, steps: Steps, switched: Switch) -> Outcome:
    """A VM that is so already is a success that changed nothing. Raises `vm.not_found`, `vm.wrong_state`."""
    domain = await _found(host, vm_id, steps, switched.stage, switched.states)
    with steps.stage(switched.stage):
        changed = await switched.use(host.hypervisor, vm_id)
    return await _outcome(host, domain, changed=changed)


async def reboot(host: HostContext, vm_id: UUID, steps: Steps, timeout_s: float, *, force: bool) -> Outcome:
    """Ask the guest, wait, and only if told to, reset it. Raises `vm.not_found`, `vm.wrong_state`, `vm.reboot_timeout`,
    and `vm.went_off` if the VM is off then, whoever switched it off: there is nothing to reset."""
    domain = await _found(host, vm_id, steps, Stage.REBOOT, frozenset({VmState.RUNNING}))
    with steps.stage(Stage.REBOOT):
        obeyed = await _ask(host.hypervisor, vm_id, timeout_s)
    if not obeyed:
        await _refuse_off(host, domain)
    if not obeyed and not force:
        raise PpecError(
            "vm.reboot_timeout",
            f"vm {domain.name} did not reboot within {timeout_s:g} s",
            hint="Give it more time, or reset it. It may reboot yet.",
            subject=f"vm {domain.name}",
            details={"timeout_s": timeout_s},
        )
    if not obeyed:
        with steps.stage(Stage.RESET):
            if not await host.hypervisor.reset(vm_id):
                await _refuse_off(host, domain)
    return await _outcome(host, domain, changed=True)


async def _found(host: HostContext, vm_id: UUID, steps: Steps, stage: Stage, states: frozenset[VmState]) -> Domain:
    domain = await host.hypervisor.domain(vm_id)
    if domain is None:
        raise vm_not_found(vm_id)
    refuse_foreign(domain)
    steps.name = domain.name
    if domain.state not in states:
        raise _wrong_state(domain.name, stage, domain.state)
    return domain


async def _outcome(host: HostContext, before: Domain, *, changed: bool) -> Outcome:
    now = await host.hypervisor.domain(before.vm_id)
    return Outcome(changed, vm_info(now or before), before.name)


async def _ask(hypervisor: Hypervisor, vm_id: UUID, timeout_s: float) -> bool:
    """Whether the guest began anew in time; False at once if it went off. The button is pressed again: a guest that
    boots loses the first press, and one that went off without an event is found out by it."""
    rebooted, ended = asyncio.Event(), asyncio.Event()

    def hear(event: HypervisorEvent) -> None:
        if event.vm_id == vm_id and event.kind is EventKind.REBOOTED:
            rebooted.set()
        if event.vm_id == vm_id and event.kind in _ENDS:
            ended.set()

    loop = asyncio.get_running_loop()
    end = loop.time() + timeout_s
    remove = hypervisor.on_event(hear)
    try:
        while (left := end - loop.time()) > 0 and not ended.is_set():
            if not await hypervisor.reboot(vm_id):
                return False
            try:
                async with asyncio.timeout(min(left, PRESS_EVERY_S)):
                    await ended.wait()
            except TimeoutError:
                continue
    finally:
        remove()
    return rebooted.is_set()


async def _refuse_off(host: HostContext, before: Domain) -> None:
    """Raises `vm.went_off` and `vm.not_found`."""
    now = await host.hypervisor.domain(before.vm_id)
    if now is None:
        raise vm_not_found(before.vm_id)
    if now.state not in ON:
        raise PpecError(
            "vm.went_off",
            f"vm {before.name} was to reboot, and is {now.state}",
            hint="Start it. If nobody switched it off, its guest shut down instead of rebooting.",
            subject=f"vm {before.name}",
            details={"state": now.state},
        )


def _wrong_state(name: str, stage: Stage, found: VmState) -> PpecError:
    hint = "Resume it first." if found is VmState.PAUSED else "Start it first."
    return PpecError(
        "vm.wrong_state",
        f"can't {stage} vm {name}: it is {found}",
        hint=hint,
        subject=f"vm {name}",
        details={"state": found},
    )
