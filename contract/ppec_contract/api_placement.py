# SPDX-License-Identifier: Apache-2.0
"""What of a request for VMs says where they may go, and what a plan says of where they would: the REST API's part."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StringConstraints, field_validator

from ppec_contract.api_ipdb import Networks
from ppec_contract.model import HostName, Model, ResourceName, VmName
from ppec_contract.vm import DiskMib, MemoryMib, NumaPolicy, NvmeDrives, Vcpus, even_vcpus, whole_huge_pages

MAX_GROUPS = 8
# Of one VM that comes: so many others may change cells for it.
MAX_PLAN_MOVES = 16
# `key`, whatever its value, or `key=value`.
LabelMatch = Annotated[
    str, StringConstraints(min_length=1, max_length=321, pattern=r"^[^=\x00-\x1f\x7f]+(=[^\x00-\x1f\x7f]*)?$")
]


class Policy(StrEnum):
    """How hosts that fit are ranked. `balanced` evens out use, `pack` fills hosts, `spread` keeps a batch apart."""

    BALANCED = "balanced"
    PACK = "pack"
    SPREAD = "spread"


class GroupRule(Model):
    """VMs of one name stand together or apart, on or over one level, now and later. The first VM of a group says how it
    is; a request that says otherwise is refused (`group.mismatch`).

    A hard group is kept, whatever it costs; of a soft one, hosts that keep it come first.
    """

    name: ResourceName
    apart: StrictBool = True
    level: Literal["host", "rack", "datacentre"] = "host"
    hard: StrictBool = True


class NPlusOne(Model):
    """What is made of the rule that after the loss of any one host, or rack, everything restarts elsewhere in its
    cluster: nothing, a warning that names what is exposed, or a condition for every placement."""

    mode: Literal["off", "warn", "required"] = "off"
    level: Literal["host", "rack"] = "host"


class VmSize(Model):
    """A size without a flavor. `nvme_drives` of its host are handed to the VM whole, near its NUMA cell."""

    vcpus: Vcpus
    memory_mib: MemoryMib
    disk_mib: DiskMib
    nvme_drives: NvmeDrives = 0
    numa: NumaPolicy = Field(default_factory=NumaPolicy)

    _even = field_validator("vcpus")(even_vcpus)

    def model_post_init(self, context: Any, /) -> None:
        whole_huge_pages(self.memory_mib, self.numa)


class VmItem(Model):
    """One VM of a batch of unequal ones. What it leaves out is the request's: of `flavor` and `size` one, `pool`,
    `rack`, `host` and `networks`, and its groups beside the request's. Higher `priority` is placed first.

    Its `rack`, `host` and `networks` stand in place of the request's. A `host` lies in whatever rack, and both in
    whatever other places, the VM is to be in; an item that would need to be in two is refused."""

    name: VmName
    flavor: ResourceName | None = None
    size: VmSize | None = None
    pool: ResourceName | None = None
    rack: ResourceName | None = None
    host: HostName | None = None
    networks: Networks = ()
    groups: Annotated[tuple[GroupRule, ...], Field(max_length=MAX_GROUPS)] = ()
    priority: Annotated[int, Field(strict=True, ge=-100, le=100)] = 0


# --- plans -----------------------------------------------------------------------------------------------------------


class MoveView(Model):
    """A running VM that changes NUMA cells on its host, so that another comes there: see `VmsCreate.max_moves`."""

    vm: VmName
    cells_before: tuple[int, ...]
    cells_after: tuple[int, ...]


class PlacedView(Model):
    """Where a VM would go, and why there: of so many `candidates` that could take it, none had a lower `score`.
    `searched`: the place is part of a whole, found for the batch together; the policy's own choice would have left
    others of the batch without a place, or the fleet less even. `moves` open the cell before; the candidates are then
    the hosts that as few moves open. VMs were placed in the order of `step`; `balanced` and `spread` score with the
    fleet's figures as they were before the step `epoch`."""

    vm: VmName
    host: HostName
    cells: tuple[int, ...]
    candidates: int
    score: float
    broken_groups: int = 0
    searched: bool = False
    moves: tuple[MoveView, ...] = ()
    step: int = 0
    epoch: int = 0


class ChangeView(Model):
    """A change that makes a refused VM fit: a rule given up (`give-up`), a drain ended (`end-drain`), an agent upgraded
    (`upgrade-agent`), a silent host brought back (`bring-back`), running VMs moved to other cells of their host
    (`retune`), addresses added (`add-addresses`), another size (`other-size`), room freed (`free-room`); where nothing
    single helps, several of these together (`several`, with the `changes` in its details). `details` are its own
    fields. Rules are called as they are in requests, those of a size or flavor `numa.…`, a cluster's own
    `cluster.…`; `group:` and its name is a group, and `failed` what keeps a VM from hosts where it failed before."""

    kind: Literal[
        "give-up",
        "end-drain",
        "upgrade-agent",
        "bring-back",
        "retune",
        "add-addresses",
        "other-size",
        "free-room",
        "several",
    ]
    sentence: str
    details: dict[str, Any] = Field(default_factory=dict)


class RefusedView(Model):
    """Why a VM would find no place: every host counted under the reason that turned it away, in this `step` of the plan
    (which plans that were kept by older orchestrators don't tell); cheapest `changes` first. They are looked for, once,
    for the first ten kinds of refused VMs, and fewer where N+1 makes it long; others are not `advised`."""

    vm: VmName
    reasons: dict[str, int]
    sentence: str
    changes: tuple[ChangeView, ...] = ()
    advised: bool = True
    step: int | None = None


class ExposedView(Model):
    """A host or rack whose loss would leave so many VMs without a place, `vm` the first of them. Of which `level` and
    `cluster` it is older orchestrators don't tell."""

    domain: str
    level: Literal["host", "rack"] | None = None
    cluster: str | None = None
    vm: str
    without_place: int


class RestartView(Model):
    """Where a VM would run on, were the host that it is on lost."""

    vm: str
    host: str
    cells: tuple[int, ...]


class LossView(Model):
    """A host or rack that has VMs: where each of them would restart were it lost; or those that could not. Of two VMs
    with one name, both have a line. Of which `level` it is older orchestrators don't tell."""

    domain: str
    level: Literal["host", "rack"] | None = None
    cluster: str
    restarts: tuple[RestartView, ...]
    without_place: tuple[str, ...]


class PlanView(Model):
    """`POST /v1/plans`: the exact plan of a request, which changes nothing. `plan_id` is its hash: of the request, of
    every place, and of the state of the hosts it stands on. `executable` until `expires_at`, by who made it, as it is;
    if it `needs_approval`, once somebody else has approved it.

    With `?evidence=true` it says all that somebody else needs to play it through on the fleet (`GET /v1/fleet`):
    `requests`, what was asked for in the planner's words, is a document `ppec-requests/1`; `evacuations` are those that
    N+1 relies on. Neither is kept with the plan.
    """

    plan_id: str
    created_by: str
    created_at: datetime
    expires_at: datetime
    executable: bool
    needs_approval: bool = False
    placed: tuple[PlacedView, ...]
    refused: tuple[RefusedView, ...]
    exposed: tuple[ExposedView, ...] = ()
    hosts: int
    requests: dict[str, Any] | None = None
    evacuations: tuple[LossView, ...] | None = None
