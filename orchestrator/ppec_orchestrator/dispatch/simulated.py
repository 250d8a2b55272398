# SPDX-License-Identifier: Apache-2.0
"""A fleet in memory and a dispatcher onto it: for simulations, and for everything about operations but Ansible.

Simulated hosts keep the agent's promises: a repeated call is answered from the journal, a lower fence is refused, an
absent VM is deleted successfully. Faults are injected by a script; a fault may strike before or after the deed.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any
from uuid import UUID

from ppec_contract.agent import Effect, PlanRetune, PlanRetuneReply, Resized, Stage, VmProgress, VmResult, VmSize
from ppec_contract.errors import PpecError, Problem
from ppec_contract.retune import RetunePlan
from ppec_contract.run import PlanAction, RunEvent, RunResult
from ppec_contract.vm import Moment, Size, VmInfo, VmSpec, VmState
from ppec_orchestrator.dispatch.port import HostTarget, RunRequest, vm_ids_in
from ppec_orchestrator.dispatch.simulated_retune import carried_out, planned, refuse_overfull
from ppec_orchestrator.dispatch.simulated_storage import drives_for, refuse_without_room


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong with a call for one VM. `whole_host`: the host gives no result at all. `done`: but it did it.
    `told`: the result says what the VM is now."""

    problem: Problem
    whole_host: bool = False
    done: bool = False
    told: bool = False

    @classmethod
    def of(cls, code: str, *, whole_host: bool = False, done: bool = False, told: bool = False) -> Fault:
        return cls(PpecError(code, f"simulated {code}").problem(), whole_host, done, told)


# Of an action, a host and a VM.
FaultScript = Callable[[PlanAction, str, UUID], Fault | None]


# The power state after an action, the states it is possible in, and the actions that do something each time.
_POWER: dict[PlanAction, VmState] = {
    "StartVms": VmState.RUNNING,
    "StopVms": VmState.STOPPED,
    "RebootVms": VmState.RUNNING,
    "ResetVms": VmState.RUNNING,
    "PauseVms": VmState.PAUSED,
    "ResumeVms": VmState.RUNNING,
}
_POSSIBLE_IN: dict[PlanAction, tuple[VmState, ...]] = {
    "RebootVms": (VmState.RUNNING,),
    "ResetVms": (VmState.RUNNING,),
    "PauseVms": (VmState.RUNNING, VmState.PAUSED),
    "ResumeVms": (VmState.RUNNING, VmState.PAUSED),
    "FreezeVms": (VmState.RUNNING,),
    "ThawVms": (VmState.RUNNING, VmState.STOPPED),
}
_AGAIN: tuple[PlanAction, ...] = ("RebootVms", "ResetVms")
_ENDING_A_FREEZE: tuple[PlanAction, ...] = ("StopVms", *_AGAIN)


def no_faults(action: PlanAction, host: str, vm_id: UUID) -> Fault | None:
    return None


