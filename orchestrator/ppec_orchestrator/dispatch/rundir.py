# SPDX-License-Identifier: Apache-2.0
"""One run is one directory, and nothing about the run is anywhere else.

<runs>/<operation>/<n>/     0700; a folder per operation, so that one is found without looking through the others
    lock                    held (flock) by the job process as long as it lives
    calls/<host>.json       what to do there; holds tenant data, so it goes when the operation has ended
    plan.json               which hosts and VMs it is about, written last: without it the run never started
    started                 present: a job process has begun
    events.jsonl            one RunEvent per line, appended by the action plugin
    cancel                  present: the run is to end
    result.json             how it ended, written by rename
    ansible.log, job.log    for people
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import structlog
from pydantic import TypeAdapter, ValidationError

from ppec_contract.model import HostName
from ppec_contract.run import HostCall, RunEvent, RunPlan, RunResult

_log = structlog.get_logger(__name__)
_OPERATION = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_NUMBER = re.compile(r"[1-9][0-9]{0,5}")
# A run's own limit lies so far above its hosts': it only ends what hangs. Who follows a run gives it as much again.
GRACE_S = 60.0
_HOST_NAME: TypeAdapter[str] = TypeAdapter(HostName)


class RunDirectory:
    """Paths and states of one run. Creating one takes the live-lock; whoever gets `lock_fd` keeps the run alive."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.plan_path = path / "plan.json"
        self.calls_path = path / "calls"
        self.events_path = path / "events.jsonl"
        self.cancel_path = path / "cancel"
        self.result_path = path / "result.json"
        self.lock_path = path / "lock"
        self._started_path = path / "started"

    @property
    def number(self) -> int:
        """The first run of an operation is 1."""
        return int(self.path.name)

    @property
    def name(self) -> str:
        """How people and logs call it: `<operation>-<n>`."""
        return f"{self.path.parent.name}-{self.path.name}"

    def take_lock(self) -> int:
        """The descriptor that holds the live-lock. A flock belongs to the open file: passing it on passes the lock."""
        fd = os.open(self.lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return fd

    def is_live(self) -> bool:
        """Whether a job process holds the lock. Probes share it, so that two probes don't take each other for a job."""
        try:
            fd = os.open(self.lock_path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    def begin(self) -> bool:
        """Whether the caller is the run's first job process."""
        try:
            os.close(os.open(self._started_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        except FileExistsError:
            return False
        return True

    def call_path(self, host: str) -> Path:
        """Where that host's call is. Raises ValidationError for what is no host name: it could lead elsewhere."""
        return self.calls_path / f"{_HOST_NAME.validate_python(host)}.json"

    def write_calls(self, calls: Mapping[str, HostCall]) -> None:
        self.calls_path.mkdir(mode=0o700)
        for host, call in calls.items():
            write_private(self.call_path(host), call.model_dump_json().encode())

    def write_plan(self, plan: RunPlan) -> None:
        """Comes last of all: a run without a plan never started."""
        write_private(self.plan_path, plan.model_dump_json().encode())

    def plan(self) -> RunPlan | None:
        """None when it is missing or was cut short by a crash: such a run never started."""
        try:
            return RunPlan.model_validate_json(self.plan_path.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def result(self) -> RunResult | None:
        try:
            return RunResult.model_validate_json(self.result_path.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def write_result(self, result: RunResult) -> None:
        write_private(self.result_path, result.model_dump_json().encode())

    def request_cancel(self) -> None:
        self.cancel_path.touch(mode=0o600, exist_ok=True)

    def cancel_requested(self) -> bool:
        return self.cancel_path.exists()


class EventTail:
    """Reads a run's events from the first one on. A line that is still being written waits for the next call."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._part = b""

    def read(self) -> list[RunEvent]:
        try:
            if self._path.stat().st_size == self._offset:
                return []
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        self._offset += len(data)
        *lines, self._part = (self._part + data).split(b"\n")
        return [event for line in lines if (event := _event(line)) is not None]


def _event(line: bytes) -> RunEvent | None:
    if not line.strip():
        return None
    try:
        return RunEvent.model_validate_json(line)
    except ValidationError as error:
        # A line cut short by a killed run; what it said comes again when the run is repeated.
        _log.warning("run.event_unreadable", faults=error.error_count(), bytes=len(line))
        return None


class RunDirectories:
    """All runs of one orchestrator's state directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def of(self, operation_id: str) -> list[RunDirectory]:
        """The operation's runs, oldest first."""
        return _runs_in(self._folder(operation_id))

    def create(self, operation_id: str) -> RunDirectory:
        folder = self._folder(operation_id)
        folder.mkdir(mode=0o700, exist_ok=True)
        runs = _runs_in(folder)
        path = folder / str(runs[-1].number + 1 if runs else 1)
        path.mkdir(mode=0o700)
        return RunDirectory(path)

    def scrub(self, operation_id: str) -> None:
        """Removes what may hold tenant data; events, result and logs stay for people until `prune`."""
        for run in self.of(operation_id):
            with suppress(FileNotFoundError):
                shutil.rmtree(run.calls_path)
            run.plan_path.unlink(missing_ok=True)

    def prune(self, older_than_s: float) -> int:
        """Removes runs nobody has touched for so long and nobody holds. Returns how many."""
        removed = 0
        # A folder changes when a run is added, so it is at least as old as its youngest run.
        for folder in old_entries(self.root, older_than_s):
            if not _OPERATION.fullmatch(folder.name):
                continue
            old = set(old_entries(folder, older_than_s))
            gone = [run for run in _runs_in(folder) if run.path in old and not run.is_live()]
            for run in gone:
                shutil.rmtree(run.path, ignore_errors=True)
            removed += len(gone)
            # Refused as long as there is anything in it.
            with suppress(OSError):
                folder.rmdir()
        return removed

    def _folder(self, operation_id: str) -> Path:
        if not _OPERATION.fullmatch(operation_id):
            raise ValueError(f"{operation_id[:80]!r} is no operation's id")
        return self.root / operation_id


def _runs_in(folder: Path) -> list[RunDirectory]:
    try:
        names = [path.name for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [RunDirectory(folder / name) for name in sorted(filter(_NUMBER.fullmatch, names), key=int)]


def old_entries(folder: Path, older_than_s: float) -> list[Path]:
    """What lies in the folder, is ours, and was not touched for so long."""
    limit, found = time.time() - older_than_s, []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            status = path.lstat()
            if status.st_mtime < limit and status.st_uid == os.geteuid():
                found.append(path)
    return found


def write_private(path: Path, content: bytes) -> None:
    """Whole or not at all, mode 0600."""
    part = path.with_name(f".{path.name}.part")
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
    part.rename(path)
