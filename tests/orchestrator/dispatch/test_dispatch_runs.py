# SPDX-License-Identifier: Apache-2.0
"""Real ansible-runner runs: through the fork server and without, cancelled, killed, adopted."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest

from ppec_contract.errors import PpecError
from ppec_contract.run import RunPlan, RunTerms
from ppec_orchestrator.dispatch.adoption import adopt
from ppec_orchestrator.dispatch.dispatcher import AnsibleDispatcher
from ppec_orchestrator.dispatch.job import run_job
from ppec_orchestrator.dispatch.rundir import RunDirectories

from .real_runs import (
    WAIT_S,
    files_of,
    follow,
    installation,
    processes_of,
    request,
    started_with,
    until,
)


@pytest.mark.parametrize(("fork_server", "start"), [(True, "warm=True"), (False, "warm=False")])
def test_run_tells_its_events_and_counts(
    open_dispatcher: Callable[..., AnsibleDispatcher], fork_server: bool, start: str
) -> None:
    run = open_dispatcher(fork_server=fork_server).start(request(hosts=3))
    events, result = follow(run)
    assert result.status == "successful"
    assert result.counters == {"host_tasks": 3, "proxy_sessions": 3}
    assert sorted(e.host for e in events if e.accepted) == ["h1", "h2", "h3"]
    assert started_with(events) == {start}


def test_run_leaves_no_secret_and_its_folder_is_private(
    open_dispatcher: Callable[..., AnsibleDispatcher], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PPEC_SECRET", "database-password")
    operation_id = f"op-{uuid4().hex}"
    hold = folder / "hold"
    hold.touch()
    dispatcher = open_dispatcher()
    run = dispatcher.start(request(operation_id, hold=str(hold)))
    run.wait(WAIT_S)
    (scratch,) = {Path(file).parent for pid in processes_of(run.directory.path) for file in files_of(pid, ".run_plan")}
    assert stat.S_IMODE(scratch.stat().st_mode) == 0o700
    hold.unlink()
    follow(run)
    until(lambda: not run.directory.is_live(), "the job has ended")
    assert not scratch.exists(), "what ansible-runner wrote is gone"
    assert stat.S_IMODE(run.directory.path.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "ansible").stat().st_mode) == 0o700
    for path in run.directory.path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
        assert path.is_dir() or b"database-password" not in path.read_bytes()
    dispatcher.forget(operation_id)
    assert not run.directory.plan_path.exists()
    assert dispatcher.adopt(operation_id) is None


def test_cancel_ends_the_run_with_all_its_processes(
    open_dispatcher: Callable[..., AnsibleDispatcher], folder: Path
) -> None:
    hold = folder / "hold"
    hold.touch()
    run = open_dispatcher().start(request(hold=str(hold)))
    events = [*run.wait(WAIT_S)]
    assert events
    run.cancel()
    _, result = follow(run)
    assert result.status == "canceled"
    until(lambda: not processes_of(run.directory.path), "no process of the run is left")


def test_run_whose_job_is_killed_is_lost_and_says_so(
    open_dispatcher: Callable[..., AnsibleDispatcher], folder: Path
) -> None:
    hold = folder / "hold"
    hold.touch()
    run = open_dispatcher().start(request(hold=str(hold)))
    run.wait(WAIT_S)
    for pid in until(lambda: processes_of(run.directory.path), "the job runs"):
        # One may be gone with another.
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _, result = follow(run)
    assert result.problem is not None
    assert result.problem.code == "run.lost"
    again = open_dispatcher(fork_server=False).adopt("op-1")
    assert again is not None
    assert follow(again)[1].problem == result.problem


def test_run_that_hangs_ends_at_its_limit(open_dispatcher: Callable[..., AnsibleDispatcher], folder: Path) -> None:
    hold = folder / "hold"
    hold.touch()
    # A run may take a minute longer than its hosts.
    run = open_dispatcher().start(replace(request(hold=str(hold)), timeout_s=-59.0))
    events, result = follow(run)
    assert events
    assert result.status == "timeout"
    assert result.problem is not None
    assert result.problem.code == "run.failed"
    until(lambda: not processes_of(run.directory.path), "no process of the run is left")


@pytest.mark.parametrize(("timeout_s", "lost"), [(-121.0, True), (600.0, False)], ids=["late", "in-time"])
def test_job_that_hangs_is_given_up_by_who_follows_it(folder: Path, timeout_s: float, lost: bool) -> None:
    """It ends itself a minute after its hosts should have; who follows it gives it two."""
    directory = RunDirectories(folder / "runs").create("op-1")
    lock = directory.take_lock()
    terms = dict.fromkeys(("events_path", "ca_path", "certificate_path", "key_path"), "/nowhere")
    run = RunTerms(operation_id="op-1", fence=1, action="StartVms", timeout_s=timeout_s, **terms)
    directory.write_plan(RunPlan(run=run, hosts={"h1": frozenset()}))
    followed = adopt([directory])
    assert followed is not None
    assert followed.wait(0.5) == []
    assert (followed.result is not None and followed.result.problem is not None) is lost
    if followed.result is not None and followed.result.problem is not None:
        assert followed.result.problem.code == "run.lost"
    os.close(lock)


def test_collection_without_the_inventory_plugin_is_refused(folder: Path) -> None:
    shutil.rmtree(folder / "collections" / "ansible_collections" / "ppec" / "cloud" / "plugins" / "inventory")
    with pytest.raises(PpecError, match=r"another version's: it has no .*run_plan\.py"):
        installation(folder)


def test_run_has_one_job_process(folder: Path) -> None:
    """A fork server that was taken for dead may fork its job after another one was started."""
    run = RunDirectories(folder / "runs").create("op-1")
    lock = run.take_lock()
    assert run.begin()
    assert run_job(run.path, lock, "site.yml") == 0
    assert sorted(path.name for path in run.path.iterdir()) == ["lock", "started"]
    os.close(lock)


def test_old_runs_go_while_the_orchestrator_runs(
    open_dispatcher: Callable[..., AnsibleDispatcher], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatcher = open_dispatcher(fork_server=False)
    runs = RunDirectories(folder / "runs")
    old, held, fresh = (runs.create(name) for name in ("op-old", "op-held", "op-fresh"))
    lock = held.take_lock()
    for one in (old, held):
        os.utime(one.path, (0, 0))
        os.utime(one.path.parent, (0, 0))
    monkeypatch.setattr(time, "monotonic", lambda now=time.monotonic: now() + 3700)
    dispatcher.forget("op-else")
    assert [one.path.exists() for one in (old, held, fresh)] == [False, True, True]
    assert not old.path.parent.exists()
    os.close(lock)


# Python runs it before anything else. Fork servers that start while the file is there wait for its end.


SITE = """
import os, sys, time
while "ppec_orchestrator.dispatch.fork_server" in sys.orig_argv and os.path.exists({no_server!r}):
    time.sleep(0.01)
