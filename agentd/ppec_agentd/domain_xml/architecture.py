# SPDX-License-Identifier: Apache-2.0
"""What differs between CPU architectures, one strategy object each; nothing else in the agent asks for the name."""

from __future__ import annotations

from dataclasses import dataclass

from ppec_agentd.domain_xml.clock import Clock, Timer
from ppec_agentd.domain_xml.cpu import Cpu, CpuFeature, CpuTopology, GuestNumaCell
from ppec_agentd.domain_xml.machine import Features, Machine
from ppec_agentd.hypervisor import DomainType
from ppec_contract.errors import PpecError


@dataclass(frozen=True, kw_only=True)
class ArchitectureRules:
    """A machine for servers on one architecture. `emulated_without` are features too slow or useless under TCG.

    `plugs_vcpus` and `memory_block_mib` say what can be plugged into a guest that runs: a guest takes memory in whole
    blocks of its own, 0 means none. What can't be plugged waits for the next start.
    """

    machine: Machine
    features: Features
    clock: Clock
    serial_target: str
    guest_threads: bool
    plugs_vcpus: bool = False
    memory_block_mib: int = 0
    emulated_without: tuple[str, ...] = ()

    def cpu(self, domain_type: DomainType, topology: CpuTopology, cells: tuple[GuestNumaCell, ...] = ()) -> Cpu:
        """The host's own CPU under KVM; under TCG all that QEMU can emulate, since distributions demand ever more."""
        if domain_type == "kvm":
            return Cpu(mode="host-passthrough", topology=topology, cells=cells)
        disabled = tuple(CpuFeature(policy="disable", name=name) for name in self.emulated_without)
        return Cpu(mode="maximum", topology=topology, features=disabled, cells=cells)


X86_64 = ArchitectureRules(
    machine=Machine(architecture="x86_64", machine="q35"),
    features=Features(apic=True, vmport="off"),
    clock=Clock(
        timers=(
            Timer(name="rtc", tick_policy="catchup"),
            Timer(name="pit", tick_policy="delay"),
            Timer(name="hpet", present=False),
        )
    ),
    serial_target="isa-serial",
    guest_threads=True,
    plugs_vcpus=True,
    # Linux takes 128 MiB at a time, and leaves the rest of a DIMM unused.
    memory_block_mib=128,
    # Five-level page tables double the cost of every emulated TLB miss.
    emulated_without=("la57",),
)

# QEMU's machine plugs no vCPUs. It plugs memory since 4.1, but only into guests with ACPI and in blocks that depend on
# the guest kernel's page size: left to the next start.
AARCH64 = ArchitectureRules(
    # ACPI on this machine comes from UEFI, so there is no guest without it.
    machine=Machine(architecture="aarch64", machine="virt", firmware="efi"),
    features=Features(),
    clock=Clock(),
    serial_target="system-serial",
    guest_threads=False,
)

RULES: dict[str, ArchitectureRules] = {"x86_64": X86_64, "aarch64": AARCH64}


def rules_for(architecture: str) -> ArchitectureRules:
    """Raises ``hypervisor.failed`` for an architecture PPEC has no rules for."""
    try:
        return RULES[architecture]
    except KeyError:
        raise PpecError(
            "hypervisor.failed",
            f"no domains for architecture {architecture}; known are {', '.join(sorted(RULES))}",
            subject=f"architecture {architecture}",
            details={"architecture": architecture, "known": sorted(RULES)},
        ) from None
