# SPDX-License-Identifier: Apache-2.0
"""Delete: pull the plug, remove the definition, wipe the VM's own folder, give back what it held.

There is no undo, on purpose: each step can be repeated, and a delete that broke off is finished by the next one.
"""

from __future__ import annotations

import asyncio
from uuid import UUID

from ppec_agentd.actions.context import HostContext, Outcome, Steps, refuse_foreign
from ppec_contract.agent import Stage


async def delete(host: HostContext, vm_id: UUID, steps: Steps) -> Outcome:
    """Idempotent: an absent VM is a success that changed nothing. Raises `vm.wrong_state` for a foreign domain."""
    domain = await host.hypervisor.domain(vm_id)
    if domain is not None:
        refuse_foreign(domain)
        steps.name = domain.name
        with steps.stage(Stage.STOP):
            await host.hypervisor.destroy(vm_id)
        with steps.stage(Stage.UNDEFINE):
            await host.hypervisor.undefine(vm_id)
    with steps.stage(Stage.CLEANUP):
        removed = await asyncio.to_thread(host.folder(vm_id).remove)
    released = host.ledger.release(vm_id)
    return Outcome(domain is not None or removed or released, None, domain.name if domain else "")


async def erase_domain(host: HostContext, vm_id: UUID, operation_id: str) -> bool:
    """Removes the domain if this operation made it, running or not. False if there is nothing of the operation's."""
    domain = await host.hypervisor.domain(vm_id)
    if domain is None or domain.metadata is None or domain.metadata.operation_id != operation_id:
        return False
    await host.hypervisor.destroy(vm_id)
    return await host.hypervisor.undefine(vm_id)
