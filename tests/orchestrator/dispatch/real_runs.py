# SPDX-License-Identifier: Apache-2.0
"""Real runs for tests: a dispatcher whose playbook tells what it was given, and a look at the processes."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ppec_contract.run import RunEvent, RunResult
from ppec_orchestrator.dispatch.dispatcher import AnsibleDispatcher, RunCredentials
from ppec_orchestrator.dispatch.installation import COLLECTION, Installation, find_collections
from ppec_orchestrator.dispatch.job import remove_abandoned
from ppec_orchestrator.dispatch.port import HostTarget, RunRequest

WAIT_S = 60.0
PLAYBOOK = Path(__file__).parent / "playbook" / "site.yml"
NOWHERE = RunCredentials(Path("/nonexistent/ca"), Path("/nonexistent/crt"), Path("/nonexistent/key"))


@pytest.fixture
def folder(short_dir: Path) -> Path:
    """The playbook is copied: a test may change it, and Ansible leaves its byte code beside it."""
    shutil.copytree(PLAYBOOK.parent, short_dir / "playbook")
    plugins = short_dir / "collections" / "ansible_collections" / "ppec" / "cloud" / "plugins"
    (plugins / "inventory").mkdir(parents=True)
    shutil.copy(find_collections() / COLLECTION / "plugins" / "inventory" / "run_plan.py", plugins / "inventory")
    return short_dir


def installation(folder: Path) -> Installation:
    made = folder / "playbook" / "site.yml"
    return Installation.prepare(folder / "ansible", collections=folder / "collections", playbook=made)


def request(operation_id: str = "op-1", hosts: int = 2, **parameters: Any) -> RunRequest:
    targets = {f"h{n}": HostTarget("127.0.0.1", 1, {"vm_ids": [], **parameters}) for n in range(1, hosts + 1)}
    return RunRequest(operation_id, 1, "DeleteVms", targets)


@pytest.fixture
def open_dispatcher(folder: Path) -> Iterator[Callable[..., AnsibleDispatcher]]:
    opened: list[AnsibleDispatcher] = []

    def open_one(*, fork_server: bool = True) -> AnsibleDispatcher:
        made = AnsibleDispatcher(folder, NOWHERE, installation=installation(folder), fork_server=fork_server)
        made.open(wait=True)
        opened.append(made)
        return made

    yield open_one
    for one in opened:
        one.close()
    # What jobs leave that a test has killed. Those of others that live are none of it.
    remove_abandoned(older_than_s=WAIT_S)


def follow(run: Any) -> tuple[list[RunEvent], RunResult]:
    events: list[RunEvent] = []
    deadline = time.monotonic() + WAIT_S
    while run.result is None:
        assert time.monotonic() < deadline, "the run did not end"
        events += run.wait(1.0)
    return events, run.result


def until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + WAIT_S
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
    return found


def started_with(events: list[RunEvent]) -> set[str]:
    return {event.problem.detail for event in events if event.problem}


def files_of(pid: int, suffix: str = "") -> list[str]:
    """What the process has open, by name."""
    names = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            names.append(str(fd.readlink()))
        except OSError:
            continue
    return [name for name in names if name.endswith(suffix)]


def processes_of(path: Path) -> list[int]:
    """Processes whose command line or environment names the run's directory, jobs and Ansible alike."""
    needle = str(path).encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes() + (entry / "stat").read_bytes()
            files = [str(fd.readlink()) for fd in (entry / "fd").iterdir()]
        except OSError:
            continue
        if int(entry.name) != os.getpid() and (needle in words or any(f.startswith(str(path)) for f in files)):
            found.append(int(entry.name))
    return found


def kill_all(pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
