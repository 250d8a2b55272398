# SPDX-License-Identifier: Apache-2.0
"""The host's report: what the ledger would admit, what the hypervisor has, and nothing that changes by itself."""

from __future__ import annotations

import asyncio

from ppec_agentd import AGENT_VERSION
from ppec_agentd.actions.context import HostContext
from ppec_agentd.drift_watch import DriftWatch
from ppec_agentd.hypervisor import Domain, HostFacts
from ppec_agentd.inventory import NO_PARTS, Inventory, MachineParts
from ppec_agentd.ledger import Ledger
from ppec_agentd.moments import Moments
from ppec_agentd.observed import vm_info
from ppec_agentd.retune.plan import HostState
from ppec_agentd.retune.tenants import host_state
from ppec_contract.host import HostReport
from ppec_contract.version import API_VERSION, Capability
from ppec_contract.words import MAX_FILE_SYSTEMS, MAX_PARTS, MAX_VMS, short

CAPABILITIES = tuple(sorted(capability.value for capability in Capability))


def host_report(
    host: str, facts: HostFacts, ledger: Ledger, domains: tuple[Domain, ...], parts: MachineParts = NO_PARTS
) -> HostReport:
    """Pure. Lists are ordered, so that an unchanged host gives an unchanged digest, and no longer than a report holds.
    Drift is added by who looks."""
    totals = ledger.totals()
    return HostReport(
        host=host,
        boot_id=short(facts.boot_id),
        agent_version=AGENT_VERSION,
        api_version=API_VERSION,
        capabilities=CAPABILITIES,
        architecture=facts.architecture,
        domain_type=facts.domain_type,
        libvirt_version=short(facts.libvirt_version),
        qemu_version=short(facts.qemu_version),
        kernel_version=short(facts.kernel_version),
        cells=ledger.cells(),
        disk_mib=totals.disk_mib,
        disk_free_mib=max(0, totals.disk_free_mib),
        bridges=tuple(sorted(map(short, facts.bridges))[:MAX_PARTS]),
        vms=tuple(sorted((vm_info(domain) for domain in domains), key=lambda vm: vm.vm_id)[:MAX_VMS]),
        cpu=parts.cpu,
        drives=parts.drives[:MAX_PARTS],
        file_systems=parts.file_systems[:MAX_FILE_SYSTEMS],
        nics=parts.nics[:MAX_PARTS],
        pools=ledger.pools(),
    )


class ReportSource:
    """Reads the hypervisor, brings the ledger in line with it, looks for drift, and builds the report.

    Without an `inventory` the report says nothing of the machine's parts: a fake host has none.
    """

    def __init__(self, host: str, context: HostContext, inventory: Inventory | None = None) -> None:
        self.host = host
        self._context = context
        self._inventory = inventory
        self._watch = DriftWatch(context)

    @property
    def moments(self) -> Moments:
        return self._context.moments

    async def snapshot(self) -> tuple[int, HostReport]:
        """The report, and a moment from before its first look. Raises `hypervisor.unavailable`."""
        tick = self._context.moments.before_snapshot()
        return tick, await self.build()

    async def movable(self) -> HostState:
        """The host as retune sees it. Raises `hypervisor.unavailable`."""
        waiting = {d.vm_id for d in await self.follow() if d.metadata is not None and d.metadata.pending}
        return host_state(self._context.ledger, waiting)

    async def domains(self) -> tuple[Domain, ...]:
        return await self._context.hypervisor.domains()

    async def build(self) -> HostReport:
        """Raises `hypervisor.unavailable`."""
        context = self._context
        context.facts = await context.hypervisor.facts()
        parts = NO_PARTS if self._inventory is None else await asyncio.to_thread(self._inventory.read)
        domains = await self.follow()
        report = host_report(self.host, context.facts, context.ledger, domains, parts)
        return report.model_copy(update={"drift": self._watch.drift})

    async def follow(self) -> tuple[Domain, ...]:
        """Brings the ledger in line with the hypervisor, looks for drift, and returns the hypervisor's domains."""
        held_before = self._context.ledger.held()
        before = await self._watch.before()
        domains = await self._context.hypervisor.domains()
        self._context.ledger.follow(domains, held_before)
        self._watch.look(before, domains)
        return domains
