# SPDX-License-Identifier: Apache-2.0
"""The host agent's interface: Varlink on the UNIX socket, the same methods over HTTPS at the proxy.

`METHODS` is the whole interface. On the socket a call is `{"method": "cloud.ppec.agent.CreateVms", "parameters": …,
"more": true}`. At the proxy it is `POST /v1/agent/CreateVms` with the parameters as body: the answer is the reply's
parameters as JSON, or, with `Accept: application/x-ndjson`, one line per Varlink reply, exactly as the socket sent it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Literal
from uuid import UUID

from pydantic import Field, field_validator

from ppec_contract.errors import Problem
from ppec_contract.guest import (
    QueryGuests,
    QueryGuestsReply,
    ReadConsole,
    ReadConsoleReply,
    WriteConsole,
    WriteConsoleReply,
)
from ppec_contract.host import HostReport
from ppec_contract.model import MAX_VMS_PER_CALL, Model, OperationId, VmIds
from ppec_contract.retune import RetuneBounds, RetunePlan, RetuneWant
from ppec_contract.vm import MemoryMib, Moment, Vcpus, VmInfo, VmSpec, even_vcpus

INTERFACE = "cloud.ppec.agent"
# The Varlink error whose parameters are a `Problem`.
FAILED = f"{INTERFACE}.Failed"
SOCKET_PATH = "/run/ppec/agentd.sock"
PROXY_PORT = 7443
NDJSON = "application/x-ndjson"
MAX_FROZEN_S = 600

Fence = Annotated[int, Field(strict=True, ge=0, le=2**53)]


class WriteCall(Model):
    """What every changing call carries.

    The agent keeps the first answer per (operation_id, action, vm) in its journal and returns it when the call is
    repeated; it refuses (`operation.fenced`) a fence lower than the highest it has seen for the operation.
    """

    operation_id: OperationId
    fence: Fence


class CreateVms(WriteCall):
    vms: Annotated[tuple[VmSpec, ...], Field(min_length=1, max_length=MAX_VMS_PER_CALL)]


class DeleteVms(WriteCall):
    """Delete is idempotent: an absent VM is a success that changed nothing."""

    vm_ids: VmIds


class StartVms(WriteCall):
    vm_ids: VmIds


class StopVms(WriteCall):
    """Asks the guest to power off (ACPI) and waits `timeout_s`; then `force` decides: pull the plug, or an error."""

    vm_ids: VmIds
    timeout_s: Annotated[float, Field(ge=0, le=600)] = 30.0
    force: bool = False


class RetuneHost(WriteCall):
    """Carries out a plan as it was shown, move by move, or takes back what it has done. The VMs run on meanwhile.

    Moves that an interrupted call has made already are left as they are. Raises `retune.outdated` if a VM is at neither
    end of its moves, or a core that the plan needs is no longer free. A result for each VM of the plan, and in each,
    whatever went wrong, the VM as it is then.
    """

    plan: RetunePlan


class PlanRetune(Model):
    """What would have to move for this to fit? Changes nothing."""

    want: RetuneWant = Field(default_factory=RetuneWant)
    bounds: RetuneBounds = Field(default_factory=RetuneBounds)


class RebootVms(WriteCall):
    """Asks the guest to reboot (ACPI) and waits `timeout_s`; then `force` decides: reset it, or an error.

    The machine stays the same one: what awaits its next start still does afterwards. A VM that doesn't run is
    `vm.wrong_state`. After a crash of the agent a repeated call may reboot a guest once more.
    """

    vm_ids: VmIds
    timeout_s: Annotated[float, Field(ge=0, le=600)] = 60.0
    force: bool = False


class ResetVms(WriteCall):
    """Presses the reset button: at once, and without asking the guest. A VM that doesn't run is `vm.wrong_state`."""

    vm_ids: VmIds


class PauseVms(WriteCall):
    """Stops the vCPUs; memory and devices stay as they are. One that is paused already is a success."""

    vm_ids: VmIds


class ResumeVms(WriteCall):
    """Has paused vCPUs run on. A VM that runs is a success; one that is off has to be started."""

    vm_ids: VmIds


class VmSize(Model):
    """The size a VM is to have."""

    vm_id: UUID
    vcpus: Vcpus
    memory_mib: MemoryMib

    _even = field_validator("vcpus")(even_vcpus)


class ResizeVms(WriteCall):
    """Gives VMs another number of vCPUs and amount of memory; those that run as far as they can without a new start.

    A running VM grows at once within its maxima. It gives vCPUs back if its guest lets go of them within `timeout_s`.
    Everything else takes effect at its next start, which then happens with the new size: `VmResult.resized` says which.
    What that start will need is held from now on, so that it can't be refused then; what the VM still has is held until
    it is gone. A VM that is off has its new size at once.

    Refused are, and nothing is changed: `host.no_capacity` (resource, wanted, free), `vm.exceeds_socket`,
    `request.invalid` for memory that is not made of whole pages of the VM's own size, `vm.wrong_state` for a VM that is
    neither running nor off, or was not made by PPEC, and `vm.not_found`.
    """

    sizes: Annotated[tuple[VmSize, ...], Field(min_length=1, max_length=MAX_VMS_PER_CALL)]
    timeout_s: Annotated[float, Field(ge=0, le=600)] = 10.0


class FreezeVms(WriteCall):
    """Has the guest's agent flush and freeze its file systems, for a copy of the disks that is whole.

    The host thaws them by itself after `thaw_after_s`, whatever becomes of the caller, and of its own agent: a
    restarted one goes on counting. Freezing again counts anew and is a success that changed nothing.
    """

    vm_ids: VmIds
    thaw_after_s: Annotated[float, Field(ge=1, le=MAX_FROZEN_S)] = 60.0


