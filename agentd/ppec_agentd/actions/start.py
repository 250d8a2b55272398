# SPDX-License-Identifier: Apache-2.0
"""Start a VM that is stopped. It kept its cores and memory, so there is nothing to admit."""

from __future__ import annotations

from uuid import UUID

from ppec_agentd.actions.context import HostContext, Outcome, Steps, refuse_foreign, vm_not_found
from ppec_agentd.observed import vm_info
from ppec_contract.agent import Stage


async def start(host: HostContext, vm_id: UUID, steps: Steps) -> Outcome:
    """A VM that runs already is a success that changed nothing. Raises `vm.not_found`, `vm.start_failed`."""
    domain = await host.hypervisor.domain(vm_id)
    if domain is None:
        raise vm_not_found(vm_id)
    refuse_foreign(domain)
    steps.name = domain.name
    async with host.starts:
        with steps.stage(Stage.START):
            changed = await host.hypervisor.start(vm_id)
    now = await host.hypervisor.domain(vm_id)
    return Outcome(changed, vm_info(now or domain), domain.name)
