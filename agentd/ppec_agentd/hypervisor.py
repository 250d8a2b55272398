# SPDX-License-Identifier: Apache-2.0
"""The port to the hypervisor: what agentd's service asks of a host, and the values that cross.

Two adapters stand behind it, `libvirt_hypervisor.LibvirtHypervisor` and `fake_hypervisor.FakeHypervisor`; one suite
(tests/agentd/test_hypervisor_contract.py) runs on both. Every method may raise

- ``hypervisor.unavailable`` (try again): no connection, or no answer within the call's deadline. What the call would
  have changed is then unknown: look with `domain` before repeating something that is not idempotent. A call that missed
  its deadline may still take effect as long as `lingers` says so; one cut off by a lost connection may do so unseen;
- ``hypervisor.failed`` (ours to fix): the hypervisor refused for a reason without a code of its own. Its own words are
  in the message, the whole exception in the cause.

Sizes are MiB. CPU numbers are the host's logical CPUs as libvirt numbers them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, Protocol
from uuid import UUID

from ppec_agentd.guests import GuestPort
from ppec_agentd.numa import GuestCell
from ppec_agentd.topology import Topology
from ppec_contract.host import Architecture
from ppec_contract.vm import NumaPolicy, VcpuPin, VmState

DomainType = Literal["kvm", "qemu", "fake"]
DiskFormat = Literal["qcow2", "raw"]


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What the host is. It changes only with a reboot, an upgrade or a new bridge; `facts()` reads it afresh.

    When `topology.declared` is true the topology is a lab's declaration and not the machine's: see `Topology`.
    """

    topology: Topology
    architecture: Architecture
    domain_type: DomainType
    libvirt_version: str
    qemu_version: str
    kernel_version: str
    boot_id: str
    bridges: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DomainMetadata:
    """What PPEC writes into each domain it makes: enough to rebuild the ledger after any restart.

    Kept by libvirt as an element of the namespace ``https://ppec.cloud/domain/1`` inside the domain's own
    definition, so it lives exactly as long as the domain. `pins` are the pins that were granted, `Domain.pins` those in
    force. `disk_mib` is the sum of the virtual sizes of the disks made for the VM, and `pool` the storage pool they are
    in, empty for where the host keeps VMs by itself.

    `vcpus`, `memory_mib`, `pins` and `guest_cells` are what the VM *holds*: the larger of what it runs with and what it
    will have at its next start. Where the two differ, the running domain's metadata says so (`pending`), and the
    definition for the next start has metadata of its own. `max_vcpus` and `max_memory_mib` are how far the VM can grow
    while it runs, 0 for no further. `nvme_drives` are the PCI addresses of the host's drives that it was given whole.
    Everything below `pins` is absent from domains of the first version.
    """

    vm_id: UUID
    name: str
    operation_id: str
    cells: tuple[int, ...]
    vcpus: int
    memory_mib: int
    disk_mib: int
    image_sha256: str
    pins: tuple[VcpuPin, ...]
    numa: NumaPolicy = field(default_factory=NumaPolicy)
    max_vcpus: int = 0
    max_memory_mib: int = 0
    guest_cells: tuple[GuestCell, ...] = ()
    pending: bool = False
    pool: str = ""
    nvme_drives: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk file of a domain; the order in `DomainDefinition.disks` is the order the guest sees (vda, vdb, ...).

    `read_only` is right for the seed. `boot_order` 1 is the disk the firmware starts from; None is never tried.
    """

    path: str
    format: DiskFormat
    read_only: bool = False
    boot_order: int | None = None


@dataclass(frozen=True, slots=True)
class ObservedDisk:
    """A file or device that a domain has for a disk, or that the hypervisor says such a disk is built on.

    `format` is what QEMU opens it as (``qcow2``, ``raw``, ``vmdk``, ...), whatever it holds; empty if the hypervisor
    doesn't say. One that has no path on this host, or whose path the hypervisor can't tell now (a volume of a pool that
    is not active), has an empty one; `elsewhere` then says where it is, in the hypervisor's words.
    """

    path: str
    format: str = ""
    elsewhere: str = ""


@dataclass(frozen=True, slots=True)
class BridgeNic:
    """A virtio NIC on an existing Linux bridge."""

    mac: str
    bridge: str


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a running domain is: a host CPU for each vCPU, the cells of its memory, the CPUs of QEMU's own threads.

    Empty `emulator_cpus` leave those threads where they are.
    """

    pins: tuple[VcpuPin, ...]
    cells: tuple[int, ...]
    emulator_cpus: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class DomainDefinition:
    """All it takes to define a domain; vCPUs, memory, cells, pins, NVMe drives and names are those of `metadata`.

    `emulator_cpus` are the host CPUs for QEMU's own threads and its I/O threads (the reserved cores); empty leaves
    them to the scheduler. `threads_per_core` is the SMT width the guest is shown, so that siblings look like siblings.
    `console_log` is a file that receives a copy of the serial console. `shared_cpus` are what the vCPUs of a VM without
    CPUs of its own float over.
    """

    metadata: DomainMetadata
    disks: tuple[Disk, ...] = ()
    nics: tuple[BridgeNic, ...] = ()
    emulator_cpus: tuple[int, ...] = ()
    threads_per_core: int = 1
    console_log: str = ""
    shared_cpus: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Domain:
    """A domain as it is now. One PPEC did not make has no `metadata`, and pins only if somebody pinned it.

    On a host with a declared topology nothing can be pinned for real; `pins` and `memory_cells` then repeat what the
    metadata granted.

    `vcpus` and `memory_mib` are what it has now (what it will start with, if it doesn't run), `max_vcpus` and
    `max_memory_mib` what it can have before its next start. `next` is the metadata of the definition for the next
    start, where the running domain's metadata says that this differs (`pending`). `host_devices` are the PCI addresses
    of the host's devices that it has, or takes when it starts.
    """

    vm_id: UUID
    name: str
    state: VmState
    vcpus: int
    memory_mib: int
    pins: tuple[VcpuPin, ...] = ()
    memory_cells: tuple[int, ...] = ()
    metadata: DomainMetadata | None = None
    macs: tuple[str, ...] = ()
    disks: tuple[ObservedDisk, ...] = ()
    max_vcpus: int = 0
    max_memory_mib: int = 0
    next: DomainMetadata | None = None
    host_devices: tuple[str, ...] = ()

    @property
    def managed(self) -> bool:
        return self.metadata is not None


