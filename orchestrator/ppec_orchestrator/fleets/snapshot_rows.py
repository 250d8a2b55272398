# SPDX-License-Identifier: Apache-2.0
"""The shape of `ppec-fleet/1` and `ppec-requests/1`.

Fields are named as in the planner's own classes (`placement/fleet.py`, `placement/request.py`), which say what they
mean; one that is left out has the default it has there. A profile and a group are defined once, by name.
"""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired
from uuid import UUID

from pydantic import ConfigDict, Field, TypeAdapter, with_config
from typing_extensions import TypedDict

from ppec_contract.host import Architecture
from ppec_contract.vm import CellId, NumaPolicy
from ppec_orchestrator.fleets.file import (
    MOST_HOSTS,
    MOST_REQUESTS,
    MOST_VMS,
    Amount,
    Cpus,
    Flag,
    Left,
    Name,
    Number,
    Place,
)
from ppec_orchestrator.placement.request import Level

SCHEMA = "ppec-fleet/1"
REQUESTS_SCHEMA = "ppec-requests/1"
Threads = Annotated[int, Field(strict=True, ge=1, le=64)]
Pairs = Annotated[list[tuple[Name, Place]], Field(max_length=64)]
# A host's prefixes of IPv4, and those of IPv6: a family that none serves is left out.
Families = Annotated[list[Annotated[list[Number], Field(min_length=1, max_length=1024)]], Field(max_length=2)]
_strict = with_config(ConfigDict(extra="forbid"))


@_strict
class ShapeRow(TypedDict):
    vcpus: Annotated[Cpus, Field(ge=1)]
    memory_mib: Annotated[Amount, Field(ge=1)]
    disk_mib: Amount
    numa: NotRequired[NumaPolicy]
    pool: NotRequired[Place]
    nvme: NotRequired[Cpus]


@_strict
class WhereRow(TypedDict):
    datacentre: NotRequired[Place | None]
    cluster: NotRequired[Place | None]
    rack: NotRequired[Place | None]
    host: NotRequired[Place | None]
    vrf: NotRequired[Place | None]
    region: NotRequired[Place | None]
    labels: NotRequired[Pairs]
    without: NotRequired[Pairs]


@_strict
class ProfileRow(TypedDict):
    name: Name
    shape: ShapeRow
    architecture: Architecture
    where: NotRequired[WhereRow]
    capabilities: NotRequired[Annotated[list[Name], Field(max_length=256)]]
    # Of each network, its prefixes' ids; null for any that serves the host.
    networks: NotRequired[Annotated[list[Annotated[list[Number], Field(max_length=1024)] | None], Field(max_length=64)]]
    # Of each address that it has already, the prefixes that could give it.
    fixed: NotRequired[Annotated[list[Annotated[list[Number], Field(max_length=1024)]], Field(max_length=64)]]


@_strict
class GroupRow(TypedDict):
    name: Name
    apart: NotRequired[Flag]
    level: NotRequired[Level]
    hard: NotRequired[Flag]


@_strict
class PrefixRow(TypedDict):
    id: Number
    # Without one it never runs out.
    free_addresses: NotRequired[Number]


@_strict
class NPlusOneRow(TypedDict):
    mode: Literal["warn", "required"]
    level: NotRequired[Literal["host", "rack"]]


@_strict
class ClusterRow(TypedDict):
    name: Place
    n_plus_one: NPlusOneRow


@_strict
class CellRow(TypedDict):
    cell: CellId
    socket: CellId
    threads_per_core: Threads
    cores: Cpus
    cores_free: Left
    memory_mib: Amount
    memory_free_mib: Left
    shared_cpus: NotRequired[Cpus]
    shared_vcpus: NotRequired[Annotated[int, Field(strict=True, ge=0, le=2**20)]]
    shared_vcpus_free: NotRequired[Left]
    pages_2m: NotRequired[Amount]
    pages_2m_free: NotRequired[Left]
    pages_1g: NotRequired[Amount]
    pages_1g_free: NotRequired[Left]
    nvme: NotRequired[Cpus]
    nvme_free: NotRequired[Left]
    cores_reserved: NotRequired[Cpus]
    memory_reserved_mib: NotRequired[Amount]


@_strict
class PoolRow(TypedDict):
    size_mib: Amount
    free_mib: Left


@_strict
class VmRow(TypedDict):
    vm_id: UUID
    name: Name
    profile: Name
    cells: Annotated[list[CellId], Field(min_length=1, max_length=64)]
    groups: NotRequired[Annotated[list[Name], Field(max_length=256)]]
    movable: NotRequired[Flag]


@_strict
class HostRow(TypedDict):
    host_id: Number
    name: Name
    datacentre: Place
    cluster: Place
    rack: Place
    vrf: Place
    architecture: Architecture
    cells: Annotated[list[CellRow], Field(max_length=64)]
    disk_mib: Amount
    disk_free_mib: Left
    vms: NotRequired[Annotated[list[VmRow], Field(max_length=MOST_VMS, fail_fast=True)]]
    live: NotRequired[Flag]
    draining: NotRequired[Flag]
    prefixes: NotRequired[Families]
    capabilities: NotRequired[Annotated[list[Name], Field(max_length=256)]]
    region: NotRequired[Place]
    labels: NotRequired[dict[Name, Place]]
    pools: NotRequired[dict[Name, PoolRow]]
    generation: NotRequired[Number]


@_strict
class RequestRow(TypedDict):
    vm_id: NotRequired[UUID]
    name: Name
    profile: Name
    excluded_hosts: NotRequired[list[Name]]
    groups: NotRequired[Annotated[list[Name], Field(max_length=256)]]
    priority: NotRequired[Annotated[int, Field(strict=True, ge=-(2**31), le=2**31)]]


Profiles = Annotated[list[ProfileRow], Field(max_length=MOST_VMS, fail_fast=True)]
Groups = Annotated[list[GroupRow], Field(max_length=MOST_VMS, fail_fast=True)]
Batch = Annotated[list[RequestRow], Field(max_length=MOST_REQUESTS, fail_fast=True)]


@_strict
class BatchRow(TypedDict):
    batch: Batch


@_strict
class FleetRow(TypedDict):
    schema: Literal["ppec-fleet/1"]
    profiles: NotRequired[Profiles]
    groups: NotRequired[Groups]
    prefixes: NotRequired[list[PrefixRow]]
    clusters: NotRequired[list[ClusterRow]]
    hosts: Annotated[list[HostRow], Field(max_length=MOST_HOSTS, fail_fast=True)]
    requests: NotRequired[BatchRow]


@_strict
class RequestsRow(TypedDict):
    schema: NotRequired[Literal["ppec-requests/1"]]
    profiles: NotRequired[Profiles]
    groups: NotRequired[Groups]
    batch: Batch


FLEET = TypeAdapter(FleetRow)
REQUESTS = TypeAdapter(RequestsRow)
