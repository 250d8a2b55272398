# SPDX-License-Identifier: Apache-2.0
"""Freeze a guest's file systems, with an end written down first, and thaw them."""

from __future__ import annotations

from uuid import UUID

from ppec_agentd.actions.context import HostContext, Outcome, Steps, refuse_foreign, vm_not_found
from ppec_agentd.guests import NOBODY_ASKED
from ppec_agentd.hypervisor import Domain
from ppec_agentd.observed import vm_info
from ppec_contract.agent import Stage
from ppec_contract.errors import PpecError
from ppec_contract.vm import VmState

ASK_S = 10.0


async def freeze(host: HostContext, vm_id: UUID, steps: Steps, thaw_after_s: float) -> Outcome:
    """A guest that is frozen already stays so for `thaw_after_s` from now, and nothing was changed.

    That it is frozen is for the guest to say: it may have begun anew since it was, and writes again.

    Raises `vm.not_found`, `vm.wrong_state`, `guest.agent_unavailable`, `guest.agent_failed`. A freeze that failed may
    have been one all the same: it is thawed at once, and again later if that fails.
    """
    domain = await _found(host, vm_id, steps)
    if domain.state is not VmState.RUNNING:
        raise PpecError(
            "vm.wrong_state",
            f"can't freeze vm {domain.name}: it is {domain.state}",
            hint="A guest that does not run writes nothing: its disks can be copied as they are.",
            subject=f"vm {domain.name}",
            details={"state": domain.state},
        )
    with steps.stage(Stage.FREEZE):
        async with host.thaws.turn(vm_id):
            already = host.thaws.frozen(vm_id)
            await host.thaws.thaw_after(vm_id, thaw_after_s)
            changed = await _freeze(host, vm_id, already=already)
    return Outcome(changed, vm_info(domain), domain.name)


async def thaw(host: HostContext, vm_id: UUID, steps: Steps) -> Outcome:
    """A VM that is not frozen, or is off, is a success that changed nothing. Raises as `freeze` does."""
    domain = await _found(host, vm_id, steps)
    with steps.stage(Stage.THAW):
        async with host.thaws.turn(vm_id):
            changed = await host.hypervisor.thaw(vm_id)
            await host.thaws.forget(vm_id)
    return Outcome(changed, vm_info(domain), domain.name)


async def _freeze(host: HostContext, vm_id: UUID, *, already: bool) -> bool:
    """False if the guest is frozen by an earlier call. What becomes of a freeze after that is left to its end."""
    try:
        await host.hypervisor.freeze(vm_id)
    except PpecError as error:
        if already:
            if await _takes_only_its_thaw(host, vm_id, error):
                return False
            raise
        asked = error.code != "vm.wrong_state" and error.details != NOBODY_ASKED
        await (host.thaws.thaw_after(vm_id, 0) if asked else host.thaws.forget(vm_id))
        raise
    except BaseException:
        # The end comes now. Whoever thaws waits for this turn to be over.
        await host.thaws.thaw_after(vm_id, 0)
        raise
    return True


async def _takes_only_its_thaw(host: HostContext, vm_id: UUID, refusal: PpecError) -> bool:
    """A frozen guest's agent refuses every question; one that refused the freeze alone answers them."""
    if refusal.code != "guest.agent_failed":
        return False
    try:
        await host.hypervisor.guest(vm_id, ASK_S)
    except PpecError as error:
        return error.code == "guest.agent_failed"
    return False


async def _found(host: HostContext, vm_id: UUID, steps: Steps) -> Domain:
    domain = await host.hypervisor.domain(vm_id)
    if domain is None:
        raise vm_not_found(vm_id)
    refuse_foreign(domain)
    steps.name = domain.name
    return domain
