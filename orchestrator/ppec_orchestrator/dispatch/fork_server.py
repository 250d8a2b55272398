# SPDX-License-Identifier: Apache-2.0
"""The fork server: a process with Ansible imported, from which job and playbook processes are forked.

One thread, so a fork is a clean copy. Requests are packets on a UNIX socket (0600, same user only), each with
descriptors (SCM_RIGHTS):

- `job` (from the orchestrator): a job process gets the run, in a session of its own; the answer is its process id.
- `playbook` (from the drop-in `ansible-playbook`): a *keeper* is forked, which forks the playbook, waits for it and
  answers its exit code. When the drop-in is killed the keeper kills the playbook with all its workers.

Jobs *stand by*: forked and started before their runs are known, up to a playbook that waits for the plan. They end when
the server does. The next one is started a moment after a request, so as not to compete with it. There are two, because
a caller who deletes what it has made and goes on comes again sooner than that, and more when requests have found none
(`dispatch/demand.py`).

The server ends when its standard input does, that is with the orchestrator that started it. What was given work lives
on: a keeper answers by itself, a job needs nobody.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ppec_orchestrator.dispatch import descendants, job, playbook_child
from ppec_orchestrator.dispatch.demand import MOST_STANDING_BY, Demand
from ppec_orchestrator.dispatch.rundir import RunDirectory

MAX_REQUEST_BYTES = 1 << 20
_REQUEST_TIMEOUT_S = 5.0
# By then the host's agent has the request, and its work is mostly waiting.
_REFILL_DELAY_S = 0.1
# Requests that keep coming don't put it off for longer.
_LONGEST_REFILL_DELAY_S = 0.3
# Starting one takes a processor for about as long.
_REFILL_PACE_S = 0.05
# A job that ended sooner did so by itself; the pause after such ones grows up to this.
_STABLE_S, _LONGEST_DELAY_S = 30.0, 60.0
_FAILED = 250


@dataclass(frozen=True, slots=True)
class Request:
    """One packet, decoded. `kind` is `playbook` or `job`; environment values may hold any bytes but NUL."""

    kind: str
    directory: str
    umask: int
    argv: Sequence[str]
    environment: Mapping[str, str]
    descriptors: Sequence[int]

    @classmethod
    def decode(cls, body: bytes, descriptors: Sequence[int]) -> Request:
        kind, directory, umask, count, *rest = body.split(b"\0")
        words = [os.fsdecode(part) for part in rest]
        environment = dict(pair.partition("=")[::2] for pair in words[int(count) :])
        argv = words[: int(count)]
        return cls(kind.decode(), os.fsdecode(directory), int(umask, 8), argv, environment, descriptors)

    def encode(self) -> bytes:
        head = [self.kind, self.directory, f"{self.umask:o}", str(len(self.argv)), *self.argv]
        return b"\0".join(os.fsencode(w) for w in [*head, *(f"{k}={v}" for k, v in self.environment.items())])


class ForkServer:
    """The accept loop. Everything that can block for long happens in a fork."""

    def __init__(self, path: Path, playbook: str, most_standing: int = MOST_STANDING_BY) -> None:
        self._path = path
        self._playbook = playbook
        self._demand = Demand(most_standing)
        # Oldest first.
        self._standby: deque[_Standby] = deque()
        self._fork_at_s = 0.0
        self._short_since_s: float | None = None
        self._short_lived = 0
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        part.unlink(missing_ok=True)
        self._listener.bind(str(part))
        part.chmod(0o600)
        self._listener.listen(64)
        # In place only once it answers, and over an older server's socket.
        part.rename(path)

    def serve(self) -> None:
        """Until standard input ends."""
        signal.signal(signal.SIGCHLD, _reap)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        while True:
            wait_s = self.stand_by()
            poll = select.poll()
            for fd in (0, self._listener.fileno(), *(one.channel.fileno() for one in self._standby)):
                poll.register(fd, select.POLLIN)
            ready = dict(poll.poll(None if wait_s is None else wait_s * 1000))
            if 0 in ready and not os.read(0, 64):
                return
            self.forget_ended(ready)
            if self._listener.fileno() in ready:
                connection, _ = self._listener.accept()
                with connection:
                    self._answer(connection)

    def stand_by(self) -> float | None:
        """Sees that as many jobs stand by as are wanted, starting one at most.

        In how many seconds to come again, if there is more to do.
        """
        now_s = time.monotonic()
        again_s = self._demand.look(now_s)
        while len(self._standby) > self._demand.wanted:
            # It ends without a run.
            self._standby.popleft().channel.close()
        if len(self._standby) < self._demand.wanted and now_s >= self._fork_at_s:
            # Where nothing can be forked now, the next request tries again, and so does the next look.
            self._fork_at_s, self._short_since_s = now_s + _REFILL_PACE_S, None
            with contextlib.suppress(OSError):
                self._standby.append(self._fork_job())
        if len(self._standby) < self._demand.wanted:
            again_s = min(again_s, self._fork_at_s)
        return None if again_s == math.inf else max(0.0, again_s - now_s)

    def forget_ended(self, told: Container[int]) -> None:
        """Jobs that have ended while they stood by: their channels, on which they never say anything, tell."""
        now_s = time.monotonic()
        for one in [one for one in self._standby if one.channel.fileno() in told]:
            self._standby.remove(one)
            one.channel.close()
            # One that ends as soon as it stands would be forked in a circle.
            self._short_lived = self._short_lived + 1 if now_s - one.since_s < _STABLE_S else 0
            self._fork_at_s = now_s + min(_REFILL_DELAY_S * 2 ** min(self._short_lived, 16), _LONGEST_DELAY_S)

    def _answer(self, connection: socket.socket) -> None:
        connection.settimeout(_REQUEST_TIMEOUT_S)
        descriptors: list[int] = []
        try:
            if _peer_uid(connection) != os.geteuid():
                return
            body, descriptors, _, _ = socket.recv_fds(connection, MAX_REQUEST_BYTES, 3)
            if not body:
                return
            request = Request.decode(body, descriptors)
            if request.kind == "job":
                pid = self._hand_over(body, descriptors, not_for_a_fork=(connection.fileno(), *descriptors))
                connection.send(str(pid).encode())
            elif request.kind == "playbook":
                self._fork(lambda: _keep_playbook(request, connection))
            else:
                raise ValueError(request.kind)
        except (OSError, ValueError) as error:
            sys.stderr.write(f"fork server: request refused: {type(error).__name__}\n")
        finally:
            for fd in descriptors:
                os.close(fd)

    def _hand_over(self, body: bytes, descriptors: Sequence[int], not_for_a_fork: Sequence[int]) -> int:
        """Gives the run to the job that stands by; its process id."""
        now_s = time.monotonic()
        self._short_since_s = now_s if self._short_since_s is None else self._short_since_s
        self._fork_at_s = min(now_s + _REFILL_DELAY_S, self._short_since_s + _LONGEST_REFILL_DELAY_S)
        while self._standby:
            ready = self._standby.popleft()
            # One that has ended refuses.
            with ready.channel, contextlib.suppress(OSError):
                _send(ready.channel, body, descriptors)
                self._demand.taken(left=len(self._standby))
                return ready.pid
        self._demand.missed(now_s)
        fresh = self._fork_job(not_for_it=not_for_a_fork)
        with fresh.channel:
            _send(fresh.channel, body, descriptors)
        return fresh.pid

    def _fork_job(self, *, not_for_it: Sequence[int] = ()) -> _Standby:
        """A job that waits for its run. What it is not to have open comes to it with the run, or never."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

        def stand_by() -> int:
            ours.close()
            for fd in not_for_it:
                os.close(fd)
            return _stand_by(theirs, self._playbook)

        try:
            pid = self._fork(stand_by)
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        return _Standby(pid, ours, time.monotonic())

    def _fork(self, work: Callable[[], int]) -> int:
        pid = os.fork()
        if pid == 0:
            code = _FAILED
            try:
                self._listener.close()
                # Or the jobs that stand by would not see the server's end as long as this fork lives.
                for other in self._standby:
                    other.channel.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                code = work()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        return pid


