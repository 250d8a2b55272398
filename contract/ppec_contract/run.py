# SPDX-License-Identifier: Apache-2.0
"""What an Ansible run is given and what it gives back: files in the run's own directory.

The run gets the *path* of a plan file, never tenant text as variables: text passed as variables is rendered as a
template. Each host's call is a file of its own beside the plan, so that what the worker of one host reads does not grow
with the VMs of the others. The action plugin reads that file, makes the call and appends one JSON line per event.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ppec_contract.agent import ChangingAction, VmProgress, VmResult
from ppec_contract.errors import Problem
from ppec_contract.model import HostName, Model, OperationId

# A view changes nothing, and its reply comes back whole.
PlanAction = Literal[ChangingAction, "PlanRetune"]


class RunTerms(Model):
    """What all calls of a run share. `events_path` is where the events go; certificates are paths the run can read."""

    operation_id: OperationId
    fence: int
    action: PlanAction
    events_path: str
    ca_path: str
    certificate_path: str
    key_path: str
    timeout_s: float = 300.0


class HostCall(Model):
    """`calls/<host>.json`, all that a host's worker reads: where the proxy is, and the agent method's parameters."""

    run: RunTerms
    address: str
    port: int
    parameters: dict[str, Any]


class RunPlan(Model):
    """`plan.json`, all that whoever follows the run reads: the ids of each host's VMs, and nothing of a tenant's."""

    run: RunTerms
    hosts: dict[HostName, frozenset[str]]


class RunEvent(Model):
    """One line of `events.jsonl`. Exactly one of the five is set; `problem` means the whole host failed.

    `accepted` says the agent has the request (its first answer arrived). `view` is the reply of a view, as it came:
    whoever reads it validates it.
    """

    host: HostName
    at_unix_ms: int
    accepted: bool = False
    progress: VmProgress | None = None
    result: VmResult | None = None
    problem: Problem | None = None
    view: dict[str, Any] | None = None


class RunResult(Model):
    """`result.json`, written by rename when the run has ended. `counters` are the run's own work counts."""

    status: Literal["successful", "failed", "canceled", "timeout"]
    return_code: int
    problem: Problem | None = None
    counters: dict[str, int] = Field(default_factory=dict)
