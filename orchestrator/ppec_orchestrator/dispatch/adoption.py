# SPDX-License-Identifier: Apache-2.0
"""A run as the orchestrator follows it, started by itself or by a process that is dead.

The run's directory is all there is: the lock says whether its job lives, `events.jsonl` is read from the first line
on, `result.json` says how it ended. A free lock without a result means the job died: the run is lost, and repeating
it under the same operation id is safe because the agents answer from their journals.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from ppec_contract.errors import PpecError
from ppec_contract.run import PlanAction, RunEvent, RunPlan, RunResult
from ppec_orchestrator.dispatch.rundir import GRACE_S, EventTail, RunDirectory

# A finished VM shows within this time; looking costs a few microseconds.
_LOOK_S = 0.01
_LOOK_LONG_S = 0.05
_CALM_AFTER_S = 30.0
_LIVENESS_EVERY_S = 0.25


class FollowedRun:
    """Implements `port.Run` on a directory."""

    def __init__(self, directory: RunDirectory, plan: RunPlan) -> None:
        self.directory = directory
        self._plan = plan
        self._tail = EventTail(directory.events_path)
        self._result: RunResult | None = None
        self._looked_alive = 0.0
        self._last_event = time.monotonic()
        self._give_up_s = time.monotonic() + plan.run.timeout_s + 2 * GRACE_S

    @property
    def number(self) -> int:
        return self.directory.number

    @property
    def action(self) -> PlanAction:
        return self._plan.run.action

    @property
    def vm_ids(self) -> Mapping[str, frozenset[str]]:
        return self._plan.hosts

    @property
    def result(self) -> RunResult | None:
        return self._result

    def wait(self, timeout_s: float) -> Sequence[RunEvent]:
        deadline = time.monotonic() + timeout_s
        while True:
            # The result first: events written before it are then read for certain.
            ended = self._ended()
            events = self._tail.read()
            now = time.monotonic()
            if events:
                self._last_event = now
            if ended is not None:
                self._result = ended
            if events or ended is not None or now >= deadline:
                return events
            calm = now - self._last_event > _CALM_AFTER_S
            time.sleep(min(_LOOK_LONG_S if calm else _LOOK_S, deadline - now))

    def cancel(self) -> None:
        self.directory.request_cancel()

    def _ended(self) -> RunResult | None:
        result = self.directory.result()
        if result is not None:
            return result
        now = time.monotonic()
        if now - self._looked_alive < _LIVENESS_EVERY_S:
            return None
        self._looked_alive = now
        # The job ends itself before; one that is stopped, or hangs, does not. Two at once do no harm: agents answer the
        # second from their journals.
        if self.directory.is_live() and now < self._give_up_s:
            return None
        # It may have written its result between the two looks.
        return self.directory.result() or _lost(self.directory)


def _lost(directory: RunDirectory) -> RunResult:
    problem = PpecError(
        "run.lost",
        f"the process of run {directory.name} is gone, or hangs, and left no result",
        hint=f"What it said last is in {directory.path}.",
        subject=f"run {directory.name}",
    ).problem()
    return RunResult(status="failed", return_code=-1, problem=problem)


def adopt(runs: Sequence[RunDirectory]) -> FollowedRun | None:
    """The latest of an operation's runs, or None when none ever got as far as having a plan."""
    for directory in reversed(runs):
        plan = directory.plan()
        if plan is not None:
            return FollowedRun(directory, plan)
    return None