@dataclass(frozen=True, slots=True)
class _Standby:
    """A job that stands by since then (monotonic), and the channel on which it gets its run."""

    pid: int
    channel: socket.socket
    since_s: float


def _send(channel: socket.socket, body: bytes, descriptors: Sequence[int]) -> None:
    channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, len(body) + 65536)
    socket.send_fds(channel, [body], descriptors)


def _stand_by(channel: socket.socket, playbook: str) -> int:
    """In a job: starts before there is a run, and ends without one when the server does."""
    os.setsid()
    os.umask(0o077)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1):
        os.dup2(null, fd)
    os.close(null)
    standing = job.Job(playbook)
    threading.Thread(target=_await_run, args=(channel, standing), daemon=True).start()
    return job.work(standing)


def _await_run(channel: socket.socket, standing: job.Job) -> None:
    try:
        body, descriptors, _, _ = socket.recv_fds(channel, MAX_REQUEST_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
        # The lock among the descriptors stays open as long as this process lives.
        if body and standing.give(RunDirectory(Path(Request.decode(body, descriptors).directory))):
            return
    except BaseException:
        traceback.print_exc()
    finally:
        channel.close()
    # Whatever it was: a playbook that waits for ever would keep the run from being repeated.
    standing.abandon()


def _keep_playbook(request: Request, connection: socket.socket) -> int:
    """In the keeper: the playbook as a child, its exit code as the answer, its end when nobody waits for it."""
    os.setsid()
    descendants.adopt_orphans()
    connection.setblocking(True)
    # First, or a keeper that is killed in between has the drop-in start a second playbook beside its own. A failure
    # shows at the next look at the connection, which is what ends the playbook.
    with contextlib.suppress(OSError):
        connection.send(b"taken")
    child = os.fork()
    if child == 0:
        return _exit_with(lambda: _playbook(request, connection))
    for fd in request.descriptors:
        os.close(fd)
    code = _wait(child, connection)
    # Killed playbook or not: no worker of it may go on talking to a host.
    descendants.end_all()
    with contextlib.suppress(OSError):
        connection.send(str(code).encode())
    return 0


def _wait(child: int, connection: socket.socket) -> int:
    end = os.pidfd_open(child)
    poll = select.poll()
    poll.register(end, select.POLLIN)
    poll.register(connection, select.POLLIN)
    ready = dict(poll.poll())
    if end not in ready:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) & 0xFF


