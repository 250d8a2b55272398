# SPDX-License-Identifier: Apache-2.0
"""The shape of `ppec-bench-cluster/1`. What may be left out follows from the rest, or is a note of who made it."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired

from pydantic import ConfigDict, Field, TypeAdapter, with_config
from typing_extensions import TypedDict

from ppec_orchestrator.fleets.file import (
    MOST_HOSTS,
    MOST_REQUESTS,
    MOST_VMS,
    Amount,
    Cpus,
    Flag,
    Name,
    Number,
    Place,
)

SCHEMA = "ppec-bench-cluster/1"
_strict = with_config(ConfigDict(extra="forbid"))


@_strict
class Rules(TypedDict):
    vcpu_ratio: Annotated[float, Field(strict=True, ge=1, le=1, allow_inf_nan=False)]
    even_vcpus: Flag
    vm_fits_one_socket: Flag
    anti_affinity: Flag


@_strict
class Flavour(TypedDict):
    name: Name
    vcpus: Annotated[Cpus, Field(ge=1)]
    mem_mib: Annotated[Amount, Field(ge=1)]
    disk_mib: Amount
    weight: NotRequired[Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]]


@_strict
class ClusterRow(TypedDict):
    name: Name
    uuid: NotRequired[Place]


@_strict
class SocketRow(TypedDict):
    id: Annotated[Number, Field(le=4095)]
    cores: Cpus
    reserved_cores: Cpus
    mem_mib: Amount
    reserved_mem_mib: Amount


@_strict
class Free(TypedDict):
    cores: Number
    mem_mib: Number
    disk_mib: Number


# `class` is a word of Python's.
_Kind = TypedDict("_Kind", {"class": NotRequired[Place]})


@_strict
class HostRow(_Kind):
    name: Name
    group: Name
    rack: Place
    sockets: Annotated[list[SocketRow], Field(min_length=1, max_length=64)]
    disk_mib: Amount
    free: NotRequired[Free]


@_strict
class VmRow(TypedDict):
    name: Name
    vcpus: Annotated[Cpus, Field(ge=1)]
    mem_mib: Annotated[Amount, Field(ge=1)]
    disk_mib: Amount
    host: Name
    socket: Number
    flavour: NotRequired[Name]
    app: NotRequired[Place]
    secondary: NotRequired[Name]


@_strict
class RequestRow(TypedDict):
    name: Name
    flavour: Name
    app: NotRequired[Place]


@_strict
class One(TypedDict):
    flavour: Name


@_strict
class Requests(TypedDict):
    one: NotRequired[One]
    batch: Annotated[list[RequestRow], Field(max_length=MOST_REQUESTS, fail_fast=True)]


@_strict
class Document(TypedDict):
    schema: Literal["ppec-bench-cluster/1"]
    seed: NotRequired[Annotated[int, Field(strict=True)]]
    storage: Literal["local", "mirrored", "shared"]
    rules: Rules
    flavours: Annotated[list[Flavour], Field(max_length=10_000)]
    groups: list[ClusterRow]
    hosts: Annotated[list[HostRow], Field(max_length=MOST_HOSTS, fail_fast=True)]
    vms: Annotated[list[VmRow], Field(max_length=MOST_VMS, fail_fast=True)]
    requests: NotRequired[Requests]


DOCUMENT = TypeAdapter(Document)
REQUESTS = TypeAdapter(Requests)
