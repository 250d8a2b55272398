# SPDX-License-Identifier: Apache-2.0
"""The engine's view of dispatch: a run is started or found again, tells events, ends with a result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ppec_contract.run import PlanAction, RunEvent, RunResult


@dataclass(frozen=True, slots=True)
class HostTarget:
    """One host of a run: where its proxy is and the parameters of the agent method there."""

    address: str
    port: int
    parameters: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RunRequest:
    """What a run is to do. Repeating it is safe: agents answer a known operation id from their journal."""

    operation_id: str
    fence: int
    action: PlanAction
    hosts: Mapping[str, HostTarget]
    timeout_s: float = 300.0


class Run(Protocol):
    """A run under way or ended."""

    @property
    def number(self) -> int:
        """The how-manieth run of its operation this is."""

    @property
    def action(self) -> PlanAction: ...

    @property
    def vm_ids(self) -> Mapping[str, frozenset[str]]:
        """Of each host of the run, the VMs its call is about."""

    @property
    def result(self) -> RunResult | None:
        """None until the run has ended; a run that died without a result gives `run.lost`."""

    def wait(self, timeout_s: float) -> Sequence[RunEvent]:
        """The events since the last call, waiting for one or for the end. From the first event on; doubles happen."""

    def cancel(self) -> None:
        """Asks the run to end now; its result then says so. Harmless when it has ended."""


class Dispatcher(Protocol):
    """Starts runs. A run belongs to an operation and outlives the process that started it."""

    def start(self, request: RunRequest) -> Run: ...

    def adopt(self, operation_id: str) -> Run | None:
        """The operation's latest run if this machine knows one: under way, ended, or lost."""

    def forget(self, operation_id: str) -> None:
        """The operation has ended: what its runs left behind may go."""


def vm_ids_in(parameters: Mapping[str, Any]) -> frozenset[str]:
    """The VMs that a call with these parameters is about; none of a call that is about its host."""
    for name in ("vms", "sizes"):
        if name in parameters:
            return frozenset(str(vm["vm_id"]) for vm in parameters[name])
    if "plan" in parameters:
        return frozenset(str(move["vm_id"]) for move in parameters["plan"]["moves"])
    return frozenset(str(vm_id) for vm_id in parameters.get("vm_ids", ()))
