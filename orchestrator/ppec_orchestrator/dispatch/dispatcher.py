# SPDX-License-Identifier: Apache-2.0
"""The real dispatcher: writes a run's directory, has a job process forked for it, finds runs again."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import structlog

from ppec_contract.run import HostCall, RunPlan, RunTerms
from ppec_orchestrator.dispatch.adoption import FollowedRun, adopt
from ppec_orchestrator.dispatch.demand import MOST_STANDING_BY
from ppec_orchestrator.dispatch.fork_client import ForkClient, start_job_process
from ppec_orchestrator.dispatch.installation import Installation
from ppec_orchestrator.dispatch.job import remove_abandoned
from ppec_orchestrator.dispatch.port import RunRequest, vm_ids_in
from ppec_orchestrator.dispatch.rundir import RunDirectories, RunDirectory

_log = structlog.get_logger(__name__)
_KEEP_RUNS_S = 24 * 3600.0
_PRUNE_EVERY_S = 3600.0


@dataclass(frozen=True, slots=True)
class RunCredentials:
    """Paths of the orchestrator's client certificate, readable by the runs."""

    ca_path: Path
    certificate_path: Path
    key_path: Path


class AnsibleDispatcher:
    """Implements `port.Dispatcher`. `folder` is the orchestrator's state directory."""

    def __init__(
        self,
        folder: Path,
        credentials: RunCredentials,
        *,
        installation: Installation | None = None,
        fork_server: bool = True,
        most_standing: int = MOST_STANDING_BY,
    ) -> None:
        self._runs = RunDirectories(folder / "runs")
        self._credentials = credentials
        self._installation = installation or Installation.prepare(folder / "ansible")
        self._forks = ForkClient(self._installation, most_standing=most_standing) if fork_server else None
        self._prune_at = 0.0

    def open(self, *, wait: bool = False) -> None:
        """Starts the fork server; with `wait`, until it answers."""
        self._prune()
        _log.info("dispatch.open", fork_server=self._forks is not None)
        if self._forks is not None:
            self._forks.start(wait=wait)

    def close(self) -> None:
        """Ends the fork server; runs under way go on and are adopted by the next orchestrator."""
        if self._forks is not None:
            self._forks.close()

    @property
    def fork_server_pid(self) -> int | None:
        return self._forks.pid if self._forks is not None else None

    def start(self, request: RunRequest) -> FollowedRun:
        directory = self._runs.create(request.operation_id)
        lock = directory.take_lock()
        try:
            plan = self._write(directory, request)
            pid = self._forks.submit_job(directory.path, lock) if self._forks is not None else None
            forked = pid is not None
            if pid is None:
                pid = start_job_process(self._installation, directory.path, lock)
        finally:
            # From here on only the job holds the lock.
            os.close(lock)
        _log.info("run.started", run=directory.name, hosts=len(plan.hosts), forked=forked, pid=pid)
        return FollowedRun(directory, plan)

    def adopt(self, operation_id: str) -> FollowedRun | None:
        return adopt(self._runs.of(operation_id))

    def forget(self, operation_id: str) -> None:
        self._runs.scrub(operation_id)
        if time.monotonic() >= self._prune_at:
            self._prune()

    def _prune(self) -> None:
        self._prune_at = time.monotonic() + _PRUNE_EVERY_S
        removed = self._runs.prune(_KEEP_RUNS_S) + remove_abandoned(_KEEP_RUNS_S)
        if removed:
            _log.info("dispatch.pruned", removed=removed)

    def _write(self, directory: RunDirectory, request: RunRequest) -> RunPlan:
        terms = RunTerms(
            operation_id=request.operation_id,
            fence=request.fence,
            action=request.action,
            events_path=str(directory.events_path),
            ca_path=str(self._credentials.ca_path),
            certificate_path=str(self._credentials.certificate_path),
            key_path=str(self._credentials.key_path),
            timeout_s=request.timeout_s,
        )
        targets = request.hosts.items()
        plan = RunPlan(run=terms, hosts={host: vm_ids_in(target.parameters) for host, target in targets})
        directory.write_calls(
            {
                host: HostCall(run=terms, address=target.address, port=target.port, parameters=dict(target.parameters))
                for host, target in targets
            }
        )
        directory.write_plan(plan)
        return plan
