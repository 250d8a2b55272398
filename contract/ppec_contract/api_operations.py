# SPDX-License-Identifier: Apache-2.0
"""The REST resources of operations: what is under way or has ended, in which steps, and what became of each VM."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Literal
from uuid import UUID

from pydantic import Field

from ppec_contract.agent import Resized, Stage
from ppec_contract.api_hosts import HostRetune
from ppec_contract.api_placement import ExposedView
from ppec_contract.errors import Problem
from ppec_contract.model import HostName, Model, Sha256
from ppec_contract.retune import RetunePlan


class OperationState(StrEnum):
    """`partial`: a batch not all or nothing, of which some VMs did not work out; each says why."""

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
    """`retune` is there of a retune alone. `plan_id` is the plan that it carries out as it was shown, `approved_by` who
    had approved that. `exposed` is what a create's N+1 warned of when it was accepted."""

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
    plan_id: Sha256 | None = None
    approved_by: str | None = None
    exposed: tuple[ExposedView, ...] = ()
