# SPDX-License-Identifier: Apache-2.0
"""The orchestrator's REST resources: what the CLI, the collection's modules and other services send and get.

Names are the same here, in `api/`, in `store/` and in the modules. `…Create` is a request, `…View` an answer. Lists
answer `Page`: `items` and, while there is more, the `next_cursor` to pass back. The IPDB's are in `api_ipdb.py`.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Generic, Literal, TypeVar
from uuid import UUID

from pydantic import Field, StrictBool, field_validator, model_validator

from ppec_contract.agent import MAX_FROZEN_S, PROXY_PORT, Resized, Stage
from ppec_contract.api_ipdb import AddressView, Networks
from ppec_contract.api_placement import MAX_GROUPS, GroupRule, LabelMatch, NPlusOne, VmItem, VmSize
from ppec_contract.errors import Problem
from ppec_contract.guest import MAX_CONSOLE_TAIL_BYTES
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
    VmUse,
)
from ppec_contract.model import (
    MAX_LABELS,
    HostName,
    LabelKey,
    Labels,
    LabelValue,
    Model,
    ResourceName,
    Sha256,
    UserData,
    VmName,
)
from ppec_contract.retune import RetuneBounds, RetunePlan, RetuneWant
from ppec_contract.vm import (
    DiskMib,
    MemoryMib,
    NumaPolicy,
    Size,
    VcpuPin,
    Vcpus,
    VmState,
    even_maximum,
    even_vcpus,
    fitting_maxima,
)

T = TypeVar("T")


MAX_BATCH = 1000
# A VM by name or by id.
VmRef = Annotated[str, Field(min_length=1, max_length=63)]


class Page(Model, Generic[T]):
    items: tuple[T, ...]
    next_cursor: str | None = None


class LabelsUpdate(Model):
    """`PATCH …/labels`: sets the labels named, and removes those given as null. The others stay."""

    labels: Annotated[dict[LabelKey, LabelValue | None], Field(min_length=1, max_length=MAX_LABELS)]


class HealthView(Model):
    """`GET /v1/health`: answered only while the database answers too."""

    version: str
    api_version: int


# --- catalogue -------------------------------------------------------------------------------------------------------


class DatacentreCreate(Model):
    name: ResourceName
    region: ResourceName


class DatacentreView(DatacentreCreate):
    pass


class ClusterCreate(Model):
    """A cluster has one architecture: it is the domain VMs may move within."""

    name: ResourceName
    datacentre: ResourceName
    architecture: Architecture = "x86_64"


class ClusterView(ClusterCreate):
    pass


class RackCreate(Model):
    name: ResourceName
    cluster: ResourceName


class RackView(RackCreate):
    pass


class FlavorCreate(Model):
    """A size, and how its VMs sit on their hosts. vCPUs are even; on dedicated cores, unless `numa` says otherwise.

    Up to `max_vcpus` and `max_memory_mib` (default: no more than they start with) its VMs can grow while they run;
    nothing is set aside for that.
    """

    name: ResourceName
    vcpus: Vcpus
    memory_mib: MemoryMib
    disk_mib: DiskMib
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


# --- hosts -----------------------------------------------------------------------------------------------------------


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
    checks. `use` is what it last said, if this replica heard it."""

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


# --- VMs -------------------------------------------------------------------------------------------------------------


class Policy(StrEnum):
    """How hosts that fit are ranked. `balanced` evens out use, `pack` fills hosts, `spread` keeps a batch apart."""

    BALANCED = "balanced"
    PACK = "pack"
    SPREAD = "spread"


class BatchMode(StrEnum):
    """What happens when a batch does not fit or succeed whole."""

    ALL_OR_NOTHING = "all-or-nothing"
    BEST_EFFORT = "best-effort"


