# SPDX-License-Identifier: Apache-2.0
"""Jobs that stand by, and the fork server that keeps them: killed, hanging, lost, replaced."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import pytest
from structlog.testing import capture_logs

from ppec_orchestrator.dispatch.demand import QUIET_S
from ppec_orchestrator.dispatch.dispatcher import AnsibleDispatcher
from ppec_orchestrator.dispatch.fork_client import ForkClient, server_command
from ppec_orchestrator.dispatch.fork_server import ForkServer, Request, _await_run
from ppec_orchestrator.dispatch.job import Job, remove_abandoned
from ppec_orchestrator.dispatch.rundir import RunDirectories, RunDirectory

from .real_runs import (
    NOWHERE,
    WAIT_S,
    files_of,
    follow,
    installation,
    kill_all,
    processes_of,
    request,
    started_with,
    until,
)


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


def test_folders_of_killed_jobs_go_and_those_of_living_ones_stay(
    open_dispatcher: Callable[..., AnsibleDispatcher],
) -> None:
    dispatcher = open_dispatcher()

    def folders(pids: Iterable[int]) -> set[Path]:
        return {Path(name).parent for pid in pids for name in files_of(pid, ".run_plan")}

    killed = standing_by(dispatcher)
    abandoned = folders(killed)
    assert len(abandoned) == 2
    kill_all(killed)
    until(lambda: not set(killed) & set(all_below(dispatcher.fork_server_pid or 0)), "they are gone")
    living = folders(standing_by(dispatcher))
    assert remove_abandoned(older_than_s=WAIT_S) >= len([path for path in abandoned if path.exists()])
    assert not any(path.exists() for path in abandoned)
    assert len(living) == 2
    assert all(path.exists() for path in living)
    assert follow(dispatcher.start(request()))[1].status == "successful"


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


def test_jobs_that_end_as_soon_as_they_stand_are_not_forked_in_a_circle(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ForkServer(folder / "fork.sock", "site.yml")
    now_s = 0.0
    monkeypatch.setattr(os, "fork", lambda: 1001)
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    pauses = []
    for _ in range(12):
        while (wait_s := server.stand_by()) is not None:
            now_s += wait_s
        ended = [job.channel for job in server._standby]
        server.forget_ended([channel.fileno() for channel in ended])
        assert all(channel.fileno() == -1 for channel in ended)
        pauses.append(round(server.stand_by() or 0.0, 6))
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (0.4, 60.0)
    now_s += 60.0
    server.stand_by()
    now_s += 3600.0
    server.forget_ended([job.channel.fileno() for job in server._standby])
    assert server.stand_by() == pytest.approx(0.1), "one that stood for long is made again at once"


def test_burst_has_more_jobs_stand_by_for_the_next(
    open_dispatcher: Callable[..., AnsibleDispatcher], folder: Path
) -> None:
    dispatcher = open_dispatcher()
    standing_by(dispatcher)
    assert dispatcher.fork_server_pid is not None
    # They all wait for it when it goes on, so it has no time between them to start others.
    os.kill(dispatcher.fork_server_pid, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(6) as callers:
            names = [f"op-{number}" for number in range(6)]
            asked = [callers.submit(dispatcher.start, request(name, hosts=1)) for name in names]
            until(
                lambda: all((folder / "runs" / name / "1" / "plan.json").exists() for name in names), "all have plans"
            )
            os.kill(dispatcher.fork_server_pid, signal.SIGCONT)
            runs = [one.result(WAIT_S) for one in asked]
    finally:
        os.kill(dispatcher.fork_server_pid, signal.SIGCONT)
    assert [follow(run)[1].status for run in runs] == ["successful"] * 6
    until(lambda: len(all_below(dispatcher.fork_server_pid or 0)) > 8, "more than two playbooks wait")
    assert started_with(follow(dispatcher.start(request("op-more")))[0]) == {"warm=True"}


def test_jobs_that_nobody_needed_any_more_are_let_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = ForkServer(folder / "fork.sock", "site.yml", most_standing=4)
    now_s = 0.0
    monkeypatch.setattr(os, "fork", lambda: 1001)
    monkeypatch.setattr(time, "monotonic", lambda: now_s)

    def go_on(until_s: float) -> None:
        nonlocal now_s
        while now_s < until_s and (wait_s := server.stand_by()) is not None:
            now_s = min(now_s + wait_s, until_s)
        now_s = until_s

    go_on(1.0)
    assert len(server._standby) == 2
    for _ in range(5):
        server._demand.missed(now_s)
    go_on(2.0)
    standing = [job.channel for job in server._standby]
    assert len(standing) == 4, "as many as are allowed, of seven"
    go_on(1.0 + 3 * QUIET_S)
    assert len(server._standby) == 2
    assert sum(channel.fileno() == -1 for channel in standing) == 2, "what is let go is told so"
    assert server.stand_by() is None, "nothing is left to wake up for"


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
