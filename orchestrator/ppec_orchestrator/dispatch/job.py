# SPDX-License-Identifier: Apache-2.0
"""The job process: one ansible-runner run from its directory to its `result.json`. Imports ansible_runner, alone.

It is in a session of its own and holds the run's lock by an inherited descriptor, so it outlives the orchestrator and
tells by living that the run is under way. What ansible-runner writes (its `command` file holds the whole environment)
goes to a fresh folder on tmpfs, mode 0700, that is removed at the end.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from ppec_contract.errors import PpecError
from ppec_contract.run import RunResult
from ppec_orchestrator.dispatch import descendants
from ppec_orchestrator.dispatch.rundir import RunDirectory, old_entries, write_private

JOB_FILE = "job.json"
TMPFS = Path("/dev/shm")  # noqa: S108 - mkdtemp makes a folder of its own in it, mode 0700
TMP_PREFIX = "ppec-run-"
_KEPT_LOG_BYTES = 256 * 1024
# Tasks that reach a host; the rest of Ansible's events are its own bookkeeping.
_HOST_TASK_EVENTS = ("runner_on_ok", "runner_on_failed", "runner_on_unreachable")
Status = Literal["successful", "failed", "canceled", "timeout"]


def warm_up() -> None:
    """In the fork server: what a job would import."""
    import ansible_runner
    import ansible_runner.display_callback  # noqa: F401


def callback_folder() -> Path:
    """Where the plugin is by which ansible-runner hears of events, as it names it itself."""
    from ansible_runner.utils import get_callback_dir

    return Path(get_callback_dir())


def write_job(run: RunDirectory, playbook: str, forks: int, timeout_s: float) -> None:
    """What the job process needs besides the plan: no tenant data, no secrets."""
    content = {"playbook": playbook, "forks": forks, "timeout_s": timeout_s}
    write_private(run.path / JOB_FILE, json.dumps(content).encode())


class Job:
    """Runs one playbook through ansible-runner and counts what it did."""

    def __init__(self, run: RunDirectory, settings: dict[str, Any]) -> None:
        self._run = run
        self._settings = settings
        self._tasks: Counter[str] = Counter()
        self._proxy_sessions = 0
        self._cancelled = False
        self._written = False

    def execute(self) -> None:
        base = TMPFS if os.access(TMPFS, os.W_OK) else None
        private = Path(tempfile.mkdtemp(prefix=f"{TMP_PREFIX}{self._run.name}-", dir=base))
        try:
            self._ansible(private)
        finally:
            # A cancelled playbook's workers detach themselves; none may go on talking to a host.
            descendants.end_all()
            _keep_log(private, self._run.path / "ansible.log")
            shutil.rmtree(private, ignore_errors=True)

    def _ansible(self, private: Path) -> None:
        import ansible_runner

        local_temp = private / "tmp"
        local_temp.mkdir(mode=0o700)
        runner = ansible_runner.run(
            private_data_dir=str(private),
            ident="run",
            playbook=self._settings["playbook"],
            inventory=str(self._run.inventory_path),
            # The only variable: a path. Tenant text would be rendered as a template.
            extravars={"ppec_plan_file": str(self._run.plan_path)},
            envvars={"ANSIBLE_LOCAL_TEMP": str(local_temp)},
            forks=self._settings["forks"],
            settings={"pexpect_timeout": 1, "job_timeout": int(self._settings["timeout_s"])},
            suppress_env_files=True,
            quiet=True,
            event_handler=self._on_event,
            cancel_callback=self._cancel_wanted,
        )
        self._finish(runner.status, int(runner.rc))

    def _cancel_wanted(self) -> bool:
        return self._run.cancel_requested()

    def _on_event(self, event: dict[str, Any]) -> bool:
        """Only counts: a slow handler holds up the playbook's output. False keeps the event off the disk."""
        name = event.get("event", "")
        if name in _HOST_TASK_EVENTS:
            self._tasks[name] += 1
            found = event.get("event_data", {}).get("res", {})
            self._proxy_sessions += int(found.get("proxy_sessions", 0)) if isinstance(found, dict) else 0
        elif name == "playbook_on_stats":
            # The playbook's last word. What follows takes a fifth of a second and changes nothing.
            failed = self._tasks["runner_on_failed"] + self._tasks["runner_on_unreachable"]
            self._finish("failed" if failed else "successful", 2 if failed else 0)
        return False

    def _finish(self, status: Status, return_code: int) -> None:
        if self._written:
            return
        self._written = True
        problem = None
        if status != "successful":
            problem = PpecError(
                "operation.cancelled" if status == "canceled" else "run.failed",
                f"the Ansible run {self._run.name} ended {status} with code {return_code}",
                hint=f"Its output is in {self._run.path / 'ansible.log'}.",
                subject=f"run {self._run.name}",
            ).problem()
        counters = {"host_tasks": self._tasks.total(), "proxy_sessions": self._proxy_sessions}
        self._run.write_result(RunResult(status=status, return_code=return_code, problem=problem, counters=counters))


def _keep_log(private: Path, target: Path) -> None:
    source = private / "artifacts" / "run" / "stdout"
    try:
        with source.open("rb") as log:
            log.seek(max(0, source.stat().st_size - _KEPT_LOG_BYTES))
            content = log.read()
        target.touch(mode=0o600)
        target.write_bytes(content)
    except OSError:
        return


def remove_abandoned(older_than_s: float) -> int:
    """Removes the folders of jobs that were killed so long ago: nobody else does. Returns how many."""
    if not TMPFS.is_dir():
        return 0
    found = [path for path in old_entries(TMPFS, older_than_s) if path.name.startswith(TMP_PREFIX)]
    for path in found:
        shutil.rmtree(path, ignore_errors=True)
    return len(found)


def run_job(path: Path, lock: int) -> int:
    """The whole life of a job process. `lock` is held by being open. Returns the exit code.

    A run has one job: when the fork server was so slow that it was taken for dead, the second one to come ends here.
    """
    run = RunDirectory(path)
    if not run.begin():
        return 0
    log = os.open(path / "job.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open(os.devnull, os.O_RDWR)
    for fd, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(fd, target)
    os.set_inheritable(lock, False)
    descendants.adopt_orphans()
    started = time.monotonic()
    try:
        Job(run, json.loads((path / JOB_FILE).read_text())).execute()
    except BaseException:
        os.write(2, traceback.format_exc().encode())
        return 1
    os.write(2, f"ended after {time.monotonic() - started:.3f} s\n".encode())
    return 0


if __name__ == "__main__":
    sys.exit(run_job(Path(sys.argv[1]), int(sys.argv[2])))
