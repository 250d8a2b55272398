# SPDX-License-Identifier: Apache-2.0
"""Carries one agent method to the hosts of some VMs in one run, and records what came back, host by host.

A host's results are committed once, when its last VM has one: at most one commit per host, and hosts that finish
together share it. The run found under way after a restart is followed in place of a new one.
"""

from __future__ import annotations

import errno
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any
from uuid import UUID

import structlog
from sqlalchemy import Connection

from ppec_contract.agent import VmResult
from ppec_contract.errors import PpecError, Problem
from ppec_contract.model import MAX_VMS_PER_CALL
from ppec_contract.run import PlanAction, RunEvent
from ppec_orchestrator.dispatch.port import HostTarget, Run, RunRequest
from ppec_orchestrator.operations.bounds import bounded
from ppec_orchestrator.operations.context import Context, cancelled
from ppec_orchestrator.operations.steps import StepFailedError
from ppec_orchestrator.store import vms

_log = structlog.get_logger(__name__)
_LOOK_S = 0.5
# In place of a VM where a call is about its host; no VM has this id.
WHOLE_HOST = UUID(int=0)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How it went for one VM on one host: the host's own result, or the problem that kept it from giving one.

    `view` is what the host answered to a question about itself.
    """

    vm_id: UUID
    name: str
    host: str
    result: VmResult | None
    problem: Problem | None
    view: Mapping[str, Any] | None = None


# Writes the outcomes of complete hosts. Without one nothing is committed on the way.
Record = Callable[[Connection, Sequence[Outcome]], None]


@dataclass(frozen=True)
class Call:
    """One agent method for some VMs, each on its host. `parameters` makes a host's parameters of its VMs' ids.

    `patience_s` is how long the method may wait for guests by itself, over the time a host has for its work. A call
    that `adopts` is answered by the operation's latest run, if that is about the same VMs, or hosts.
    """

    action: PlanAction
    targets: Mapping[UUID, str]
    names: Mapping[UUID, str]
    parameters: Callable[[Connection, Mapping[str, Sequence[UUID]]], Mapping[str, Mapping[str, Any]]]
    record: Record | None = None
    patience_s: float = 0.0
    adopts: bool = True


def by_ids(**more: Any) -> Callable[[Connection, Mapping[str, Sequence[UUID]]], Mapping[str, Mapping[str, Any]]]:
    """The parameters of a method that takes ids, and `more` that is the same on every host."""

    def parameters(conn: Connection, hosts: Mapping[str, Sequence[UUID]]) -> dict[str, dict[str, Any]]:
        return {host: {"vm_ids": [str(i) for i in ids], **more} for host, ids in hosts.items()}

    return parameters


@dataclass
class _Progress:
    """Which VMs still lack an outcome, per host."""

    call: Call
    left: dict[str, set[UUID]] = field(default_factory=lambda: defaultdict(set))
    gathered: dict[str, list[Outcome]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        for vm_id, host in self.call.targets.items():
            self.left[host].add(vm_id)

    @property
    def complete(self) -> bool:
        return not any(self.left.values())

    @property
    def open_hosts(self) -> list[str]:
        return [host for host, ids in self.left.items() if ids]

    def add(self, event: RunEvent) -> None:
        """A VM's first outcome counts: an adopted run tells its events again from the beginning."""
        if event.result is not None:
            told = event.result.problem
            # First of all, for a failure may come with what the VM is now.
            problem = _about_another(event.host, event.result) or (bounded(told) if told is not None else None)
            self._settle(event.host, event.result.vm_id, event.result, problem)
        elif event.view is not None:
            self._settle(event.host, WHOLE_HOST, None, None, event.view)
        elif event.problem is not None:
            for vm_id in tuple(self.left.get(event.host, ())):
                self._settle(event.host, vm_id, None, bounded(event.problem))

    def give_up(self, problem: Problem) -> None:
        for host, ids in self.left.items():
            for vm_id in tuple(ids):
                self._settle(host, vm_id, None, problem)

    def _settle(
        self,
        host: str,
        vm_id: UUID,
        result: VmResult | None,
        problem: Problem | None,
        view: Mapping[str, Any] | None = None,
    ) -> None:
        if vm_id in self.left.get(host, ()):
            self.left[host].discard(vm_id)
            self.gathered[host].append(Outcome(vm_id, self.call.names[vm_id], host, result, problem, view))

    def finished_hosts(self) -> list[Outcome]:
        """The outcomes of hosts that are complete and were not handed out yet."""
        done = [host for host in self.gathered if not self.left[host]]
        return [outcome for host in done for outcome in self.gathered.pop(host)]


def _about_another(host: str, result: VmResult) -> Problem | None:
    """A host may say nothing of a VM but the one it was asked for: what it says goes into the record."""
    if result.vm is None or result.vm.vm_id == result.vm_id:
        return None
    return PpecError(
        "internal.error",
        f"host {host} was asked for VM {result.vm_id} and answered about VM {result.vm.vm_id}",
        hint=f"Don't trust host {host} before that is explained.",
        subject=f"host {host}",
    ).problem()


def ask(
    context: Context, action: PlanAction, host: str, parameters: Mapping[str, Any], *, adopts: bool = True
) -> Mapping[str, Any]:
    """A view's reply. Without `adopts` the host is asked in any case: an earlier answer may be to another question.
    Raises StepFailedError with the host's problem, and what `carry` raises."""
    whole = {WHOLE_HOST: host}
    call = Call(action, whole, whole, lambda conn, hosts: dict.fromkeys(hosts, parameters), adopts=adopts)
    (outcome,) = carry(context, call)
    if outcome.view is None:
        raise StepFailedError(outcome.problem or _silent())
    return outcome.view


