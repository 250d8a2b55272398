# SPDX-License-Identifier: Apache-2.0
"""The audit: domains as they are read back, against what was granted."""

from __future__ import annotations

import uuid
from dataclasses import replace

from ppec_agentd.hypervisor import Domain, DomainMetadata
from ppec_agentd.ledger import Claim, Finding, FindingKind, Ledger
from ppec_agentd.topology import declare_topology
from ppec_contract.vm import CpuPolicy, NumaPolicy, VcpuPin, VmState

SHARED = NumaPolicy(cpus=CpuPolicy.SHARED)
ONE, TWO, HAND = (uuid.UUID(int=number) for number in (1, 2, 3))


def new_ledger() -> Ledger:
    """Cell 0 has cores (0, 8) to (3, 11), cell 1 (4, 12) to (7, 15); the first of each is reserved, the next shared."""
    topology = declare_topology("sockets=2,cores=4,threads=2")
    return Ledger(topology, 1000, reserved_cores_per_cell=1, shared_cores_per_cell=1)


def made(ledger: Ledger, vm_id: uuid.UUID, cell: int = 0, policy: NumaPolicy | None = None) -> Domain:
    policy = policy or NumaPolicy()
    plan = ledger.reserve(Claim(vm_id, f"vm-{vm_id.int}", 2, 100, 10, (cell,), policy))
    ledger.commit(vm_id)
    metadata = DomainMetadata(
        vm_id, f"vm-{vm_id.int}", "op", plan.cells, 2, 100, 10, "", plan.pins, policy, guest_cells=plan.guest_cells
    )
    return Domain(vm_id, metadata.name, VmState.RUNNING, 2, 100, plan.pins, plan.cells, metadata)


def on(domain: Domain, *pcpus: int) -> Domain:
    return replace(domain, pins=tuple(VcpuPin(vcpu=vcpu, pcpu=pcpu) for vcpu, pcpu in enumerate(pcpus)))


def test_what_was_granted_and_is_in_force_has_no_findings() -> None:
    ledger = new_ledger()
    domains = [made(ledger, ONE), made(ledger, TWO, cell=1, policy=SHARED)]
    assert ledger.audit(domains) == ()


def test_pins_that_were_changed_are_told_with_what_was_granted() -> None:
    ledger = new_ledger()
    domain = made(ledger, ONE)
    assert ledger.audit([on(domain, 2, 11)]) == (
        Finding(FindingKind.PINS_DIFFER, ONE, "vm-1", granted=(2, 10), found=(2, 11)),
    )
    assert ledger.audit([on(domain, 10, 2)])[0].kind is FindingKind.PINS_DIFFER, "each vCPU has its own CPU"
    assert ledger.audit([on(domain)])[0].found == ()


def test_a_domain_on_anothers_core_is_told_for_both() -> None:
    """A domain made by hand sits on the sibling of a VM's CPU."""
    ledger = new_ledger()
    domain = on(made(ledger, ONE), 2, 10)
    by_hand = on(Domain(HAND, "hand", VmState.RUNNING, 1, 64), 10)
    ledger.adopt(by_hand)
    assert ledger.audit([domain, by_hand]) == (
        Finding(FindingKind.PINS_OVERLAP, ONE, "vm-1", found=(2, 10), others=(HAND,)),
        Finding(FindingKind.PINS_OVERLAP, HAND, "hand", found=(2, 10), others=(ONE,)),
    )


def test_pins_on_reserved_and_shared_cores_are_told() -> None:
    ledger = new_ledger()
    by_hand = on(Domain(HAND, "hand", VmState.RUNNING, 2, 64), 0, 5)
    ledger.adopt(by_hand)
    assert ledger.audit([by_hand]) == (Finding(FindingKind.PINS_RESERVED, HAND, "hand", found=(0, 5, 8, 13)),)


def test_memory_bound_elsewhere_or_nowhere_is_told() -> None:
    ledger = new_ledger()
    domain = made(ledger, ONE)
    for cells in ((1,), ()):
        assert ledger.audit([replace(domain, memory_cells=cells)]) == (
            Finding(FindingKind.MEMORY_ELSEWHERE, ONE, "vm-1", granted=(0,), found=cells),
        )


def test_a_domain_nobody_holds_is_told() -> None:
    by_hand = Domain(HAND, "hand", VmState.RUNNING, 2, 64)
    assert new_ledger().audit([by_hand]) == (Finding(FindingKind.UNKNOWN_DOMAIN, HAND, "hand"),)


def test_a_vm_under_change_may_be_as_it_was_or_as_it_will_be() -> None:
    ledger = new_ledger()
    domain = made(ledger, ONE)
    plan = ledger.resize(ONE, 4, 100)
    for pins in (domain.pins, plan.pins):
        assert ledger.audit([replace(domain, pins=pins, vcpus=len(pins))]) == ()
    ledger.commit(ONE)
    assert ledger.audit([domain]) == (), "it runs with two vCPUs until its next start"
    grown = replace(domain, vcpus=4)
    assert [finding.kind for finding in ledger.audit([grown])] == [FindingKind.PINS_DIFFER]