def _playbook(request: Request, connection: socket.socket) -> int:
    # Only the keeper answers on it, and only the keeper's end may end it.
    connection.close()
    os.setsid()
    _place(request.descriptors)
    os.umask(request.umask)
    return playbook_child.become_playbook(request.argv, request.environment, request.directory)


def _exit_with(work: Callable[[], int]) -> int:
    """Like `sys.exit`, without climbing through the keeper's stack."""
    code = _FAILED
    try:
        code = work()
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def _place(descriptors: Sequence[int]) -> None:
    for target, fd in enumerate(descriptors):
        os.dup2(fd, target, inheritable=True)
    for fd in descriptors:
        if fd > 2:
            os.close(fd)


def _peer_uid(connection: socket.socket) -> int:
    size = struct.calcsize("3i")
    _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return int(uid)


def _reap(number: int, frame: object) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def main() -> None:
    parser = argparse.ArgumentParser(prog="ppec-fork-server")
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--playbook", type=Path, required=True, help="what jobs run")
    parser.add_argument("--most-standing", type=int, default=MOST_STANDING_BY, help="how many jobs may stand by")
    arguments = parser.parse_args()
    path = arguments.socket
    playbook_child.warm_up(job.callback_folder(), arguments.playbook)
    job.warm_up()
    # Keeps the collector from touching, and so copying, what the forks share.
    gc.collect()
    gc.freeze()
    server = ForkServer(path, str(arguments.playbook), arguments.most_standing)
    try:
        os.write(1, b"ready\n")
    except BrokenPipeError:
        return  # Whoever started us is gone already.
    server.serve()


if __name__ == "__main__":
    main()
