# SPDX-License-Identifier: Apache-2.0
"""A VM: what the orchestrator decided (`VmSpec`), what a host observes (`VmInfo`)."""

from __future__ import annotations

from enum import StrEnum
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface
from typing import Annotated, Literal, Protocol
from uuid import UUID

from pydantic import Field, StringConstraints, field_validator, model_validator
from pydantic_core import PydanticCustomError

from ppec_contract.model import BridgeName, MacAddress, Model, ResourceName, Sha256, Tags, UserData, VmName
from ppec_contract.words import MAX_CELLS, MAX_MACS, MAX_PARTS, MAX_PINS, ShortText

MAX_VCPUS = 512
MAX_MEMORY_MIB = 16 * 1024 * 1024
MAX_DISK_MIB = 64 * 1024 * 1024
# What one machine has slots for, and more than one VM is ever given.
MAX_NVME_DRIVES = 16

Vcpus = Annotated[int, Field(strict=True, ge=2, le=MAX_VCPUS)]
MemoryMib = Annotated[int, Field(strict=True, ge=64, le=MAX_MEMORY_MIB)]
DiskMib = Annotated[int, Field(strict=True, ge=1, le=MAX_DISK_MIB)]
NvmeDrives = Annotated[int, Field(strict=True, ge=0, le=MAX_NVME_DRIVES)]
# Of a domain that anybody may have made: no policy, but what a column holds.
MOST_SEEN_VCPUS = 65535
MOST_SEEN_MIB = 2**31 - 1
SeenVcpus = Annotated[int, Field(ge=0, le=MOST_SEEN_VCPUS)]
SeenMib = Annotated[int, Field(ge=0, le=MOST_SEEN_MIB)]
CellId = Annotated[int, Field(strict=True, ge=0, le=4095)]


def even_vcpus(vcpus: int) -> int:
    """The blog's rule: a VM takes whole physical cores, so odd vCPU counts are refused (`vm.odd_vcpus`)."""
    if vcpus % 2:
        raise PydanticCustomError(
            "vm.odd_vcpus",
            "{vcpus} vCPUs are odd; ask for {lower} or {higher}",
            {"vcpus": vcpus, "lower": vcpus - 1, "higher": vcpus + 1},
        )
    return vcpus


def even_maximum(vcpus: int | None) -> int | None:
    return None if vcpus is None else even_vcpus(vcpus)


class ImageSource(Model):
    """An image by content: the host fetches `url` once and keeps it under `sha256`."""

    name: ResourceName
    sha256: Sha256
    size_bytes: Annotated[int, Field(strict=True, ge=1)]
    format: Literal["qcow2", "raw"]
    url: Annotated[str, StringConstraints(pattern=r"^(https://|file:///)\S+$", max_length=2048)]


class RootDisk(Model):
    """A qcow2 overlay of `size_mib` (virtual size) on the cached image: in a storage pool of the host, or (without one)
    where the host keeps VMs by itself."""

    size_mib: DiskMib
    image: ImageSource
    pool: ResourceName | None = None


class Nic(Model):
    """A virtio NIC on a Linux bridge, with the addresses the guest is told through its seed."""

    mac: MacAddress
    bridge: BridgeName
    addresses: Annotated[tuple[IPv4Interface | IPv6Interface, ...], Field(max_length=8)] = ()
    gateway4: IPv4Address | None = None
    gateway6: IPv6Address | None = None
    nameservers: Annotated[tuple[IPv4Address | IPv6Address, ...], Field(max_length=4)] = ()


class CpuPolicy(StrEnum):
    """Whose the host CPUs under a VM are.

    `dedicated`: whole physical cores of its own, pinned one to one. `shared`: its vCPUs float over the CPUs that the
    host sets aside for sharing, beside other VMs' vCPUs.
    """

    DEDICATED = "dedicated"
    SHARED = "shared"


class SmtPolicy(StrEnum):
    """What a dedicated VM makes of SMT siblings, which are always its own.

    `prefer` puts a vCPU on every thread, and takes cores without siblings as well. `isolate` puts one vCPU on a core
    and leaves its siblings idle. `require` is `prefer` on cores that have siblings, and on no others.
    """

    PREFER = "prefer"
    ISOLATE = "isolate"
    REQUIRE = "require"


class NumaPolicy(Model):
    """How a VM sits on its host's CPUs and memory: a flavor's choice. The defaults are the fleet's ordinary rules.

    `multi_cell` lets the VM span sockets, and shows the guest NUMA cells of its own that mirror the host's; without it
    the VM stays on one socket. `huge_page_kib` is the size of the pages behind the guest's memory, 0 the ordinary ones.
    """

    cpus: CpuPolicy = CpuPolicy.DEDICATED
    smt: SmtPolicy = SmtPolicy.PREFER
    multi_cell: bool = False
    huge_page_kib: Literal[0, 2048, 1048576] = 0

    @model_validator(mode="after")
    def _fits_together(self) -> NumaPolicy:
        if self.cpus is CpuPolicy.SHARED and (self.multi_cell or self.smt is not SmtPolicy.PREFER):
            raise ValueError("a VM on shared CPUs has no cores of its own: leave out multi_cell and smt")
        return self