"""


def test_changed_collection_is_not_served_from_memory(
    open_dispatcher: Callable[..., AnsibleDispatcher], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_server = folder / "no-server"
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(SITE.format(no_server=str(no_server)))
    monkeypatch.setenv("PYTHONPATH", str(folder / "site"), prepend=os.pathsep)
    dispatcher = open_dispatcher()
    first = dispatcher.fork_server_pid
    plugins = folder / "collections" / "ansible_collections" / "ppec" / "cloud" / "plugins"
    (plugins / "new.py").write_text("")
    # Or the new server, which may serve the run, could be there before the run asks for one.
    no_server.touch()
    events, result = follow(dispatcher.start(request()))
    assert (result.status, started_with(events)) == ("successful", {"warm=False"})
    no_server.unlink()
    until(lambda: dispatcher.fork_server_pid not in (None, first), "a new fork server is there")
    assert started_with(follow(dispatcher.start(request("op-2")))[0]) == {"warm=True"}


ORCHESTRATOR = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from real_runs import NOWHERE, installation, request
from ppec_orchestrator.dispatch.dispatcher import AnsibleDispatcher
folder = Path({folder!r})
dispatcher = AnsibleDispatcher(folder, NOWHERE, installation=installation(folder), fork_server={fork_server})
dispatcher.open(wait=True)
run = dispatcher.start(request(hold={hold!r}))
run.wait(60)
print("under way", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("fork_server", [True, False])
def test_run_outlives_a_killed_orchestrator_and_is_adopted(
    open_dispatcher: Callable[..., AnsibleDispatcher], folder: Path, fork_server: bool
) -> None:
    hold = folder / "hold"
    hold.touch()
    code = ORCHESTRATOR.format(
        tests=str(Path(__file__).parent), folder=str(folder), hold=str(hold), fork_server=fork_server
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as orchestrator:
        assert orchestrator.stdout is not None
        told = b""
        while b"under way" not in told:
            line = orchestrator.stdout.readline()
            assert line, "the orchestrator ended early"
            told = line
        orchestrator.kill()
        orchestrator.wait(timeout=WAIT_S)
    successor = open_dispatcher(fork_server=fork_server)
    run = successor.adopt("op-1")
    assert run is not None
    assert run.directory.is_live(), "the job lives on"
    assert run.number == 1
    hold.unlink()
    events, result = follow(run)
    assert result.status == "successful"
    assert [e.host for e in events if e.accepted].count("h1") == 1, "read from the first event, done once"


def test_tenant_text_is_never_evaluated(open_dispatcher: Callable[..., AnsibleDispatcher], folder: Path) -> None:
    canary = folder / "evaluated"
    hostile = f"{{{{ lookup('pipe', 'touch {canary}') }}}}"
    _, result = follow(open_dispatcher().start(request(note=hostile)))
    assert result.status == "successful"
    assert not canary.exists()