class SimulatedFleet:
    """The hosts' own state: which VM is where, what was answered before, the highest fence seen."""

    def __init__(self) -> None:
        self.vms: dict[str, dict[UUID, VmInfo]] = defaultdict(dict)
        # The guests whose file systems are frozen; nothing here thaws them by itself.
        self.frozen: set[UUID] = set()
        # How many NUMA cells each host has; only retunes look at it.
        self.cells = 2
        # How many cores each cell has; None: as many as are wanted. Nobody but creates and retunes looks at it.
        self.cell_cores: int | None = None
        # How many NVMe drives are near each cell, and how large each host's storage pools are; None: as many and as
        # large as are wanted.
        self.cell_drives: int | None = None
        self.pools_mib: Mapping[str, int] | None = None
        self.faults: FaultScript = no_faults
        # (action, host, VM) of every deed that was really done, journal answers left out.
        self.deeds: list[tuple[str, str, UUID]] = []
        self._journal: dict[tuple[str, str, str, UUID], VmResult] = {}
        self._retunes: set[tuple[str, str, str]] = set()
        self._fences: dict[tuple[str, str], int] = {}
        # All hosts share one agent's moments, which is one more order than they need.
        self.started_at_unix_ms = _now_ms()
        self._ticks = count(1)
        self._lock = threading.Lock()

    def everywhere(self) -> list[UUID]:
        """The id of every VM on every host; one that is on two hosts is there twice."""
        with self._lock:
            return [vm_id for host in self.vms.values() for vm_id in host]

    def call(self, request: RunRequest, host: str, target: HostTarget) -> list[RunEvent]:
        """One host's part of a run, as the events it makes."""
        with self._lock:
            seen = self._fences.get((host, request.operation_id), 0)
            if request.fence < seen:
                return [_problem(host, "operation.fenced")]
            self._fences[host, request.operation_id] = request.fence
            events = [RunEvent(host=host, at_unix_ms=_now_ms(), accepted=True)]
            if request.action == "PlanRetune":
                return [*events, self._plan(host, target.parameters)]
            if request.action == "RetuneHost":
                return events + self._retune(request, host, RetunePlan.model_validate(target.parameters["plan"]))
            for vm_id, name, what in _subjects(target.parameters):
                fault = self.faults(request.action, host, vm_id)
                if fault is None or fault.done:
                    result = self._do(request, host, vm_id, name, what)
                if fault is None:
                    events += _told(host, result)
                elif fault.whole_host:
                    return [*events, RunEvent(host=host, at_unix_ms=_now_ms(), problem=fault.problem)]
                else:
                    failed = VmResult(vm_id=vm_id, name=name, changed=False, problem=fault.problem)
                    if fault.told:
                        now = self.vms[host].get(vm_id)
                        failed = failed.model_copy(update={"vm": now, "observed_at": self.moment()})
                    events.append(RunEvent(host=host, at_unix_ms=_now_ms(), result=failed))
            return events

    def _plan(self, host: str, parameters: Mapping[str, Any]) -> RunEvent:
        fault = self.faults("PlanRetune", host, UUID(int=0))
        try:
            if fault is not None:
                raise fault.problem.error()
            plan = planned(self.vms[host].values(), PlanRetune.model_validate(parameters), self.cells, self.cell_cores)
        except PpecError as error:
            return RunEvent(host=host, at_unix_ms=_now_ms(), problem=error.problem())
        view = PlanRetuneReply(plan=plan).model_dump(mode="json")
        return RunEvent(host=host, at_unix_ms=_now_ms(), view=view)

    def _retune(self, request: RunRequest, host: str, plan: RetunePlan) -> list[RunEvent]:
        """A fault for any of the VMs breaks the whole off. What was `done` by then stays: those before and this one."""
        mine = self.vms[host]
        problem: Problem | None = None
        # A plan that the operation has had carried out is answered from the journal, wherever its VMs are now.
        key = (host, request.operation_id, plan.digest())
        if key in self._retunes:
            return self._retuned(host, plan, None)
        try:
            after = carried_out(mine, plan, self.cell_cores)
        except PpecError as error:
            after, problem = {}, error.problem()
        for vm_id, vm in after.items():
            fault = self.faults("RetuneHost", host, vm_id)
            if fault is not None and not fault.done:
                problem = fault.problem
                break
            if mine[vm_id] != vm:
                self.deeds.append(("RetuneHost", host, vm_id))
                mine[vm_id] = vm
            if fault is not None and fault.whole_host:
                return [RunEvent(host=host, at_unix_ms=_now_ms(), problem=fault.problem)]
            problem = fault.problem if fault is not None else problem
            if problem is not None:
                break
        if problem is None:
            self._retunes.add(key)
        return self._retuned(host, plan, problem)

    def _retuned(self, host: str, plan: RetunePlan, problem: Problem | None) -> list[RunEvent]:
        results = [
            VmResult(
                vm_id=move.vm_id,
                name=move.name,
                changed=problem is None,
                problem=problem,
                vm=self.vms[host].get(move.vm_id),
                stage_ms={Stage.RESEAT: 1},
                observed_at=self.moment(),
            )
            for move in plan.moves
        ]
        return [event for result in results for event in _told(host, result)]

    def _do(self, request: RunRequest, host: str, vm_id: UUID, name: str, what: VmSpec | VmSize | None) -> VmResult:
        key = (request.operation_id, request.action, host, vm_id)
        if key in self._journal:
            return self._journal[key].model_copy(update={"replayed": True})
        result = self._change(request.action, host, vm_id, name, what)
        self._journal[key] = result
        if result.changed:
            self.deeds.append((request.action, host, vm_id))
        return result

    def _change(self, action: PlanAction, host: str, vm_id: UUID, name: str, what: VmSpec | VmSize | None) -> VmResult:
        mine = self.vms[host]
        if isinstance(what, VmSize) and vm_id in mine:
            return self._resize(mine, what)
        if action == "DeleteVms":
            changed = mine.pop(vm_id, None) is not None
            self.frozen.discard(vm_id)
            return VmResult(vm_id=vm_id, name=name, changed=changed, observed_at=self.moment())
        if action == "CreateVms":
            try:
                mine[vm_id] = self._made(host, vm_id, name, what)
            except PpecError as error:
                return VmResult(vm_id=vm_id, name=name, changed=False, problem=error.problem())
            changed = True
        elif vm_id not in mine:
            problem = PpecError("vm.not_found", f"vm {vm_id} is not on host {host}").problem()
            return VmResult(vm_id=vm_id, name=name, changed=False, problem=problem)
        elif mine[vm_id].state not in _POSSIBLE_IN.get(action, tuple(VmState)):
            problem = PpecError("vm.wrong_state", f"vm {name} is {mine[vm_id].state}").problem()
            return VmResult(vm_id=vm_id, name=name, changed=False, problem=problem)
        else:
            changed = self._switch(action, mine, vm_id)
        return VmResult(
            vm_id=vm_id,
            name=name,
            changed=changed,
            vm=mine[vm_id],
            stage_ms={Stage.DEFINE: 1},
            observed_at=self.moment(),
        )

    def _made(self, host: str, vm_id: UUID, name: str, what: VmSpec | VmSize | None) -> VmInfo:
        mine = self.vms[host]
        if vm_id in mine or not isinstance(what, VmSpec):
            raise PpecError("vm.exists", f"vm {name} is on host {host}")
        refuse_without_room(mine.values(), what, self.pools_mib)
        made = _info(what, drives_for(mine.values(), what, self.cell_drives))
        refuse_overfull([*mine.values(), made], self.cell_cores, "host.no_capacity")
        return made

    def _switch(self, action: PlanAction, mine: dict[UUID, VmInfo], vm_id: UUID) -> bool:
        """Whether that did anything."""
        if action not in _POWER:
            before = vm_id in self.frozen
            (self.frozen.add if action == "FreezeVms" else self.frozen.discard)(vm_id)
            return before is not (vm_id in self.frozen)
        if action in _ENDING_A_FREEZE:
            self.frozen.discard(vm_id)
        changed = mine[vm_id].state is not _POWER[action] or action in _AGAIN
        mine[vm_id] = _switched(mine[vm_id], _POWER[action])
        return changed

    def _resize(self, mine: dict[UUID, VmInfo], size: VmSize) -> VmResult:
        """A running VM grows at once, and gives nothing back before its next start."""
        before = mine[size.vm_id]
        wanted = Size(vcpus=size.vcpus, memory_mib=size.memory_mib)
        now = wanted
        if before.state is not VmState.STOPPED:
            now = Size(vcpus=max(before.vcpus, size.vcpus), memory_mib=max(before.memory_mib, size.memory_mib))
        after = before.model_copy(update={**dict(now), "pending": None if now == wanted else wanted})
        mine[size.vm_id] = after
        later = before.pending or before
        effects = {
            name: _effect((getattr(before, name), getattr(later, name)), getattr(now, name), getattr(wanted, name))
            for name in ("vcpus", "memory_mib")
        }
        return VmResult(
            vm_id=size.vm_id,
            name=after.name,
            changed=after != before,
            vm=after,
            resized=Resized(**effects),
            stage_ms={Stage.RESIZE: 1},
            observed_at=self.moment(),
        )

    def moment(self) -> Moment:
        """The next one."""
        return Moment(agent_started_at_unix_ms=self.started_at_unix_ms, tick=next(self._ticks))


