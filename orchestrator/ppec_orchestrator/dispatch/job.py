# SPDX-License-Identifier: Apache-2.0
"""The job process: one ansible-runner run, to its `result.json`. Imports ansible_runner, alone.

It is in a session of its own and holds the run's lock by an inherited descriptor, so it outlives the orchestrator and
tells by living that the run is under way. What ansible-runner writes (its `command` file holds the whole environment)
goes to a fresh folder on tmpfs, mode 0700, that is removed at the end.

A job may start before there is a run for it. Its playbook then waits, started, in the inventory plugin
`ppec.cloud.run_plan`, which reads the plan's path from a FIFO; `give` writes it there. What takes the most of a run's
time, starting Ansible, is then done before the request comes.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from ppec_contract.errors import PpecError
from ppec_contract.run import RunResult
from ppec_orchestrator.dispatch import descendants
from ppec_orchestrator.dispatch.rundir import GRACE_S, RunDirectory, old_entries

TMPFS = Path("/dev/shm")  # noqa: S108 - mkdtemp makes a folder of its own in it, mode 0700
TMP_PREFIX = "ppec-run-"
_SOURCE = "hosts.run_plan"
_KEPT_LOG_BYTES = 256 * 1024
# A batch may be for a thousand hosts; so many are called at a time.
_FORKS = 50
# How soon ansible-runner notices that a run is to end.
_CANCEL_LOOK_S = 1
# A playbook's own exit codes end here; above are those of the drop-in, the keeper and the kernel for a killed one.
_MOST_OWN_CODES = 128
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


class Job:
    """Runs one playbook through ansible-runner and counts what it did. `give` it a run before or after `execute`.

    `give` and `abandon` may be called from another thread; a job gets one run, and ends with it.
    """

    def __init__(self, playbook: str) -> None:
        self._playbook = playbook
        self._run: RunDirectory | None = None
        self._deadline_s = float("inf")
        self._abandoned = False
        self._tasks: Counter[str] = Counter()
        self._proxy_sessions = 0
        self._written = False
        # The playbook has come to its plays, and the playbook has ended: each of them once and for all.
        self._playing = False
        self._ended = False
        self._turn = threading.Lock()
        self._private = Path(tempfile.mkdtemp(prefix=TMP_PREFIX, dir=TMPFS))
        self._source = self._private / _SOURCE
        try:
            made = self._private / "fifo"
            os.mkfifo(made, mode=0o600)
            # For reading too: neither side then waits for the other to open it, and its end is this process's end.
            self._gate = os.open(made, os.O_RDWR | os.O_CLOEXEC)
            # Under its name there is only one that is open: `remove_abandoned` relies on it.
            made.rename(self._source)
        except OSError:
            shutil.rmtree(self._private, ignore_errors=True)
            raise

    def give(self, run: RunDirectory) -> bool:
        """The run that this job is for: its playbook goes on.

        False when another job has begun the run, or when the playbook has ended meanwhile. Raises OSError. Either way
        the run is no longer this job's, and it is repeated once the job has let go of its lock.
        """
        with self._turn:
            plan = run.plan()
            if self._ended or plan is None or not run.begin():
                return False
            _log_to(run)
            self._deadline_s = time.monotonic() + plan.run.timeout_s + GRACE_S
            self._run = run
        os.write(self._gate, f"{run.plan_path}\n".encode())
        return True

    @property
    def has_run(self) -> bool:
        return self._run is not None

    def abandon(self) -> None:
        """There will be no run: the playbook ends."""
        self._abandoned = True
        for pid in descendants.children():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def execute(self) -> None:
        """To the playbook's end."""
        descendants.adopt_orphans()
        try:
            self._ansible()
        finally:
            # A cancelled playbook's workers detach themselves; none may go on talking to a host.
            descendants.end_all()
            if self._run is not None:
                _keep_log(self._private, self._run.path / "ansible.log")
            self.discard()

    def discard(self) -> None:
        """Removes the folder of a job that has ended, or never began."""
        shutil.rmtree(self._private, ignore_errors=True)

    def _ansible(self) -> None:
        import ansible_runner

        local_temp = self._private / "tmp"
        local_temp.mkdir(mode=0o700)
        runner = ansible_runner.run(
            private_data_dir=str(self._private),
            ident="run",
            playbook=self._playbook,
            # All that a run is told is a path. Tenant text in variables would be rendered as a template.
            inventory=str(self._source),
            envvars={"ANSIBLE_LOCAL_TEMP": str(local_temp)},
            forks=_FORKS,
            settings={"pexpect_timeout": _CANCEL_LOOK_S},
            suppress_env_files=True,
            quiet=True,
            event_handler=self._on_event,
            cancel_callback=self._cancel_wanted,
        )
        with self._turn:
            self._ended = True
        # None when the playbook was ended by a signal before anybody waited for it.
        return_code = -1 if runner.rc is None else int(runner.rc)
        if runner.status == "failed" and not self._playing and not 0 < return_code <= _MOST_OWN_CODES:
            # It was killed while it waited or right after, and has called nobody: lost, not failed, so it is repeated.
            return
        self._finish("timeout" if self._late() else runner.status, return_code)

    def _cancel_wanted(self) -> bool:
        if self._run is None:
            return self._abandoned
        return self._late() or self._run.cancel_requested()

    def _late(self) -> bool:
        return time.monotonic() > self._deadline_s

    def _on_event(self, event: dict[str, Any]) -> bool:
        """Only counts: a slow handler holds up the playbook's output. False keeps the event off the disk."""
        name = event.get("event", "")
        self._playing = self._playing or name == "playbook_on_play_start"
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
        if self._written or self._run is None:
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
    """Removes the folders of jobs that were killed, which nobody else does. Returns how many.

    A job has its FIFO open as long as it lives; a folder that has none yet is left until it is so old.
    """
    if not TMPFS.is_dir():
        return 0
    ours = [path for path in old_entries(TMPFS, 0) if path.name.startswith(TMP_PREFIX)]
    old = set(old_entries(TMPFS, older_than_s))
    found = [path for path in ours if _has_ended(path / _SOURCE) or (path in old and not (path / _SOURCE).exists())]
    for path in found:
        shutil.rmtree(path, ignore_errors=True)
    return len(found)


def _has_ended(fifo: Path) -> bool:
    try:
        os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    except FileNotFoundError:
        return False
    except OSError as error:
        return error.errno == errno.ENXIO  # nobody reads it
    return False


def _log_to(run: RunDirectory) -> None:
    """From here on this process's words go to the run's log."""
    log = os.open(run.path / "job.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    for target in (1, 2):
        os.dup2(log, target)
    os.close(log)


def work(job: Job) -> int:
    """The whole life of a job process, in a session of its own. Returns the exit code."""
    started = time.monotonic()
    try:
        job.execute()
    except BaseException:
        os.write(2, traceback.format_exc().encode())
        return 1
    if job.has_run:
        os.write(2, f"ended after {time.monotonic() - started:.3f} s\n".encode())
    return 0


def run_job(path: Path, lock: int, playbook: str) -> int:
    """A job for a run that is there. `lock` is held by being open.

    A run has one job: when the fork server was so slow that it was taken for dead, the second one to come ends here.
    """
    run = RunDirectory(path)
    os.set_inheritable(lock, False)
    try:
        job = Job(playbook)
    except OSError:
        _log_to(run)
        raise
    if job.give(run):
        return work(job)
    job.discard()
    return 0


if __name__ == "__main__":
    sys.exit(run_job(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