class VmsCreate(Model):
    """`POST /v1/vms`: one VM or a batch of equal ones.

    Give `names`, or a `count` and (optionally) a `name`: one VM is called `name`, several `name-1` … `name-N`. Without
    a name one is made up. `items` are VMs of different sizes, each with its name. `region`, `datacentre`, `cluster`,
    `rack`, `host`, `vrf` narrow where they may go; so do `host_labels`, which hosts must have, and `avoid_labels`.
    `networks` says which addresses each gets (default: one of each family that serves its host); the first one's
    gateway is the VM's.

    `at_least`, of a best effort, claims what can be had at once: the request waits for no other that is just taking
    room, and is refused whole when fewer VMs than that find a place.
    """

    image: ResourceName
    flavor: ResourceName | None = None
    size: VmSize | None = None
    items: Annotated[tuple[VmItem, ...], Field(max_length=MAX_BATCH)] = ()
    name: VmName | None = None
    count: Annotated[int, Field(strict=True, ge=1, le=MAX_BATCH)] = 1
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
    networks: Networks = ()
    user_data: UserData = ""
    labels: Labels = Field(default_factory=dict)

    @property
    def total(self) -> int:
        """How many VMs are asked for."""
        return len(self.items) or len(self.names) or self.count

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
        for rule in (*self.groups, *(rule for item in self.items for rule in item.groups)):
            if rules.setdefault(rule.name, rule) != rule:
                raise ValueError(f"group {rule.name} is defined in two ways")
        return self

    @model_validator(mode="after")
    def _fixed_addresses_fit_one_vm(self) -> VmsCreate:
        fixed = [one.address for one in self.networks if one.address is not None]
        if fixed and self.total > 1:
            raise ValueError(f"address {fixed[0]} is for one VM: create the others without it")
        if len(set(fixed)) != len(fixed):
            raise ValueError("networks holds an address twice")
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
        if self.mode is not BatchMode.BEST_EFFORT:
            raise ValueError("at_least goes with mode best-effort")
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


class ConsoleOpen(Model):
    """The query of `GET /v1/vms/{vm}/console`, a WebSocket. It begins with the console's last `tail_bytes`.

    Binary messages are bytes of the console, both ways; texts are `ConsoleNotice`s and come from the server alone.
    With `read_only` nothing may be sent. Without `follow` it ends once it has sent what is there.
    """

    read_only: bool = False
    follow: bool = True
    tail_bytes: Annotated[int, Field(ge=0, le=MAX_CONSOLE_TAIL_BYTES)] = 16 * 1024


class ConsoleEnd(StrEnum):
    """Why an open console ended. `complete`: all was sent that was asked for; `idle`: for long nothing was written or
    typed; `unauthorised`: the caller's token counts no longer; `problem`: the notice has it."""

    VM_OFF = "vm_off"
    VM_GONE = "vm_gone"
    COMPLETE = "complete"
    IDLE = "idle"
    UNAUTHORISED = "unauthorised"
    PROBLEM = "problem"


class ConsoleNotice(Model):
    """What a console tells beside its bytes. `state`: the VM's, first of all and when it has changed.

    `skipped_bytes` were lost just here to this reader, which was too slow. `ended` is in the last message.
    """

    state: VmState | None = None
    skipped_bytes: int = 0
    ended: ConsoleEnd | None = None
    problem: Problem | None = None


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
    VM alone; its use as its host last said, if this replica heard it.
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


# --- operations ------------------------------------------------------------------------------------------------------


class OperationState(StrEnum):
    """`partial`: a best-effort batch of which some VMs did not work out; each says why."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    PARTIAL = "partial"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self in (self.SUCCEEDED, self.PARTIAL, self.FAILED, self.CANCELLED)


class ItemState(StrEnum):
    """One VM within an operation. `refused`: no place was found; nothing was tried."""

    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    REFUSED = "refused"
    FAILED = "failed"
    UNDONE = "undone"


class OperationItem(Model):
    """One VM of an operation; `stage` is the latest the host reported, `stage_ms` the time spent in each.

    `resized` says, after a resize, which part of the new size the VM has already.
    """

    vm_id: UUID
    name: str
    state: ItemState
    host: HostName | None = None
    attempt: int = 1
    stage: Stage | None = None
    stage_ms: dict[Stage, int] = Field(default_factory=dict)
    problem: Problem | None = None
    resized: Resized | None = None


class OperationStep(Model):
    """One step of an operation's do/undo table, in order of execution."""

    ordinal: int
    name: str
    state: Literal["pending", "running", "done", "failed", "undone"]
    started_at: datetime | None = None
    ended_at: datetime | None = None
    detail: str = ""


class RetuneView(HostRetune):
    """What a retune was asked for, and the plan once its host has made it."""

    host: HostName
    plan: RetunePlan | None = None


class OperationView(Model):
    """`retune` is there of a retune alone."""

    operation_id: str
    kind: str
    state: OperationState
    created_by: str
    created_at: datetime
    started_at: datetime | None = None
    ended_at: datetime | None = None
    cancel_requested: bool = False
    items: tuple[OperationItem, ...] = ()
    steps: tuple[OperationStep, ...] = ()
    problem: Problem | None = None
    counters: dict[str, int] = Field(default_factory=dict)
    retune: RetuneView | None = None
