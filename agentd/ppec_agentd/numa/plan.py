# SPDX-License-Identifier: Apache-2.0
"""What is asked of the planner, and what it grants."""

from __future__ import annotations

from dataclasses import dataclass, field

from ppec_contract.vm import CpuPolicy, NumaPolicy, SmtPolicy, VcpuPin


@dataclass(frozen=True, slots=True)
class PinRequest:
    """vCPUs wanted inside `cells`; `subject` names the VM in errors ("vm web-1").

    `max_vcpus` is how far the VM may grow while it runs, 0 for no further than `vcpus`: nothing is granted for it, but
    the topology the guest is shown has room for it.
    """

    vcpus: int
    cells: tuple[int, ...]
    subject: str = "the VM"
    policy: NumaPolicy = field(default_factory=NumaPolicy)
    max_vcpus: int = 0

    @property
    def most_vcpus(self) -> int:
        return max(self.vcpus, self.max_vcpus)

    @property
    def shared(self) -> bool:
        return self.policy.cpus is CpuPolicy.SHARED

    @property
    def smt(self) -> SmtPolicy:
        return self.policy.smt


@dataclass(frozen=True, slots=True)
class GuestCell:
    """A NUMA cell the guest is shown: the host's `cell` that it mirrors, its vCPUs and its part of the memory.

    `vcpus` ascend and include those the VM may yet grow by. `distances` are those from this cell to each of the guest's
    cells, in the order of the plan, in which the guest numbers them; 10 means local.
    """

    cell: int
    vcpus: tuple[int, ...]
    memory_mib: int = 0
    distances: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class NumaPlan:
    """What a VM was granted.

    `cpus` are all logical CPUs of its cores and may be more than the pins use (four vCPUs on a core of eight threads
    take all eight). `emulator_cpus` are the reserved CPUs of the same cells. For four vCPUs on cell 1::

        NumaPlan(pins=(VcpuPin(vcpu=0, pcpu=9), VcpuPin(vcpu=1, pcpu=25), ...), cpus=(9, 10, 25, 26), cells=(1,),
                 emulator_cpus=(8, 24), threads_per_core=2)

    A VM on shared CPUs has no pins and no `cpus`: all its vCPUs float over `shared_cpus`. `guest_cells` are there for a
    VM that shows its guest several cells, and for no other.
    """

    pins: tuple[VcpuPin, ...]
    cpus: tuple[int, ...]
    cells: tuple[int, ...]
    emulator_cpus: tuple[int, ...]
    threads_per_core: int
    shared_cpus: tuple[int, ...] = ()
    guest_cells: tuple[GuestCell, ...] = ()
