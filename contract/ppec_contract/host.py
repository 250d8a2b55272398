# SPDX-License-Identifier: Apache-2.0
"""A host's report of itself: the full picture with a digest, and the heartbeat that carries only the digest."""

from __future__ import annotations

import hashlib
from enum import StrEnum
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import Field

from ppec_contract.model import HostName, Model, ResourceName, Sha256, canonical_json
from ppec_contract.vm import VmInfo
from ppec_contract.words import (
    MAX_CELLS,
    MAX_CHECKS,
    MAX_DRIFT,
    MAX_FILE_SYSTEMS,
    MAX_PARTS,
    MAX_POOLS,
    MAX_VMS,
    ShortText,
    Words,
)

Architecture = Literal["x86_64", "aarch64", "ppc64le", "s390x", "riscv64"]
Count = Annotated[int, Field(ge=0, le=2**53)]
# Of CPUs and cores: what a column holds.
SmallCount = Annotated[int, Field(ge=0, le=65535)]
CellNumber = Annotated[int, Field(ge=0, le=4095)]


class HugePagesReport(Model):
    """A cell's huge pages of one size: how many the host set aside, and how many of them no VM holds."""

    size_kib: Count
    pages: Count
    pages_free: Count


class CellReport(Model):
    """One NUMA cell. Cores are whole physical cores; the `…_free` figures are what the ledger would admit.

    `cores_reserved` are those that no dedicated VM gets: the host's own and the `cores_shared` among them.
    `memory_reserved_mib` is what ordinary memory never has: the host's own, and all huge pages. `shared_vcpus` is how
    many vCPUs of sharing VMs are admitted in the cell. `nvme_drives` are those near it that the host hands to VMs
    whole.
    """

    cell: CellNumber
    socket: SmallCount
    threads_per_core: Annotated[int, Field(ge=1, le=8)]
    cores: SmallCount
    cores_reserved: SmallCount
    cores_free: SmallCount
    memory_mib: Count
    memory_reserved_mib: Count
    memory_free_mib: Count
    cores_shared: SmallCount = 0
    shared_vcpus: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    shared_vcpus_free: Count = 0
    huge_pages: Annotated[tuple[HugePagesReport, ...], Field(max_length=16)] = ()
    nvme_drives: SmallCount = 0
    nvme_drives_free: SmallCount = 0


class CpuReport(Model):
    """The CPUs that are online; `threads` are logical ones. `model` is the firmware's word, empty if it says none."""

    model: ShortText = ""
    sockets: Count = 0
    cores: Count = 0
    threads: Count = 0


class DriveReport(Model):
    """A drive of the machine itself. What a drive doesn't say is empty; `cell` is the NUMA cell it is nearest to."""

    name: ShortText
    size_mib: Count
    rotational: bool
    model: ShortText = ""
    serial: ShortText = ""
    cell: int | None = None


class FileSystemReport(Model):
    """A file system that VMs' disks or images are on, by the folder of the agent's that is on it.

    `free_mib` is coarse on purpose: it follows what is free only when that has moved by a 32nd of the size, so that
    guests that write don't make a new report of every heartbeat. The exact figure is in `HostUse`.
    """

    path: ShortText
    size_mib: Count
    free_mib: Count


class PoolReport(Model):
    """A storage pool for VMs' disks, besides the place where the host keeps them by itself. `free_mib` is what the
    ledger would admit: of the sizes that disks may grow to, not of what they hold now."""

    name: ResourceName
    size_mib: Count
    free_mib: Count


class NicReport(Model):
    """A NIC of the machine, or a bond of them. `speed_mbit` is None while there is no link; `master` is its bridge or
    bond."""

    name: ShortText
    mac: ShortText
    state: ShortText
    speed_mbit: int | None = None
    master: ShortText = ""
    cell: int | None = None


class DriftKind(StrEnum):
    """How a host differs from what was decided. `made_by_hand`: a domain PPEC did not make. `domain_removed`: a VM
    whose domain is gone, and nobody ordered it. `orphaned_disk`: a folder with a VM's disk and no VM. `disks`: a VM has
    disks it was not given, or lacks its own. `pins_overlap`, `pins_reserved`: pins on CPUs that are another's, or the
    host's. The others name what differs."""

    MADE_BY_HAND = "made_by_hand"
    DOMAIN_REMOVED = "domain_removed"
    ORPHANED_DISK = "orphaned_disk"
    NAME = "name"
    VCPUS = "vcpus"
    MEMORY = "memory"
    PINS = "pins"
    PINS_OVERLAP = "pins_overlap"
    PINS_RESERVED = "pins_reserved"
    MEMORY_CELLS = "memory_cells"
    DISKS = "disks"


class Drift(Model):
    """One difference, never repaired without an order. `before` is what was granted, `after` what is there, in words
    that stay the same as long as it does; either may be empty."""

    kind: DriftKind
    vm_id: UUID | None = None
    name: ShortText = ""
    before: Words = ""
    after: Words = ""

    def order(self) -> tuple[str, ...]:
        """By which a report's drift is sorted: the same for the same differences, however they were found."""
        return (str(self.vm_id or ""), self.kind, self.name, self.after, self.before)