class EventKind(StrEnum):
    """What happened to a domain, or (the last two) to the connection."""

    DEFINED = "defined"
    UNDEFINED = "undefined"
    STARTED = "started"
    PAUSED = "paused"
    RESUMED = "resumed"
    SHUTTING_DOWN = "shutting-down"
    STOPPED = "stopped"
    CRASHED = "crashed"
    # The guest began anew, by its own will, by ours, or by a reset; it ran before and runs on.
    REBOOTED = "rebooted"
    # Pins, memory, devices or metadata are not what they were.
    CHANGED = "changed"
    DISCONNECTED = "disconnected"
    RECONNECTED = "reconnected"


@dataclass(frozen=True, slots=True)
class HypervisorEvent:
    """A lifecycle event. `vm_id` is None for the two kinds about the connection.

    After ``RECONNECTED`` any number of events may have been missed: read `domains` again. Events tell that something
    changed, the domain tells what is: never rebuild a state from events alone (libvirt loses one now and then).
    """

    kind: EventKind
    vm_id: UUID | None = None
    name: str = ""


EventCallback = Callable[[HypervisorEvent], None]


class Hypervisor(GuestPort, Protocol):
    """One host's hypervisor. Calls may overlap, and those about different VMs don't wait for one another."""

    async def open(self) -> None:
        """Connect and start to deliver events. Raises ``hypervisor.unavailable`` if there is nothing to connect to."""

    async def close(self) -> None:
        """Disconnect. Domains go on running. Safe to call twice."""

    async def facts(self) -> HostFacts:
        """What the host is (see `HostFacts`)."""

    async def domains(self) -> tuple[Domain, ...]:
        """Every domain of the host, ours or not, defined or only running, ordered by `vm_id`."""

    async def domain(self, vm_id: UUID) -> Domain | None:
        """One domain, or None if there is no such domain."""

    def lingers(self, vm_id: UUID) -> bool:
        """Whether a call about this VM outlived its deadline and has not ended. Asked *before* a look at the domain,
        False means that the look shows all that such calls did."""

    async def define(self, definition: DomainDefinition) -> bool:
        """Define the domain (stopped). False if a managed domain of this id and name was there: it is redefined.

        Raises ``vm.exists`` if the name belongs to another domain, or the id to another name or to a domain PPEC did
        not make: such a domain is never touched.
        """

    async def start(self, vm_id: UUID) -> bool:
        """Start the domain, its vCPUs pinned before the first instruction. False if it runs already.

        Raises ``vm.not_found``; ``vm.start_failed`` if it can't be started; ``vm.wrong_state`` if it is paused.
        """

    async def shutdown(self, vm_id: UUID) -> bool:
        """Press the power button (ACPI) and return at once; the guest decides. False if it doesn't run.

        Raises ``vm.not_found``. `wait_state` tells whether the guest obeyed.
        """

    async def reboot(self, vm_id: UUID) -> bool:
        """Press the power button (ACPI) for a reboot and return at once; the guest decides. False if it doesn't run.

        Raises ``vm.not_found``. The event ``REBOOTED`` tells that the guest obeyed.
        """

    async def reset(self, vm_id: UUID) -> bool:
        """Press the reset button; the guest begins anew (``REBOOTED``), paused or not. False if it doesn't run.

        Raises ``vm.not_found``.
        """

    async def pause(self, vm_id: UUID) -> bool:
        """Stop its vCPUs. False if it is paused already. Raises ``vm.not_found``; ``vm.wrong_state`` if it is off."""

    async def resume(self, vm_id: UUID) -> bool:
        """Have its vCPUs run on. False if they do. Raises ``vm.not_found``; ``vm.wrong_state`` if it is off."""

    async def destroy(self, vm_id: UUID) -> bool:
        """Pull the plug. False if it doesn't run or doesn't exist."""

    async def redefine(self, definition: DomainDefinition) -> None:
        """Give the VM's definition the size, the pins and the metadata of `definition`, and leave all else as it is.

        That is what its next start makes of it; what runs is not touched. Raises ``vm.not_found``; ``vm.wrong_state``
        for a domain PPEC did not make.
        """

    async def annotate(self, metadata: DomainMetadata) -> None:
        """Replace the metadata of the running domain, and not that of its definition.

        Raises ``vm.not_found``; ``vm.wrong_state`` if it doesn't run.
        """

    async def set_vcpus(self, vm_id: UUID, vcpus: int, pins: tuple[VcpuPin, ...], timeout_s: float) -> int:
        """Give the running domain so many vCPUs, as far as it goes, and return how many it has then.

        New ones are pinned as `pins` say before they run. Fewer depends on the guest, which is asked for one after the
        other and has `timeout_s`; it may still obey later. More than the domain was started for can't be had. Raises
        ``vm.not_found``; ``vm.wrong_state`` if it doesn't run.
        """

    async def grow_memory(self, vm_id: UUID, cells_mib: tuple[int, ...]) -> bool:
        """Plug memory into the running domain, until each of the guest's cells (one, if it is shown none) has so much.

        False, and nothing is plugged, if that can't be had without a new start: less than there is, beyond what the
        domain was started for, no whole blocks, or too often. Raises ``vm.not_found``; ``vm.wrong_state`` if it doesn't
        run.
        """

    async def reseat(self, vm_id: UUID, seat: Seat) -> None:
        """Move the running domain's vCPUs, memory and QEMU's threads there; its definition and metadata stay.

        Returns when the kernel has copied the memory. Broken off anywhere, it may be repeated, or taken back with the
        seat before. Raises ``vm.not_found``; ``vm.wrong_state`` if the domain doesn't run.
        """

    async def reattach(self, address: str) -> bool:
        """Give the PCI device back to the host's own driver, which it may get a moment later. False if there is no such
        device.

        Ending a domain does that by itself; a device is left behind when the hypervisor's daemon died meanwhile. Raises
        ``vm.wrong_state`` while a domain that runs has it.
        """

    async def undefine(self, vm_id: UUID) -> bool:
        """Remove the definition; disks are not touched. False if there is none.

        Raises ``vm.wrong_state`` while it runs: destroy it first.
        """

    async def wait_state(self, vm_id: UUID, state: VmState, timeout_s: float) -> bool:
        """Wait until the domain is in `state`: True once it is, False when `timeout_s` passed first.

        Driven by events, so that it returns at once; a domain that is or becomes absent raises ``vm.not_found``.
        """

    def on_event(self, callback: EventCallback) -> Callable[[], None]:
        """Have `callback` called on the event loop's thread for each event; the returned function ends that.

        May be called before `open`. The callback must not block; what it raises is logged and goes no further.
        """
