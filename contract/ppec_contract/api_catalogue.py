# SPDX-License-Identifier: Apache-2.0
"""The REST resources of the catalogue: datacentres, clusters, racks, flavors, images."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from ppec_contract.api_placement import NPlusOne
from ppec_contract.host import Architecture
from ppec_contract.model import Model, ResourceName, Sha256
from ppec_contract.vm import (
    DiskMib,
    MemoryMib,
    NumaPolicy,
    NvmeDrives,
    Vcpus,
    even_maximum,
    even_vcpus,
    fitting_maxima,
)


class DatacentreCreate(Model):
    name: ResourceName
    region: ResourceName


class DatacentreView(DatacentreCreate):
    pass


class ClusterCreate(Model):
    """A cluster has one architecture: it is the domain VMs may move within. `n_plus_one` is a rule for whatever is
    placed there, or grows there; a request can ask for more, not for less."""

    name: ResourceName
    datacentre: ResourceName
    architecture: Architecture = "x86_64"
    n_plus_one: NPlusOne = Field(default_factory=NPlusOne)


class ClusterView(ClusterCreate):
    pass


class ClusterUpdate(Model):
    """`PATCH /v1/clusters/{cluster}`: another rule, from now on. VMs that stand there stay, whether or not they keep
    it."""

    n_plus_one: NPlusOne


class RackCreate(Model):
    name: ResourceName
    cluster: ResourceName


class RackView(RackCreate):
    pass


class FlavorCreate(Model):
    """A size, and how its VMs sit on their hosts. vCPUs are even; on dedicated cores, unless `numa` says otherwise.

    Up to `max_vcpus` and `max_memory_mib` (default: no more than they start with) its VMs can grow while they run;
    nothing is set aside for that. `nvme_drives` of its host are handed to each VM whole, near its NUMA cell.
    """

    name: ResourceName
    vcpus: Vcpus
    memory_mib: MemoryMib
    disk_mib: DiskMib
    nvme_drives: NvmeDrives = 0
    max_vcpus: Vcpus | None = None
    max_memory_mib: MemoryMib | None = None
    numa: NumaPolicy = Field(default_factory=NumaPolicy)

    _even = field_validator("vcpus")(even_vcpus)
    _even_maximum = field_validator("max_vcpus")(even_maximum)

    @model_validator(mode="after")
    def _sized(self) -> FlavorCreate:
        fitting_maxima(self)
        return self


class FlavorView(FlavorCreate):
    pass


class ImageView(Model):
    """An image is imported by `PUT /v1/images/{name}?format=qcow2|raw` with the file as body."""

    name: ResourceName
    format: Literal["qcow2", "raw"]
    architecture: Architecture
    sha256: Sha256
    size_bytes: int
    virtual_size_mib: int