Cells = Annotated[tuple[CellReport, ...], Field(max_length=MAX_CELLS)]
Bridges = Annotated[tuple[ShortText, ...], Field(max_length=MAX_PARTS)]
Vms = Annotated[tuple[VmInfo, ...], Field(max_length=MAX_VMS)]
Drives = Annotated[tuple[DriveReport, ...], Field(max_length=MAX_PARTS)]
FileSystems = Annotated[tuple[FileSystemReport, ...], Field(max_length=MAX_FILE_SYSTEMS)]
Pools = Annotated[tuple[PoolReport, ...], Field(max_length=MAX_POOLS)]
Nics = Annotated[tuple[NicReport, ...], Field(max_length=MAX_PARTS)]
Drifts = Annotated[tuple[Drift, ...], Field(max_length=MAX_DRIFT)]


class HostReport(Model):
    """Everything the orchestrator needs to place on a host; equal pictures have equal digests.

    Nothing volatile (time, load) belongs here: an unchanged host must give an unchanged digest. That is in `Vitals`.
    """

    host: HostName
    boot_id: ShortText
    agent_version: ShortText
    api_version: Count
    capabilities: Annotated[tuple[ShortText, ...], Field(max_length=256)]
    architecture: Architecture
    domain_type: Literal["kvm", "qemu", "fake"]
    libvirt_version: ShortText
    qemu_version: ShortText
    kernel_version: ShortText
    cells: Cells
    disk_mib: Count
    disk_free_mib: Count
    bridges: Bridges
    vms: Vms
    cpu: CpuReport | None = None
    drives: Drives = ()
    file_systems: FileSystems = ()
    nics: Nics = ()
    pools: Pools = ()
    drift: Drifts = ()

    def digest(self) -> str:
        """Of what differs from the fields' defaults alone: an agent that doesn't know a field yet, and an orchestrator
        that does, compute the same."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json", exclude_defaults=True))).hexdigest()

    def as_spoken(self) -> dict[str, Any]:
        """Without the fields that whoever made it left out: an older agent doesn't know them all."""
        return self.model_dump(mode="json", exclude_unset=True)

    def digest_as_spoken(self) -> str:
        """By the rule of agents from before drift was reported: of every field that they know, with the defaults."""
        return hashlib.sha256(canonical_json(self.as_spoken())).hexdigest()


class HealthLevel(StrEnum):
    """`note`: can't be told, or good to know. `warning`: will fail if nobody looks. `error`: fails already."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    ERROR = "error"


class HealthFinding(Model):
    """What one check of a host's health says. `found` is of the moment when the level last changed."""

    check: ShortText
    level: HealthLevel
    found: Words


class VmUse(Model):
    """What a VM has used: CPU time since its start, the host's memory and the disk blocks it holds now."""

    vm_id: UUID
    cpu_time_ms: Count = 0
    memory_mib: Count = 0
    disk_mib: Count = 0


class HostUse(Model):
    """A look at what is used now; `free_mib` is by the path of `FileSystemReport`."""

    memory_available_mib: Count = 0
    free_mib: Annotated[dict[ShortText, Count], Field(max_length=MAX_FILE_SYSTEMS)] = Field(default_factory=dict)
    vms: Annotated[tuple[VmUse, ...], Field(max_length=MAX_VMS)] = ()


class Vitals(Model):
    """What changes by itself and is therefore no part of the report: `health` is every check, ordered by name."""

    health: Annotated[tuple[HealthFinding, ...], Field(max_length=MAX_CHECKS)] = ()
    use: HostUse = HostUse()


class ReportEnvelope(Model):
    """`PUT /v1/hosts/{host}/report`: a full report. `sequence` grows by one per message of one agent process.

    `snapshot_tick` is of the process's moments (`vm.Moment`), earlier than anything the report looked at: what a result
    of a later moment says of its VM stays. It is no part of the report, whose digest must not change by itself.
    """

    agent_started_at_unix_ms: Count
    sequence: Count
    report: HostReport
    snapshot_tick: Annotated[int, Field(strict=True, ge=0, le=2**53)] | None = None
    vitals: Vitals | None = None


class Heartbeat(Model):
    """`POST /v1/hosts/{host}/heartbeat`: "nothing changed since the report with this digest".

    `vitals` come with the first message of a process, whenever a health check changes its level, and once in each
    report interval; other messages leave them out.
    """

    agent_started_at_unix_ms: Count
    sequence: Count
    digest: Sha256
    vitals: Vitals | None = None


class HeartbeatReply(Model):
    """`send_report` asks for the full report because the orchestrator doesn't hold that digest.

    `takes_deltas` says that it takes a `host_delta.ReportDelta`; one that doesn't say so knows none.
    """

    send_report: bool
    heartbeat_interval_s: float
    report_interval_s: float
    takes_deltas: bool = False


class EnrolRequest(Model):
    """`POST /v1/enrol`: a host's one-time token and its certificate signing request (PEM)."""

    host: HostName
    token: Annotated[str, Field(min_length=16, max_length=128)]
    csr_pem: Annotated[str, Field(max_length=16384)]


class EnrolReply(Model):
    """The host's certificate and the fleet CA's, both PEM."""

    certificate_pem: str
    ca_pem: str
    not_after: str
