# SPDX-License-Identifier: Apache-2.0
"""Real ansible-runner runs: through the fork server and without, cancelled, killed, adopted."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import pytest
from structlog.testing import capture_logs

from ppec_contract.errors import PpecError
from ppec_contract.run import RunEvent, RunPlan, RunResult, RunTerms
from ppec_orchestrator.dispatch.adoption import adopt
from ppec_orchestrator.dispatch.dispatcher import AnsibleDispatcher, RunCredentials
from ppec_orchestrator.dispatch.fork_client import ForkClient, server_command
from ppec_orchestrator.dispatch.fork_server import ForkServer, Request, _await_run
from ppec_orchestrator.dispatch.installation import COLLECTION, Installation, find_collections
from ppec_orchestrator.dispatch.job import Job, run_job
from ppec_orchestrator.dispatch.port import HostTarget, RunRequest
from ppec_orchestrator.dispatch.rundir import RunDirectories, RunDirectory

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


def files_of(pid: int, suffix: str = "") -> list[str]:
    """What the process has open, by name."""
    names = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            names.append(str(fd.readlink()))
        except OSError:
            continue
    return [name for name in names if name.endswith(suffix)]


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


def test_dead_fork_server_is_replaced_and_its_runs_live_on(
    open_dispatcher: Callable[..., AnsibleDispatcher], folder: Path
) -> None:
    hold = folder / "hold"
    hold.touch()
    dispatcher = open_dispatcher()
    run = dispatcher.start(request(hold=str(hold)))
    run.wait(WAIT_S)
    first = dispatcher.fork_server_pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    until(lambda: dispatcher.fork_server_pid not in (None, first), "a new fork server is there")
    hold.unlink()
    assert follow(run)[1].status == "successful"
    events, result = follow(dispatcher.start(request("op-2")))
    assert (result.status, started_with(events)) == ("successful", {"warm=True"})


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


def standby_of(dispatcher: AnsibleDispatcher) -> list[int]:
    """The fork server's children while no run is under way: jobs that stand by, and their playbooks' keepers."""
    pid = dispatcher.fork_server_pid
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def all_below(pid: int) -> list[int]:
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(word) for thread in threads for word in (thread / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [found for child in children for found in (child, *all_below(child))]


def standing_by(dispatcher: AnsibleDispatcher) -> list[int]:
    """Every process of the two jobs that stand by: themselves, the drop-ins, the playbooks and their keepers."""
    until(lambda: len(all_below(dispatcher.fork_server_pid or 0)) == 8, "both playbooks wait")
    return all_below(dispatcher.fork_server_pid or 0)


def kill_all(pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def playbooks_of(dispatcher: AnsibleDispatcher) -> list[int]:
    """The playbooks that wait: of all that stands by, what is below something that has no plan's file open."""
    keepers = [pid for pid in standby_of(dispatcher) if not files_of(pid, ".run_plan")]
    return [pid for keeper in keepers for pid in all_below(keeper)]


def test_what_stands_by_and_is_killed_is_made_again(open_dispatcher: Callable[..., AnsibleDispatcher]) -> None:
    dispatcher = open_dispatcher()
    killed = standing_by(dispatcher)
    kill_all(killed)
    until(lambda: not set(killed) & set(all_below(dispatcher.fork_server_pid or 0)), "they are gone")
    standing_by(dispatcher)
    events, result = follow(dispatcher.start(request()))
    assert (result.status, started_with(events)) == ("successful", {"warm=True"})


@pytest.mark.parametrize("killed", ["drop-in", "keeper", "playbook"])
def test_job_whose_playbook_dies_while_it_waits_goes_too(
    open_dispatcher: Callable[..., AnsibleDispatcher], killed: str
) -> None:
    dispatcher = open_dispatcher()
    pids = standing_by(dispatcher)
    jobs = [pid for pid in standby_of(dispatcher) if files_of(pid, ".run_plan")]
    keepers = [pid for pid in standby_of(dispatcher) if pid not in jobs]
    below = {"drop-in": [pid for job in jobs for pid in all_below(job)], "keeper": keepers}
    below["playbook"] = playbooks_of(dispatcher)
    assert [len(found) for found in below.values()] == [2, 2, 2]
    kill_all(below[killed])
    until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in pids), "the others are gone with it")
    standing_by(dispatcher)
    assert follow(dispatcher.start(request()))[1].status == "successful"


@pytest.mark.parametrize("after_s", [0.0, 0.02, 0.05, 0.1, 0.15])
def test_run_that_comes_when_the_playbook_dies_has_not_failed(
    open_dispatcher: Callable[..., AnsibleDispatcher], after_s: float
) -> None:
    """No host was called: it is done, by another job, or it is lost, which is repeated. A failure would stand."""
    dispatcher = open_dispatcher()
    standing_by(dispatcher)
    kill_all(playbooks_of(dispatcher))
    time.sleep(after_s)
    _, result = follow(dispatcher.start(request()))
    assert result.problem is None or result.problem.code == "run.lost"


class Standing:
    """In place of a job that stands by: it can't take its run."""

    abandoned = False

    def give(self, run: RunDirectory) -> bool:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def abandon(self) -> None:
        self.abandoned = True


