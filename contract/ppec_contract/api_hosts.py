# SPDX-License-Identifier: Apache-2.0
"""The REST resources of hosts: how they are registered and changed, and what is told of them."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated

from pydantic import Field, StrictBool

from ppec_contract.agent import PROXY_PORT
from ppec_contract.host import (
    Architecture,
    CellReport,
    CpuReport,
    Drift,
    DriveReport,
    FileSystemReport,
    HealthFinding,
    HealthLevel,
    HostUse,
    NicReport,
    PoolReport,
)
from ppec_contract.model import HostName, Labels, Model, ResourceName
from ppec_contract.retune import RetuneBounds, RetuneWant


class HostCreate(Model):
    """Registers bare metal. `address` is where its proxy listens; `vrf` decides which prefixes its VMs get."""

    name: HostName
    rack: ResourceName
    vrf: ResourceName
    address: Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[A-Za-z0-9.:-]+$")]
    port: Annotated[int, Field(strict=True, ge=1, le=65535)] = PROXY_PORT
    labels: Labels = Field(default_factory=dict)


class HostUpdate(Model):
    """`draining`: takes no new VMs."""

    draining: StrictBool


class HostRetune(Model):
    """`POST /v1/hosts/{name}/retune`: moves running VMs between the host's cells, so that `want` fits.

    The host makes a plan within `bounds`; it is kept in the operation, and then carried out exactly as it is there, or,
    with `plan_only`, not at all.
    """

    want: RetuneWant = Field(default_factory=RetuneWant)
    bounds: RetuneBounds = Field(default_factory=RetuneBounds)
    plan_only: StrictBool = False


class HostLiveness(StrEnum):
    """`unknown` means silent: its VMs are unknown too, never "stopped"."""

    REGISTERED = "registered"
    ENROLLED = "enrolled"
    UP = "up"
    UNKNOWN = "unknown"


class HostView(Model):
    """A host. What stands from `cpu` on is told of one host alone, not in lists; `health_level` is the worst of its
    checks. What is free of cells, disk and pools is by the record. `use` is what it last said, if this replica heard
    it."""

    name: HostName
    rack: ResourceName
    cluster: ResourceName
    datacentre: ResourceName
    vrf: ResourceName
    address: str
    port: int
    liveness: HostLiveness
    draining: bool
    labels: dict[str, str] = Field(default_factory=dict)
    architecture: Architecture | None = None
    domain_type: str | None = None
    agent_version: str | None = None
    libvirt_version: str | None = None
    qemu_version: str | None = None
    kernel_version: str | None = None
    capabilities: tuple[str, ...] = ()
    cells: tuple[CellReport, ...] = ()
    disk_mib: int = 0
    disk_free_mib: int = 0
    bridges: tuple[str, ...] = ()
    vm_count: int = 0
    last_seen_at: datetime | None = None
    health_level: HealthLevel | None = None
    drift_count: int = 0
    cpu: CpuReport | None = None
    drives: tuple[DriveReport, ...] = ()
    file_systems: tuple[FileSystemReport, ...] = ()
    nics: tuple[NicReport, ...] = ()
    pools: tuple[PoolReport, ...] = ()
    health: tuple[HealthFinding, ...] = ()
    drift: tuple[Drift, ...] = ()
    use: HostUse | None = None


class HostEventView(Model):
    """A check of the host's health entered a level; `before` is None for one that was not known."""

    at: datetime
    check: str
    before: HealthLevel | None
    after: HealthLevel
    found: str


class HostEvents(Model):
    """The latest first."""

    items: tuple[HostEventView, ...]


class EnrolmentTokenView(Model):
    """Shown once. It enrols this host once, until it expires."""

    host: HostName
    token: str
    expires_at: datetime
