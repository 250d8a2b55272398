# SPDX-License-Identifier: Apache-2.0
"""Start a VM that is stopped. It kept its cores and memory, so there is nothing to admit.

A definition that was enlarged behind the agent's back is the exception: the ledger is asked for what it lacks. A resize
that failed and is still to be taken back comes first: a VM started before that would have the size that its owner was
told it has not got, until its next start.
"""

from __future__ import annotations

from uuid import UUID

from ppec_agentd.actions.context import HostContext, Outcome, Steps, refuse_foreign, vm_not_found
from ppec_agentd.actions.resize import hold, settle_resize
from ppec_agentd.observed import vm_info
from ppec_contract.agent import Stage
from ppec_contract.vm import VmState


async def start(host: HostContext, vm_id: UUID, steps: Steps) -> Outcome:
    """A VM that runs already is a success that changed nothing. Raises `vm.not_found`, `vm.start_failed`.

    If its definition has grown by hand, also `host.no_capacity` and what else `Ledger.resize` raises; if a resize is
    still to be taken back, what `settle_resize` raises. A VM that is off keeps its NVMe drives, which are then at the
    host's driver: if the host uses one, the start is refused.
    """
    domain = await host.hypervisor.domain(vm_id)
    if domain is None:
        raise vm_not_found(vm_id)
    refuse_foreign(domain)
    steps.name = domain.name
    off = domain.state in (VmState.STOPPED, VmState.CRASHED)
    if off and host.unfit.get(vm_id) is not None:
        await settle_resize(host, vm_id)
        domain = await host.hypervisor.domain(vm_id) or domain
    if off and domain.metadata is not None:
        # What a resize left to this start: what the old size had beyond it is given back.
        hold(host.ledger, domain.metadata)
        await host.drives.refuse_used(f"vm {domain.name}", domain.metadata.nvme_drives)
    async with host.starts:
        with steps.stage(Stage.START):
            changed = await host.hypervisor.start(vm_id)
    now = await host.hypervisor.domain(vm_id)
    return Outcome(changed, vm_info(now or domain), domain.name)