def test_job_that_can_not_take_its_run_ends(folder: Path) -> None:
    """A playbook that waits for ever would hold the run's lock, and the run would seem to live."""
    standing = Standing()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        ours.send(Request("job", str(folder), 0o077, (), {}, ()).encode())
        _await_run(theirs, cast("Job", standing))
    assert standing.abandoned


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


def test_fork_server_that_hangs_is_replaced(folder: Path) -> None:
    client = ForkClient(installation(folder), answer_timeout_s=1.0)
    client.start(wait=True)
    hanging = client.pid
    assert hanging is not None
    run = RunDirectories(folder / "runs").create("op-1")
    lock = run.take_lock()
    try:
        os.kill(hanging, signal.SIGSTOP)
        assert client.submit_job(run.path, lock) is None
        until(lambda: client.pid not in (None, hanging), "another one is there")
        until(lambda: not Path(f"/proc/{hanging}/exe").exists(), "and the one that hung is not")
    finally:
        os.close(lock)
        client.close()


def test_fork_server_whose_socket_is_lost_is_replaced(
    open_dispatcher: Callable[..., AnsibleDispatcher], folder: Path
) -> None:
    dispatcher = open_dispatcher()
    first = dispatcher.fork_server_pid
    installation(folder).socket.unlink()
    assert follow(dispatcher.start(request()))[1].status == "successful"
    until(lambda: dispatcher.fork_server_pid not in (None, first), "a new fork server is there")
    assert started_with(follow(dispatcher.start(request("op-2")))[0]) == {"warm=True"}


def test_collection_without_the_inventory_plugin_is_refused(folder: Path) -> None:
    shutil.rmtree(folder / "collections" / "ansible_collections" / "ppec" / "cloud" / "plugins" / "inventory")
    with pytest.raises(PpecError, match=r"another version's: it has no .*run_plan\.py"):
        installation(folder)


def test_job_that_stands_by_ends_with_the_fork_server(open_dispatcher: Callable[..., AnsibleDispatcher]) -> None:
    dispatcher = open_dispatcher()
    pids = standing_by(dispatcher)
    scratch = [Path(name).parent for pid in pids for name in files_of(pid, ".run_plan")]
    assert scratch
    assert dispatcher.fork_server_pid is not None
    os.kill(dispatcher.fork_server_pid, signal.SIGKILL)
    until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in pids), "the processes are gone")
    until(lambda: not any(path.exists() for path in scratch), "so is the job's folder")


def test_fork_server_outlives_a_fork_that_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room() -> int:
        raise BlockingIOError(errno.EAGAIN, "no room for another process")

    server = ForkServer(folder / "fork.sock", "site.yml")
    monkeypatch.setattr(os, "fork", no_room)
    server.stand_by()
    assert not server._standby, "it goes on without, and tries again"


def test_job_that_has_stood_by_for_long_is_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = ForkServer(folder / "fork.sock", "site.yml")
    pids = iter(range(1001, 1005))
    now_s = 0.0
    monkeypatch.setattr(os, "fork", lambda: next(pids))
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    for _ in range(2):
        now_s += server.stand_by()
    first, second = server._standby
    assert (first.pid, second.pid) == (1001, 1002)
    assert now_s >= 3600.0, "there is nothing to do until then"
    server.stand_by()
    assert [job.pid for job in server._standby] == [1002, 1003]
    assert first.channel.fileno() == -1, "which tells it to end"
    for job in server._standby:
        job.channel.close()


def test_jobs_have_no_socket_of_the_servers(open_dispatcher: Callable[..., AnsibleDispatcher], folder: Path) -> None:
    """Neither those that stood by nor those forked for a run, which come when more are asked for at once."""
    hold = folder / "hold"
    hold.touch()
    dispatcher = open_dispatcher()
    standing_by(dispatcher)
    runs = [dispatcher.start(request(f"op-{number}", hosts=1, hold=str(hold))) for number in range(4)]
    for run in runs:
        run.wait(WAIT_S)
        (job,) = (pid for pid in processes_of(run.directory.path) if files_of(pid, ".run_plan"))
        assert not [name for name in files_of(job) if name.startswith("socket:")]
    hold.unlink()
    assert [follow(run)[1].status for run in runs] == ["successful"] * 4


def test_fork_server_that_can_not_start_is_tried_again(
    open_dispatcher: Callable[..., AnsibleDispatcher], folder: Path
) -> None:
    made = installation(folder)
    made.socket.mkdir()
    dispatcher = AnsibleDispatcher(folder, NOWHERE, installation=made)
    with capture_logs() as lines:
        dispatcher.open()
        try:
            until(lambda: [line for line in lines if line["event"] == "fork_server.failed"][1:], "it failed twice")
            assert started_with(follow(dispatcher.start(request()))[0]) == {"warm=False"}, "without it, only slower"
        finally:
            made.socket.rmdir()
            until(lambda: dispatcher.fork_server_pid is not None, "it stands once it can")
        assert started_with(follow(dispatcher.start(request("op-2")))[0]) == {"warm=True"}
    dispatcher.close()


def test_fork_server_ends_quietly_when_its_parent_is_gone(folder: Path) -> None:
    made = installation(folder)
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(
        server_command(made),
        env=made.environment(),
        stdin=subprocess.PIPE,
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=WAIT_S,
        check=False,
    )
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (0, b"")


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
from test_dispatch_runs import NOWHERE, installation, request
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