class ThawVms(WriteCall):
    """Ends a freeze. A VM that is not frozen, or is off, is a success that changed nothing."""

    vm_ids: VmIds


class ListVms(Model):
    """All VMs, or those named; ids the host doesn't know are simply absent from the answer."""

    vm_ids: Annotated[tuple[UUID, ...], Field(max_length=MAX_VMS_PER_CALL)] = ()


class GetReport(Model):
    """The host's full report."""


class GetVersion(Model):
    """Who answers, and what it can do."""


class Stage(StrEnum):
    """The stages of a change on a host; those of a create in the order it goes through them."""

    ADMITTED = "admitted"
    IMAGE = "image"
    DISK = "disk"
    SEED = "seed"
    DEFINE = "define"
    START = "start"
    STOP = "stop"
    RESIZE = "resize"
    REBOOT = "reboot"
    RESET = "reset"
    PAUSE = "pause"
    RESUME = "resume"
    FREEZE = "freeze"
    THAW = "thaw"
    RESEAT = "reseat"
    UNDEFINE = "undefine"
    CLEANUP = "cleanup"
    DONE = "done"


class VmProgress(Model):
    """A VM entered a stage; `elapsed_ms` counts from the moment the agent accepted the call."""

    vm_id: UUID
    name: str
    stage: Stage
    elapsed_ms: int


class Effect(StrEnum):
    """When a part of a resize takes effect."""

    UNCHANGED = "unchanged"
    NOW = "now"
    NEXT_START = "next_start"


class Resized(Model):
    """Which part of a new size the VM has already."""

    vcpus: Effect
    memory_mib: Effect


class VmResult(Model):
    """How it ended for one VM: a problem, or the VM as it is now (None once deleted). `RetuneHost` tells both.

    `stage_ms` is the time spent in each stage. `replayed` says the answer came from the journal. `resized` is there
    after a resize. `observed_at` is later than the look at `vm`, or at the place where it was; a replayed answer keeps
    its first. A report whose snapshot began after it knows more, one whose snapshot began before may know less.
    """

    vm_id: UUID
    name: str
    changed: bool
    vm: VmInfo | None = None
    problem: Problem | None = None
    stage_ms: dict[Stage, int] = Field(default_factory=dict)
    replayed: bool = False
    resized: Resized | None = None
    observed_at: Moment | None = None


class VmsReply(Model):
    """Reply of a changing call.

    With `more`, a reply that continues carries one progress, or the result of a VM just finished. The last reply (the
    only one without `more`) carries every VM's result, in the order of the request.
    """

    progress: VmProgress | None = None
    results: tuple[VmResult, ...] = ()


class ListVmsReply(Model):
    vms: tuple[VmInfo, ...]


class PlanRetuneReply(Model):
    plan: RetunePlan


class GetReportReply(Model):
    report: HostReport


class GetVersionReply(Model):
    host: str
    agent_version: str
    api_version: int
    capabilities: tuple[str, ...]


# The methods that change something, by name: what runs carry and the journal keeps.
ChangingAction = Literal[
    "CreateVms",
    "DeleteVms",
    "StartVms",
    "StopVms",
    "ResizeVms",
    "RebootVms",
    "ResetVms",
    "PauseVms",
    "ResumeVms",
    "FreezeVms",
    "ThawVms",
    "RetuneHost",
]


@dataclass(frozen=True, slots=True)
class Method:
    """One method: its parameters, its reply, whether it changes anything and whether it streams.

    What `changes` carries an operation id and may be repeated. `once` is for what has none and must not be: the call is
    made on a connection known to live. The replies of one that `follows` go on until the caller leaves.
    """

    name: str
    request: type[Model]
    reply: type[Model]
    changes: bool
    streams: bool
    once: bool = False
    follows: bool = False

    @property
    def varlink_name(self) -> str:
        return f"{INTERFACE}.{self.name}"

    @property
    def http_path(self) -> str:
        return f"/v1/agent/{self.name}"


METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        Method("CreateVms", CreateVms, VmsReply, changes=True, streams=True),
        Method("DeleteVms", DeleteVms, VmsReply, changes=True, streams=True),
        Method("StartVms", StartVms, VmsReply, changes=True, streams=True),
        Method("StopVms", StopVms, VmsReply, changes=True, streams=True),
        Method("ResizeVms", ResizeVms, VmsReply, changes=True, streams=True),
        Method("RetuneHost", RetuneHost, VmsReply, changes=True, streams=True),
        Method("PlanRetune", PlanRetune, PlanRetuneReply, changes=False, streams=False),
        Method("RebootVms", RebootVms, VmsReply, changes=True, streams=True),
        Method("ResetVms", ResetVms, VmsReply, changes=True, streams=True),
        Method("PauseVms", PauseVms, VmsReply, changes=True, streams=True),
        Method("ResumeVms", ResumeVms, VmsReply, changes=True, streams=True),
        Method("FreezeVms", FreezeVms, VmsReply, changes=True, streams=True),
        Method("ThawVms", ThawVms, VmsReply, changes=True, streams=True),
        Method("QueryGuests", QueryGuests, QueryGuestsReply, changes=False, streams=False),
        Method("ReadConsole", ReadConsole, ReadConsoleReply, changes=False, streams=True, follows=True),
        Method("WriteConsole", WriteConsole, WriteConsoleReply, changes=False, streams=False, once=True),
        Method("ListVms", ListVms, ListVmsReply, changes=False, streams=False),
        Method("GetReport", GetReport, GetReportReply, changes=False, streams=False),
        Method("GetVersion", GetVersion, GetVersionReply, changes=False, streams=False),
    )
}
