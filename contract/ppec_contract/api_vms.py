# SPDX-License-Identifier: Apache-2.0
"""The REST resources of VMs: how they are asked for and changed, and what is told of them.

Where they may go is said in words of `api_placement.py`, which addresses they get in words of `api_ipdb.py`.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated
from uuid import UUID

from pydantic import Field, StrictBool, field_validator, model_validator

from ppec_contract.agent import MAX_FROZEN_S
from ppec_contract.api_ipdb import AddressView, IpAddress, Networks
from ppec_contract.api_placement import (
    MAX_GROUPS,
    MAX_PLAN_MOVES,
    GroupRule,
    LabelMatch,
    NPlusOne,
    Policy,
    VmItem,
    VmSize,
)
from ppec_contract.host import VmUse
from ppec_contract.model import MAX_LABELS, HostName, Labels, Model, ResourceName, UserData, VmName
from ppec_contract.vm import MemoryMib, Size, VcpuPin, Vcpus, VmState, even_vcpus

MAX_BATCH = 1000
# A VM by name or by id.
VmRef = Annotated[str, Field(min_length=1, max_length=63)]


class BatchMode(StrEnum):
    """What happens when a batch does not fit or succeed whole: nothing is made; or as much as there is room for, first
    come first served; or that, with the refused ones chosen so that the others have the most vCPUs in all. Priorities
    go before both."""

    ALL_OR_NOTHING = "all-or-nothing"
    BEST_EFFORT = "best-effort"
    MOST_VCPUS = "most-vcpus"


class VmsCreate(Model):
    """`POST /v1/vms`: one VM or a batch of equal ones.

    Give `names`, or a `count` and (optionally) a `name`: one VM is called `name`, several `name-1` … `name-N`. Without
    a name one is made up. `items` are VMs of different sizes, places and addresses, each with its name. `pool` is the
    storage pool that gets their disks (default: the place where a host keeps VMs by itself). `region`, `datacentre`,
    `cluster`, `rack`, `host`, `vrf` narrow where they may go; so do `host_labels`, which hosts must have, and
    `avoid_labels`.
    `networks` says which addresses each gets (default: one of each family that serves its host); the first one's
    gateway is the VM's. An address asked for by number is one VM's: an item's, or that of the one VM without networks
    of its own.

    `at_least`, where not all are needed, claims what can be had at once: the request waits for no other that is just
    taking room, and is refused whole when fewer VMs than that find a place.

    `max_moves` is how many running VMs may change NUMA cells on their host for each of these VMs that fits nowhere as
    things are; the host retunes before the VM is made. Nothing is moved for VMs that share CPUs or may span cells.
    """

    image: ResourceName
    flavor: ResourceName | None = None
    size: VmSize | None = None
    items: Annotated[tuple[VmItem, ...], Field(max_length=MAX_BATCH)] = ()
    name: VmName | None = None
    count: Annotated[int, Field(strict=True, ge=1, le=MAX_BATCH)] = 1
    pool: ResourceName | None = None
    names: Annotated[tuple[VmName, ...], Field(max_length=MAX_BATCH)] = ()
    policy: Policy = Policy.BALANCED
    mode: BatchMode = BatchMode.ALL_OR_NOTHING
    at_least: Annotated[int, Field(strict=True, ge=1, le=MAX_BATCH)] | None = None
    region: ResourceName | None = None
    datacentre: ResourceName | None = None
    cluster: ResourceName | None = None
    rack: ResourceName | None = None
    host: HostName | None = None
    vrf: ResourceName | None = None
    host_labels: Annotated[tuple[LabelMatch, ...], Field(max_length=MAX_LABELS)] = ()
    avoid_labels: Annotated[tuple[LabelMatch, ...], Field(max_length=MAX_LABELS)] = ()
    groups: Annotated[tuple[GroupRule, ...], Field(max_length=MAX_GROUPS)] = ()
    n_plus_one: NPlusOne = Field(default_factory=NPlusOne)
    max_moves: Annotated[int, Field(strict=True, ge=0, le=MAX_PLAN_MOVES)] = 0
    networks: Networks = ()
    user_data: UserData = ""
    labels: Labels = Field(default_factory=dict)

    @property
    def total(self) -> int:
        """How many VMs are asked for."""
        return len(self.items) or len(self.names) or self.count

    @property
    def rules(self) -> tuple[GroupRule, ...]:
        """Those of all VMs, and of each; some perhaps several times."""
        return (*self.groups, *(rule for item in self.items for rule in item.groups))

    @model_validator(mode="after")
    def _sized_one_way(self) -> VmsCreate:
        sized = {"the request": (self.flavor, self.size)}
        sized |= {f"item {item.name}": (item.flavor, item.size) for item in self.items}
        twice = [what for what, (flavor, size) in sized.items() if flavor is not None and size is not None]
        if twice:
            raise ValueError(f"{twice[0]} has a flavor and a size: give one of them")
        unsized = [item.name for item in self.items if item.flavor is None and item.size is None]
        if self.flavor is None and self.size is None and (unsized or not self.items):
            raise ValueError("give a flavor or a size" + (f" for item {unsized[0]}, or for all" if unsized else ""))
        return self

    @model_validator(mode="after")
    def _grouped_one_way(self) -> VmsCreate:
        rules: dict[str, GroupRule] = {}
        for rule in self.rules:
            if rules.setdefault(rule.name, rule) != rule:
                raise ValueError(f"group {rule.name} is defined in two ways")
        return self

    @model_validator(mode="after")
    def _fixed_addresses_fit_one_vm(self) -> VmsCreate:
        fixed = [one.address for one in self.networks if one.address is not None]
        users = sum(not item.networks for item in self.items) if self.items else self.total
        if fixed and users > 1:
            raise ValueError(f"address {fixed[0]} is for one VM: create the others without it, or give items their own")
        if fixed and not users:
            raise ValueError(f"address {fixed[0]} is for no VM: each item has networks of its own")
        return self

    @model_validator(mode="after")
    def _fixed_addresses_asked_for_once(self) -> VmsCreate:
        asked = [("the request", self.networks), *((f"item {item.name}", item.networks) for item in self.items)]
        holders: dict[IpAddress, str] = {}
        for holder, networks in asked:
            for address in (one.address for one in networks if one.address is not None):
                if address in holders:
                    both = " and ".join(dict.fromkeys((holders[address], holder)))
                    raise ValueError(f"address {address} is asked for twice, by {both}")
                holders[address] = holder
        return self

    @model_validator(mode="after")
    def _named_one_way(self) -> VmsCreate:
        if self.items and (self.names or self.name is not None or self.count != 1):
            raise ValueError("give either items, or names, or count and name")
        if len({item.name for item in self.items}) != len(self.items):
            raise ValueError("items hold a name twice")
        if self.names and (self.name is not None or self.count != 1):
            raise ValueError("give either names, or count and name")
        if len(set(self.names)) != len(self.names):
            raise ValueError("names holds a name twice")
        if self.name is not None and self.count > 1 and len(self.name) > 58:
            raise ValueError("name is too long to be numbered (58 characters at most)")
        return self

    @model_validator(mode="after")
    def _at_least_some_of_them(self) -> VmsCreate:
        if self.at_least is None:
            return self
        if self.mode is BatchMode.ALL_OR_NOTHING:
            raise ValueError("at_least goes with mode best-effort or most-vcpus")
        if self.at_least > self.total:
            raise ValueError(f"at_least is {self.at_least}, more than the {self.total} VMs wanted")
        return self


class VmAction(StrEnum):
    DELETE = "delete"
    START = "start"
    STOP = "stop"
    REBOOT = "reboot"
    RESET = "reset"
    PAUSE = "pause"
    RESUME = "resume"
    FREEZE = "freeze"
    THAW = "thaw"


class VmsAction(Model):
    """`POST /v1/vms/actions`: one action on several VMs, as one operation. VMs by name or id.

    `timeout_s` and `force` are of stop and reboot: how long the guests may take to obey, and whether the others then
    have the plug pulled or the reset button pressed.

    `thaw_after_s` is of freeze: so long from when its host has frozen it a guest stays so at most, whatever becomes of
    the caller.
    """

    action: VmAction
    vms: Annotated[tuple[VmRef, ...], Field(min_length=1, max_length=MAX_BATCH)]
    timeout_s: Annotated[float, Field(ge=0, le=600)] = 30.0
    force: StrictBool = False
    thaw_after_s: Annotated[float, Field(ge=1, le=MAX_FROZEN_S)] = 60.0


class VmResize(Model):
    """`PATCH /v1/vms/{vm}`: another size, on the host where the VM is. What is left out stays as it is.

    `timeout_s` is how long the guest of a running VM may take to let go of vCPUs.
    """

    vcpus: Vcpus | None = None
    memory_mib: MemoryMib | None = None
    timeout_s: Annotated[float, Field(ge=0, le=600)] = 10.0

    @field_validator("vcpus")
    @classmethod
    def _even(cls, vcpus: int | None) -> int | None:
        return None if vcpus is None else even_vcpus(vcpus)

    @model_validator(mode="after")
    def _changes_something(self) -> VmResize:
        if self.vcpus is None and self.memory_mib is None:
            raise ValueError("give vcpus, memory_mib, or both")
        return self


class VmRecord(StrEnum):
    """What the orchestrator decided of a VM (its record), as against what a host observes.

    `failed` keeps the reason of a VM whose create did not work out; it holds no resources.
    """

    CREATING = "creating"
    ACTIVE = "active"
    DELETING = "deleting"
    FAILED = "failed"


class VmView(Model):
    """A VM: the record, and what its host last observed (`observed_at`; None means never or unknown).

    `held` is the size for which its host keeps room besides: after a resize what the VM still runs with until its next
    start, during one what it is to get. A VM without a flavor has a size of its own. `groups` and `use` are told of one
    VM alone; its use as its host last said, if this replica heard it. So are `drives`: the PCI addresses, on its host,
    of the `nvme_drives` it has.
    """

    vm_id: UUID
    name: VmName
    record: VmRecord
    observed: VmState
    observed_at: datetime | None = None
    flavor: ResourceName | None
    image: ResourceName
    vcpus: int
    memory_mib: int
    disk_mib: int
    pool: ResourceName | None = None
    nvme_drives: int = 0
    host: HostName | None
    cells: tuple[int, ...] = ()
    pins: tuple[VcpuPin, ...] = ()
    vrf: ResourceName | None = None
    addresses: tuple[AddressView, ...] = ()
    labels: dict[str, str] = Field(default_factory=dict)
    created_at: datetime
    operation_id: str
    held: Size | None = None
    groups: tuple[GroupRule, ...] = ()
    use: VmUse | None = None
    drives: tuple[str, ...] = ()