class _Record:
    """One run's history; any number of followers read it."""

    def __init__(self, number: int, request: RunRequest) -> None:
        self.number = number
        self.request = request
        self.left = sorted(request.hosts)
        self.events: list[RunEvent] = []
        self.result: RunResult | None = None
        self.cancelled = False
        self.lock = threading.Lock()


class SimulatedRun:
    """Implements `port.Run`. The run advances by one host with every look at it."""

    def __init__(self, fleet: SimulatedFleet, record: _Record, gate: threading.Event) -> None:
        self._fleet = fleet
        self._record = record
        self._gate = gate
        self._read = 0
        self._result: RunResult | None = None

    @property
    def number(self) -> int:
        return self._record.number

    @property
    def action(self) -> PlanAction:
        return self._record.request.action

    @property
    def vm_ids(self) -> Mapping[str, frozenset[str]]:
        return {host: vm_ids_in(target.parameters) for host, target in self._record.request.hosts.items()}

    @property
    def result(self) -> RunResult | None:
        return self._result

    def wait(self, timeout_s: float) -> Sequence[RunEvent]:
        record = self._record
        if not record.cancelled and not self._gate.wait(min(timeout_s, 0.02)):
            return ()
        with record.lock:
            if record.result is None:
                self._advance(record)
            new, self._read = record.events[self._read :], len(record.events)
            self._result = record.result
        return new

    def _advance(self, record: _Record) -> None:
        if record.cancelled:
            record.result = RunResult(status="canceled", return_code=254)
            return
        if record.left:
            host = record.left.pop(0)
            record.events += self._fleet.call(record.request, host, record.request.hosts[host])
        if not record.left:
            hosts = len(record.request.hosts)
            counters = {"host_tasks": hosts, "proxy_sessions": hosts}
            record.result = RunResult(status="successful", return_code=0, counters=counters)

    def cancel(self) -> None:
        self._record.cancelled = True


