# SPDX-License-Identifier: Apache-2.0
"""Stop a VM: ask the guest, wait, and only if told to, pull the plug."""

from __future__ import annotations

import asyncio
from uuid import UUID

from ppec_agentd.actions.context import HostContext, Outcome, Steps, refuse_foreign, vm_not_found
from ppec_agentd.observed import vm_info
from ppec_contract.agent import Stage
from ppec_contract.errors import PpecError
from ppec_contract.vm import VmState

# A guest that is still booting loses the power button's event: it is pressed again.
PRESS_EVERY_S = 5.0


async def stop(host: HostContext, vm_id: UUID, steps: Steps, timeout_s: float, *, force: bool) -> Outcome:
    """A VM that is stopped already is a success that changed nothing. Raises `vm.not_found`, `vm.stop_timeout`."""
    domain = await host.hypervisor.domain(vm_id)
    if domain is None:
        raise vm_not_found(vm_id)
    refuse_foreign(domain)
    steps.name = domain.name
    with steps.stage(Stage.STOP):
        changed = domain.state not in (VmState.STOPPED, VmState.CRASHED)
        if changed and not await _ask(host, vm_id, timeout_s):
            if not force:
                raise PpecError(
                    "vm.stop_timeout",
                    f"vm {domain.name} did not shut down within {timeout_s:g} s",
                    hint="Give it more time, or stop it by force.",
                    subject=f"vm {domain.name}",
                    details={"timeout_s": timeout_s},
                )
            await host.hypervisor.destroy(vm_id)
    now = await host.hypervisor.domain(vm_id)
    return Outcome(changed, vm_info(now or domain), domain.name)


async def _ask(host: HostContext, vm_id: UUID, timeout_s: float) -> bool:
    """Whether the guest shut down in time, or was off."""
    loop = asyncio.get_running_loop()
    end = loop.time() + timeout_s
    while (left := end - loop.time()) > 0:
        if not await host.hypervisor.shutdown(vm_id):
            return True
        if await host.hypervisor.wait_state(vm_id, VmState.STOPPED, min(left, PRESS_EVERY_S)):
            return True
    return False
