# SPDX-License-Identifier: Apache-2.0
"""What an Ansible run is given and what it gives back: files in the run's own directory.

The run gets the *path* of a plan file, never tenant text as variables: text passed as variables is rendered as a
template. The action plugin reads the plan itself, calls each host and appends one JSON line per event.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ppec_contract.agent import VmProgress, VmResult
from ppec_contract.errors import Problem
from ppec_contract.model import HostName, Model, OperationId

PlanAction = Literal["CreateVms", "DeleteVms", "StartVms", "StopVms"]


class HostCall(Model):
    """One host's part: where its proxy is, whom to expect there, and the parameters of the agent method."""

    address: str
    port: int
    parameters: dict[str, Any]


class RunPlan(Model):
    """`plan.json`. `events_path` is where the events go; certificates are paths readable by the run."""

    operation_id: OperationId
    fence: int
    action: PlanAction
    hosts: dict[HostName, HostCall]
    events_path: str
    ca_path: str
    certificate_path: str
    key_path: str
    timeout_s: float = 300.0


class RunEvent(Model):
    """One line of `events.jsonl`. Exactly one of the four is set; `problem` means the whole host failed.

    `accepted` says the agent has the request (its first answer arrived).
    """

    host: HostName
    at_unix_ms: int
    accepted: bool = False
    progress: VmProgress | None = None
    result: VmResult | None = None
    problem: Problem | None = None


class RunResult(Model):
    """`result.json`, written by rename when the run has ended. `counters` are the run's own work counts."""

    status: Literal["successful", "failed", "canceled", "timeout"]
    return_code: int
    problem: Problem | None = None
    counters: dict[str, int] = Field(default_factory=dict)