class SimulatedDispatcher:
    """Implements `port.Dispatcher`. Several may share a fleet: replicas on machines of their own.

    Runs stand still while `gate` is cleared; those of an action with a gate of its own in `gates` while that is.
    """

    def __init__(self, fleet: SimulatedFleet) -> None:
        self.fleet = fleet
        self.gate = threading.Event()
        self.gate.set()
        self.gates: dict[PlanAction, threading.Event] = {}
        self.started: list[RunRequest] = []
        self._runs: dict[str, list[_Record]] = defaultdict(list)
        self._forgotten: set[int] = set()

    def start(self, request: RunRequest) -> SimulatedRun:
        runs = self._runs[request.operation_id]
        record = _Record(len(runs) + 1, request)
        runs.append(record)
        self.started.append(request)
        return SimulatedRun(self.fleet, record, self._gate_of(record))

    def _gate_of(self, record: _Record) -> threading.Event:
        return self.gates.get(record.request.action, self.gate)

    def adopt(self, operation_id: str) -> SimulatedRun | None:
        known = [r for r in self._runs.get(operation_id, ()) if id(r) not in self._forgotten]
        return SimulatedRun(self.fleet, known[-1], self._gate_of(known[-1])) if known else None

    def forget(self, operation_id: str) -> None:
        self._forgotten |= {id(record) for record in self._runs.get(operation_id, ())}

    def lose(self, operation_id: str) -> None:
        """The run's process dies without a result."""
        record = self._runs[operation_id][-1]
        with record.lock:
            problem = PpecError("run.lost", "simulated loss").problem()
            record.result = RunResult(status="failed", return_code=-1, problem=problem)


def _subjects(parameters: Mapping[str, Any]) -> Iterable[tuple[UUID, str, VmSpec | VmSize | None]]:
    for raw in parameters.get("vms", ()):
        spec = VmSpec.model_validate(raw)
        yield spec.vm_id, spec.name, spec
    for raw in parameters.get("sizes", ()):
        size = VmSize.model_validate(raw)
        yield size.vm_id, "", size
    for vm_id in parameters.get("vm_ids", ()):
        yield UUID(str(vm_id)), "", None


def _effect(before: tuple[int, int], now: int, wanted: int) -> Effect:
    if before == (wanted, wanted):
        return Effect.UNCHANGED
    return Effect.NOW if now == wanted else Effect.NEXT_START


def _switched(vm: VmInfo, state: VmState) -> VmInfo:
    """Off, it has the size it is to have."""
    size = dict(vm.pending) if vm.pending is not None and state is VmState.STOPPED else {}
    return vm.model_copy(update={"state": state, **size, **({"pending": None} if size else {})})


def _info(spec: VmSpec, drives: tuple[str, ...]) -> VmInfo:
    return VmInfo(
        vm_id=spec.vm_id,
        name=spec.name,
        state=VmState.RUNNING,
        managed=True,
        vcpus=spec.vcpus,
        memory_mib=spec.memory_mib,
        cells=spec.cells,
        disk_mib=spec.root_disk.size_mib,
        pool=spec.root_disk.pool or "",
        nvme_drives=drives,
        macs=tuple(nic.mac for nic in spec.nics),
    )


def _told(host: str, result: VmResult) -> list[RunEvent]:
    progress = VmProgress(vm_id=result.vm_id, name=result.name, stage=Stage.DEFINE, elapsed_ms=1)
    return [
        RunEvent(host=host, at_unix_ms=_now_ms(), progress=progress),
        RunEvent(host=host, at_unix_ms=_now_ms(), result=result),
    ]


def _problem(host: str, code: str) -> RunEvent:
    return RunEvent(host=host, at_unix_ms=_now_ms(), problem=PpecError(code, f"simulated {code}").problem())


def _now_ms() -> int:
    return int(time.time() * 1000)
