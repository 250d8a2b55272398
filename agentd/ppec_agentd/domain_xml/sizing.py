# SPDX-License-Identifier: Apache-2.0
"""A domain's size in XML: vCPUs and memory, now and at most, where they run and what they are made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ppec_agentd.domain_xml.architecture import ArchitectureRules
from ppec_agentd.domain_xml.cpu import CellDistance, CpuTopology, GuestNumaCell
from ppec_agentd.domain_xml.cputune import CpuTune, GuestCellBinding, IothreadPinning, NumaTune, VcpuPinning
from ppec_agentd.domain_xml.domain import VcpuState
from ppec_agentd.domain_xml.memory import HugePage, MemoryBacking, MemoryMaximum
from ppec_agentd.hypervisor import DomainDefinition
from ppec_agentd.numa import GuestCell
from ppec_agentd.topology import format_cpu_list

IOTHREAD = 1
# How often a running VM can be given more memory. Each DIMM is also a region that vhost has to look up.
DIMM_SLOTS = 16
# No VM has fewer vCPUs, so no guest is asked to give these back.
FEWEST_VCPUS = 2


@dataclass(frozen=True)
class Sizing:
    """What a definition's size becomes on an architecture. `bind` false: nothing of the host's is named."""

    definition: DomainDefinition
    rules: ArchitectureRules
    bind: bool

    @property
    def most_vcpus(self) -> int:
        vm = self.definition.metadata
        return max(vm.vcpus, vm.max_vcpus) if self.rules.plugs_vcpus else vm.vcpus

    @property
    def vcpus_now(self) -> int | None:
        vcpus = self.definition.metadata.vcpus
        return vcpus if vcpus < self.most_vcpus else None

    def vcpu_cpuset(self) -> str | None:
        """Where vCPUs run that no pin is about: the shared CPUs, or, of those plugged by hand, the VM's own."""
        if not self.bind:
            return None
        own = (pin.pcpu for pin in self.definition.metadata.pins) if self.vcpus_now else ()
        return format_cpu_list(self.definition.shared_cpus or own) or None

    def vcpu_states(self) -> Iterator[VcpuState]:
        """Said only of VMs with a maximum: unless told so, libvirt lets none of the first vCPUs be unplugged."""
        vm = self.definition.metadata
        if not (self.rules.plugs_vcpus and vm.max_vcpus):
            return
        for vcpu in range(self.most_vcpus):
            there = vcpu < vm.vcpus
            yield VcpuState(
                vcpu=vcpu, enabled=there, hotpluggable=vcpu >= FEWEST_VCPUS, order=vcpu + 1 if there else None
            )

    def memory_maximum(self) -> MemoryMaximum | None:
        if not self._memory_grows:
            return None
        return MemoryMaximum(slots=DIMM_SLOTS, size=self.definition.metadata.max_memory_mib * 1024)

    def memory_backing(self) -> MemoryBacking | None:
        size, cells = self.definition.metadata.numa.huge_page_kib, len(self.guest_cells())
        if not (size and self.bind):
            return None
        return MemoryBacking(pages=(HugePage(size=size, nodeset=format_cpu_list(range(cells)) or None),))

    def topology(self) -> CpuTopology:
        """A guest with several cells has a socket for each, where its vCPUs fall into such blocks."""
        most, threads = self.most_vcpus, self.definition.threads_per_core
        if not self.rules.guest_threads or most % threads:
            threads = 1
        sockets = _sockets(self.definition.metadata.guest_cells, most, threads)
        return CpuTopology(sockets=sockets, cores=most // sockets // threads, threads=threads)

    def guest_cells(self) -> tuple[GuestNumaCell, ...]:
        """The cells the guest is shown, or the one that memory is plugged into."""
        vm = self.definition.metadata
        if vm.guest_cells:
            return tuple(self._guest_cell(number, cell) for number, cell in enumerate(vm.guest_cells))
        if not self._memory_grows:
            return ()
        everyone = format_cpu_list(range(self.most_vcpus))
        return (GuestNumaCell(cell=0, vcpus=everyone, memory=vm.memory_mib * 1024),)

    def cputune(self, *, iothreads: bool) -> CpuTune | None:
        emulator = format_cpu_list(self.definition.emulator_cpus) or None
        pins = self.definition.metadata.pins
        if not self.bind or not (pins or (self.definition.shared_cpus and emulator)):
            return None
        pinned = (IothreadPinning(iothread=IOTHREAD, cpuset=emulator),) if emulator and iothreads else ()
        return CpuTune(
            vcpus=tuple(VcpuPinning(vcpu=pin.vcpu, cpuset=str(pin.pcpu)) for pin in pins),
            emulator=emulator,
            iothreads=pinned,
        )

    def numatune(self) -> NumaTune | None:
        vm = self.definition.metadata
        if not (self.bind and vm.cells):
            return None
        bindings = (
            GuestCellBinding(guest_cell=number, nodeset=str(cell.cell)) for number, cell in enumerate(vm.guest_cells)
        )
        # A guest that was shown cells never leaves the host's that they mirror.
        mode = "strict" if vm.guest_cells else "restrictive"
        return NumaTune(mode=mode, nodeset=format_cpu_list(vm.cells), guest_cells=tuple(bindings))

    @property
    def most_memory_mib(self) -> int:
        vm = self.definition.metadata
        return vm.max_memory_mib if self._memory_grows else vm.memory_mib

    @property
    def _memory_grows(self) -> bool:
        vm = self.definition.metadata
        return bool(self.rules.memory_block_mib) and vm.max_memory_mib > vm.memory_mib

    def _guest_cell(self, number: int, cell: GuestCell) -> GuestNumaCell:
        distances = (CellDistance(cell=other, value=value) for other, value in enumerate(cell.distances))
        return GuestNumaCell(
            cell=number,
            vcpus=format_cpu_list(vcpu for vcpu in cell.vcpus if vcpu < self.most_vcpus) or None,
            memory=cell.memory_mib * 1024,
            distances=tuple(distances),
        )


def _sockets(cells: tuple[GuestCell, ...], most_vcpus: int, threads: int) -> int:
    """QEMU numbers vCPUs socket by socket: a cell is a socket if each has the next so many."""
    seated = [cell for cell in cells if cell.vcpus]
    if len(seated) < 2 or most_vcpus % (len(seated) * threads):
        return 1
    each = most_vcpus // len(seated)
    blocks = [tuple(range(first, first + each)) for first in range(0, most_vcpus, each)]
    return len(seated) if [cell.vcpus for cell in seated] == blocks else 1
