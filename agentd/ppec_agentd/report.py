# SPDX-License-Identifier: Apache-2.0
"""The host's report: what the ledger would admit, what the hypervisor has, and nothing that changes by itself."""

from __future__ import annotations

from ppec_agentd import AGENT_VERSION
from ppec_agentd.actions.context import HostContext
from ppec_agentd.hypervisor import Domain, HostFacts
from ppec_agentd.ledger import Ledger
from ppec_agentd.observed import vm_info
from ppec_contract.host import HostReport
from ppec_contract.version import API_VERSION, Capability

CAPABILITIES = tuple(sorted(capability.value for capability in Capability))


def host_report(host: str, facts: HostFacts, ledger: Ledger, domains: tuple[Domain, ...]) -> HostReport:
    """Pure. Lists are ordered, so that an unchanged host gives an unchanged digest."""
    totals = ledger.totals()
    return HostReport(
        host=host,
        boot_id=facts.boot_id,
        agent_version=AGENT_VERSION,
        api_version=API_VERSION,
        capabilities=CAPABILITIES,
        architecture=facts.architecture,
        domain_type=facts.domain_type,
        libvirt_version=facts.libvirt_version,
        qemu_version=facts.qemu_version,
        kernel_version=facts.kernel_version,
        cells=ledger.cells(),
        disk_mib=totals.disk_mib,
        disk_free_mib=max(0, totals.disk_free_mib),
        bridges=tuple(sorted(facts.bridges)),
        vms=tuple(sorted((vm_info(domain) for domain in domains), key=lambda vm: vm.vm_id)),
    )


class ReportSource:
    """Reads the hypervisor, brings the ledger in line with it, and builds the report."""

    def __init__(self, host: str, context: HostContext) -> None:
        self.host = host
        self._context = context

    async def domains(self) -> tuple[Domain, ...]:
        return await self._context.hypervisor.domains()

    async def build(self) -> HostReport:
        """Raises `hypervisor.unavailable`."""
        context = self._context
        context.facts = await context.hypervisor.facts()
        domains = await self.follow()
        return host_report(self.host, context.facts, context.ledger, domains)

    async def follow(self) -> tuple[Domain, ...]:
        """Brings the ledger in line with the hypervisor and returns its domains."""
        held_before = self._context.ledger.held_ids()
        domains = await self._context.hypervisor.domains()
        self._context.ledger.follow(domains, held_before)
        return domains