def carry(context: Context, call: Call) -> list[Outcome]:
    """Every VM's outcome. Raises `operation.cancelled` once the run has ended, when that is wanted.

    A run that died is repeated, a few times: it may have been killed, and agents don't do a thing twice.
    """
    progress = _Progress(call)
    outcomes: list[Outcome] = []
    run = _adopted(context, call)
    for lost in range(context.limits.lost_runs + 1):
        context.check()
        try:
            run = run or _started(context, call, {host: sorted(ids) for host, ids in progress.left.items() if ids})
        except OSError as error:
            # An outcome like others: what may be on the hosts is remembered, and its addresses are not given away.
            progress.give_up(_not_started(context, error))
            outcomes += _recorded(context, progress)
            break
        if run is not None:
            outcomes += _follow(context, run, progress)
        if progress.complete:
            break
        problem = _ending(run, lost < context.limits.lost_runs) if run else _unknown_hosts(progress.open_hosts)
        if problem is not None:
            progress.give_up(problem)
            outcomes += _recorded(context, progress)
            break
        _log.warning("run.repeated", operation=context.operation_id, lost=lost + 1)
        run = None
    return outcomes


def _adopted(context: Context, call: Call) -> Run | None:
    """The operation's latest run, if it is about these VMs on these hosts."""
    run = context.ports.dispatcher.adopt(context.operation_id) if call.adopts else None
    if run is None or run.action != call.action:
        return None
    known = run.vm_ids
    ours = ((vm_id, known.get(host)) for vm_id, host in call.targets.items())
    if not all(ids is not None and (vm_id == WHOLE_HOST or str(vm_id) in ids) for vm_id, ids in ours):
        return None
    # The process that started it may have died before it could write that down.
    context.journal.count_up_to(runs=run.number)
    _log.info("run.adopted", operation=context.operation_id, action=call.action)
    return run


def _started(context: Context, call: Call, hosts: Mapping[str, Sequence[UUID]]) -> Run | None:
    """None when none of the hosts is registered any more."""
    with context.ports.database.read() as conn:
        endpoints = vms.endpoints(conn, hosts)
        parameters = call.parameters(conn, hosts)
    if not endpoints:
        return None
    # A host with more VMs than a call takes is called several times, one after the other.
    most_calls = max(ceil(len(ids) / MAX_VMS_PER_CALL) for ids in hosts.values())
    request = RunRequest(
        operation_id=context.operation_id,
        fence=context.claimed.fence,
        action=call.action,
        hosts={
            host: HostTarget(endpoints[host].address, endpoints[host].port, parameters[host])
            for host in hosts
            if host in endpoints
        },
        timeout_s=(context.limits.host_timeout_s + call.patience_s) * most_calls,
    )
    context.journal.count(runs=1)
    return context.ports.dispatcher.start(request)


def _not_started(context: Context, error: OSError) -> Problem:
    _log.error("run.not_started", operation=context.operation_id, error=str(error))
    return PpecError(
        "disk.full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "run.failed",
        f"the orchestrator could not start an Ansible run: {error.strerror or error}",
        hint="Look at the file system of the orchestrator's state directory, and at its log.",
        subject=f"operation {context.operation_id}",
    ).problem()


def _unknown_hosts(hosts: Iterable[str]) -> Problem:
    names = ", ".join(sorted(hosts))
    return PpecError("host.not_found", f"host {names} is not registered any more", subject=f"host {names}").problem()


def _follow(context: Context, run: Run, progress: _Progress) -> list[Outcome]:
    """Until the run has ended; commits hosts as they finish."""
    outcomes: list[Outcome] = []
    asked = False
    while True:
        events = run.wait(_LOOK_S)
        ended = run.result
        for event in events:
            progress.add(event)
            if event.progress is not None:
                context.live.entered(context.operation_id, event.progress.vm_id, event.progress.stage)
        if events:
            context.live.announce(context.operation_id)
        if ended is not None:
            context.journal.count(**ended.counters)
        outcomes += _recorded(context, progress)
        if ended is not None:
            break
        if not asked and _stop_wanted(context):
            run.cancel()
            asked = True
    if asked and not progress.complete:
        raise cancelled(context.operation_id)
    return outcomes


def _stop_wanted(context: Context) -> bool:
    try:
        context.check()
    except PpecError:
        return True
    return False


def _recorded(context: Context, progress: _Progress) -> list[Outcome]:
    finished = progress.finished_hosts()
    record = progress.call.record
    if finished and record is not None:
        context.journal.commit(lambda conn: record(conn, finished))
    return finished


def _ending(run: Run, may_repeat: bool) -> Problem | None:
    """What VMs without an outcome get; None when the run is to be repeated."""
    result = run.result
    lost = result is None or (result.problem is not None and result.problem.code == "run.lost")
    if (lost or (result is not None and result.status == "canceled")) and may_repeat:
        return None
    if result is not None and result.problem is not None:
        return result.problem
    return _silent()


def _silent() -> Problem:
    return PpecError(
        "run.failed",
        "the run ended without a word about this VM",
        hint="The run's ansible.log in the orchestrator's state directory has its output.",
    ).problem()
