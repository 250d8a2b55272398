# SPDX-License-Identifier: Apache-2.0
"""An agent put together in process on the fake hypervisor, without its socket."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from ppec_agentd.actions.batch import Actions
from ppec_agentd.actions.context import HostContext
from ppec_agentd.assembly import make_context, make_hypervisor, prepare_state
from ppec_agentd.fake_hypervisor import FakeHypervisor
from ppec_agentd.report import ReportSource
from ppec_agentd.service import Service
from ppec_agentd.settings import Settings
from ppec_contract.agent import CreateVms, DeleteVms, VmResult, VmsReply, WriteCall
from ppec_contract.vm import VmSpec


@dataclass
class Agent:
    """An agent without its socket. `emitted` is everything it streamed."""

    settings: Settings
    hypervisor: FakeHypervisor
    context: HostContext
    actions: Actions
    service: Service
    emitted: list[VmsReply] = field(default_factory=list)

    async def run(self, request: WriteCall) -> tuple[VmResult, ...]:
        return (await self.actions.run(request, self.emitted.append)).results

    async def create(self, *vms: VmSpec, operation: str = "op-1", fence: int = 1) -> tuple[VmResult, ...]:
        return await self.run(CreateVms(operation_id=operation, fence=fence, vms=vms))

    async def delete(self, *vm_ids: uuid.UUID, operation: str = "op-1", fence: int = 1) -> tuple[VmResult, ...]:
        return await self.run(DeleteVms(operation_id=operation, fence=fence, vm_ids=vm_ids))

    async def left_behind(self) -> dict[str, object]:
        """What is on the host: empty values mean nothing is."""
        totals, pools = self.context.ledger.totals(), self.context.ledger.pools()
        folders = self.context.places.names().values()
        return {
            "domains": [domain.name for domain in await self.hypervisor.domains()],
            "folders": sorted({name for names in folders for name in names}),
            "held": [held.name for held in self.context.ledger.holdings()],
            "cores": totals.cores - totals.cores_free,
            "memory_mib": totals.memory_mib - totals.memory_free_mib,
            "disk_mib": totals.disk_mib - totals.disk_free_mib,
            "pools_mib": sum(pool.size_mib - pool.free_mib for pool in pools),
        }


NOTHING = {"domains": [], "folders": [], "held": [], "cores": 0, "memory_mib": 0, "disk_mib": 0, "pools_mib": 0}


@asynccontextmanager
async def open_agent(settings: Settings) -> AsyncIterator[Agent]:
    journal = prepare_state(settings.storage)
    hypervisor = make_hypervisor(settings)
    assert isinstance(hypervisor, FakeHypervisor)
    await hypervisor.open()
    context = await make_context(settings, hypervisor, journal)
    actions = Actions(context)
    try:
        yield Agent(settings, hypervisor, context, actions, Service(actions, ReportSource(settings.host, context)))
    finally:
        await actions.drain(10)
        await context.drives.close()
        await hypervisor.close()
        journal.close()