def whole_huge_pages(memory_mib: int, policy: NumaPolicy) -> None:
    """Raises ValueError unless the memory is made of whole pages of the policy's size."""
    page_mib = policy.huge_page_kib // 1024
    if page_mib and memory_mib % page_mib:
        lower = memory_mib // page_mib * page_mib
        raise ValueError(
            f"{memory_mib} MiB are not whole huge pages of {page_mib} MiB; ask for "
            + (f"{lower} or {lower + page_mib} MiB" if lower else f"{page_mib} MiB")
        )


class Sized(Protocol):
    """What has a VM's size and maxima: a spec, a flavor."""

    @property
    def vcpus(self) -> int: ...
    @property
    def memory_mib(self) -> int: ...
    @property
    def max_vcpus(self) -> int | None: ...
    @property
    def max_memory_mib(self) -> int | None: ...
    @property
    def numa(self) -> NumaPolicy: ...


def fitting_maxima(sized: Sized) -> None:
    """Raises ValueError if a maximum is below what the VM starts with, or memory is not made of whole pages."""
    if sized.max_vcpus is not None and sized.max_vcpus < sized.vcpus:
        raise ValueError(f"max_vcpus {sized.max_vcpus} is below vcpus {sized.vcpus}")
    if sized.max_memory_mib is not None and sized.max_memory_mib < sized.memory_mib:
        raise ValueError(f"max_memory_mib {sized.max_memory_mib} is below memory_mib {sized.memory_mib}")
    for memory_mib in filter(None, (sized.memory_mib, sized.max_memory_mib)):
        whole_huge_pages(memory_mib, sized.numa)


class VmSpec(Model):
    """Everything a host needs to make one VM.

    `cells` are the NUMA cells chosen by the plan, of one socket unless `numa` says otherwise; the host picks the cores
    and binds the memory there. Up to `max_vcpus` and `max_memory_mib` (default: no more than it starts with) the VM can
    grow while it runs. It gets `nvme_drives` of the host whole, chosen by the host: near its cells, as many near
    each of several, rounded up.
    """

    vm_id: UUID
    name: VmName
    vcpus: Vcpus
    memory_mib: MemoryMib
    max_vcpus: Vcpus | None = None
    max_memory_mib: MemoryMib | None = None
    numa: NumaPolicy = Field(default_factory=NumaPolicy)
    cells: Annotated[tuple[CellId, ...], Field(min_length=1, max_length=16)]
    root_disk: RootDisk
    nvme_drives: NvmeDrives = 0
    nics: Annotated[tuple[Nic, ...], Field(max_length=8)] = ()
    user_data: UserData = ""
    tags: Tags = Field(default_factory=dict)

    _even = field_validator("vcpus")(even_vcpus)
    _even_maximum = field_validator("max_vcpus")(even_maximum)

    @model_validator(mode="after")
    def _sized(self) -> VmSpec:
        fitting_maxima(self)
        return self

    @model_validator(mode="after")
    def _distinct(self) -> VmSpec:
        if len(set(self.cells)) != len(self.cells):
            raise ValueError(f"cells {list(self.cells)} name a cell twice")
        macs = [nic.mac for nic in self.nics]
        if len(set(macs)) != len(macs):
            raise ValueError("two NICs have the same MAC address")
        return self


class VmState(StrEnum):
    """What libvirt says of a domain, in PPEC's words."""

    RUNNING = "running"
    STOPPED = "stopped"
    PAUSED = "paused"
    CRASHED = "crashed"
    UNKNOWN = "unknown"


class VcpuPin(Model):
    """One vCPU and the one host CPU (logical, libvirt's number) it runs on."""

    vcpu: int
    pcpu: int


class Size(Model):
    """vCPUs and memory of a VM."""

    vcpus: int
    memory_mib: int


class Moment(Model):
    """When an agent looked, by an order of its own: the process it was, and a count that only grows in that process.

    It says what came first on one host, and nothing of the time between. Two hosts' moments can't be compared.
    """

    agent_started_at_unix_ms: Annotated[int, Field(strict=True, ge=0, le=2**53)]
    tick: Annotated[int, Field(strict=True, ge=0, le=2**53)]


class VmInfo(Model):
    """A VM as the host sees it. `managed` is false for a domain PPEC did not make, of which less is known.

    `vcpus` and `memory_mib` are what it has now, `max_vcpus` and `max_memory_mib` what it can have before its next
    start (0 from agents that don't say). `pending` is the size it will start with next, where that is another one: the
    host holds what the larger of the two takes. `pool` has its disks, empty for the host's own place; `nvme_drives` are
    the PCI addresses, on the host, of the drives it was given.
    """

    vm_id: UUID
    name: ShortText
    state: VmState
    managed: bool
    vcpus: SeenVcpus
    memory_mib: SeenMib
    cells: Annotated[tuple[int, ...], Field(max_length=MAX_CELLS)] = ()
    pins: Annotated[tuple[VcpuPin, ...], Field(max_length=MAX_PINS)] = ()
    disk_mib: SeenMib = 0
    image_sha256: ShortText = ""
    macs: Annotated[tuple[ShortText, ...], Field(max_length=MAX_MACS)] = ()
    operation_id: ShortText = ""
    max_vcpus: SeenVcpus = 0
    max_memory_mib: SeenMib = 0
    numa: NumaPolicy | None = None
    pending: Size | None = None
    pool: ShortText = ""
    nvme_drives: Annotated[tuple[ShortText, ...], Field(max_length=MAX_PARTS)] = ()
