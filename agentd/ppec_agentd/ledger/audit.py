# SPDX-License-Identifier: Apache-2.0
"""How domains, as the hypervisor shows them, differ from what the ledger granted. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from uuid import UUID

from ppec_agentd.hypervisor import Domain
from ppec_agentd.ledger.claims import Holding
from ppec_agentd.numa import CpuPool
from ppec_contract.vm import VcpuPin


class FindingKind(StrEnum):
    """`unknown_domain`: the ledger holds nothing for it. `pins_differ`: not those granted. `pins_overlap`: a core of
    another domain's pins too. `pins_reserved`: a core that is the host's own or for sharing. `memory_elsewhere`: bound
    to other cells than granted."""

    UNKNOWN_DOMAIN = "unknown_domain"
    PINS_DIFFER = "pins_differ"
    PINS_OVERLAP = "pins_overlap"
    PINS_RESERVED = "pins_reserved"
    MEMORY_ELSEWHERE = "memory_elsewhere"


@dataclass(frozen=True, slots=True)
class Finding:
    """`granted` and `found` are CPUs, or cells for memory; in order of vCPUs where pins differ. `others` are the
    domains overlapped with."""

    kind: FindingKind
    vm_id: UUID
    name: str
    granted: tuple[int, ...] = ()
    found: tuple[int, ...] = ()
    others: tuple[UUID, ...] = ()


def audit(domains: Iterable[Domain], holdings: Iterable[Holding], pool: CpuPool) -> tuple[Finding, ...]:
    """Findings by domain, in the order of the domains.

    A VM that is being resized or moved may be as it was or as it will be. Of a domain that PPEC did not make only what
    it does to others counts. Memory counts as bound only where a domain says so: one that is not bound at all, though
    it should be, is `memory_elsewhere` with nothing found.
    """
    seen = list(domains)
    held = {holding.vm_id: holding for holding in holdings}
    findings: list[Finding] = []
    users = _users(seen, pool)
    for domain in seen:
        holding = held.get(domain.vm_id)
        if holding is None:
            findings.append(Finding(FindingKind.UNKNOWN_DOMAIN, domain.vm_id, domain.name))
        elif not holding.foreign:
            findings += _differences(domain, holding)
        findings += _trespasses(domain, pool, users)
    return tuple(findings)


def _differences(domain: Domain, holding: Holding) -> Iterator[Finding]:
    states = [state for state in (holding, holding.before) if state is not None]
    # Between a resize and its next start a VM may have fewer vCPUs than it holds pins for.
    granted = ([pin for pin in state.plan.pins if pin.vcpu < domain.vcpus] for state in states)
    if all(_by_vcpu(pins) != _by_vcpu(domain.pins) for pins in granted):
        yield Finding(
            FindingKind.PINS_DIFFER,
            domain.vm_id,
            domain.name,
            tuple(_by_vcpu(holding.plan.pins).values()),
            tuple(_by_vcpu(domain.pins).values()),
        )
    if all(set(state.plan.cells) != set(domain.memory_cells) for state in states):
        yield Finding(
            FindingKind.MEMORY_ELSEWHERE, domain.vm_id, domain.name, holding.plan.cells, tuple(domain.memory_cells)
        )


def _trespasses(domain: Domain, pool: CpuPool, users: dict[int, list[UUID]]) -> Iterator[Finding]:
    cpus = pool.whole(pin.pcpu for pin in domain.pins)
    kept = {
        cpu
        for cell in pool.topology.cells
        for core in (*pool.reserved_of(cell), *pool.shared_of(cell))
        for cpu in core.cpus
    }
    if cpus & kept:
        yield Finding(FindingKind.PINS_RESERVED, domain.vm_id, domain.name, found=tuple(sorted(cpus & kept)))
    crowded = sorted(cpu for cpu in cpus if len(users[cpu]) > 1)
    if crowded:
        others = dict.fromkeys(other for cpu in crowded for other in users[cpu] if other != domain.vm_id)
        yield Finding(FindingKind.PINS_OVERLAP, domain.vm_id, domain.name, found=tuple(crowded), others=tuple(others))


def _users(domains: Sequence[Domain], pool: CpuPool) -> dict[int, list[UUID]]:
    users: dict[int, list[UUID]] = {}
    for domain in domains:
        for cpu in pool.whole(pin.pcpu for pin in domain.pins):
            users.setdefault(cpu, []).append(domain.vm_id)
    return users


def _by_vcpu(pins: Iterable[VcpuPin]) -> dict[int, int]:
    return {pin.vcpu: pin.pcpu for pin in sorted(pins, key=lambda pin: pin.vcpu)}
