# SPDX-License-Identifier: Apache-2.0
"""A host's report of itself: the full picture with a digest, and the heartbeat that carries only the digest."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ppec_contract.model import HostName, Model, Sha256, digest
from ppec_contract.vm import VmInfo

Architecture = Literal["x86_64", "aarch64", "ppc64le", "s390x", "riscv64"]
Count = Annotated[int, Field(ge=0)]


class HugePagesReport(Model):
    """A cell's huge pages of one size: how many the host set aside, and how many of them no VM holds."""

    size_kib: Count
    pages: Count
    pages_free: Count


class CellReport(Model):
    """One NUMA cell. Cores are whole physical cores; the `…_free` figures are what the ledger would admit.

    `cores_reserved` are those that no dedicated VM gets: the host's own and the `cores_shared` among them.
    `memory_reserved_mib` is what ordinary memory never has: the host's own, and all huge pages. `shared_vcpus` is how
    many vCPUs of sharing VMs are admitted in the cell.
    """

    cell: Count
    socket: Count
    threads_per_core: Annotated[int, Field(ge=1, le=8)]
    cores: Count
    cores_reserved: Count
    cores_free: Count
    memory_mib: Count
    memory_reserved_mib: Count
    memory_free_mib: Count
    cores_shared: Count = 0
    shared_vcpus: Count = 0
    shared_vcpus_free: Count = 0
    huge_pages: tuple[HugePagesReport, ...] = ()


class HostReport(Model):
    """Everything the orchestrator needs to place on a host; equal pictures have equal digests.

    Nothing volatile (time, load) belongs here: an unchanged host must give an unchanged digest.
    """

    host: HostName
    boot_id: str
    agent_version: str
    api_version: int
    capabilities: tuple[str, ...]
    architecture: Architecture
    domain_type: Literal["kvm", "qemu", "fake"]
    libvirt_version: str
    qemu_version: str
    kernel_version: str
    cells: tuple[CellReport, ...]
    disk_mib: Count
    disk_free_mib: Count
    bridges: tuple[str, ...]
    vms: tuple[VmInfo, ...]

    def digest(self) -> str:
        return digest(self)


class ReportEnvelope(Model):
    """`PUT /v1/hosts/{host}/report`: a full report. `sequence` grows by one per message of one agent process."""

    agent_started_at_unix_ms: Count
    sequence: Count
    report: HostReport


class Heartbeat(Model):
    """`POST /v1/hosts/{host}/heartbeat`: "nothing changed since the report with this digest"."""

    agent_started_at_unix_ms: Count
    sequence: Count
    digest: Sha256


class HeartbeatReply(Model):
    """`send_report` asks for the full report because the orchestrator doesn't hold that digest."""

    send_report: bool
    heartbeat_interval_s: float
    report_interval_s: float


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
