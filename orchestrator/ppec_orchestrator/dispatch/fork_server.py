# SPDX-License-Identifier: Apache-2.0
"""The fork server: a process with Ansible imported, from which job and playbook processes are forked.

One thread, no state, so a fork is a clean copy. Requests are packets on a UNIX socket (0600, same user only), each
with descriptors (SCM_RIGHTS):

- `playbook` (from the drop-in `ansible-playbook`): a *keeper* is forked, which forks the playbook, waits for it and
  answers its exit code. When the drop-in is killed the keeper kills the playbook with all its workers.
- `job` (from the orchestrator): a job process is forked, in a session of its own; the answer is its process id.

Forking takes a few milliseconds, so it is done beforehand: of each kind one *spare* waits for its request. It ends when
the server does.

The server ends when its standard input does, that is with the orchestrator that started it. What was given work lives
on: a keeper answers by itself, a job needs nobody.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import select
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ppec_orchestrator.dispatch import descendants, job, playbook_child

MAX_REQUEST_BYTES = 1 << 20
_REQUEST_TIMEOUT_S = 2.0
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

    def __init__(self, path: Path) -> None:
        self._path = path
        self._spares: dict[str, _Spare] = {}
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
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(0, select.POLLIN)
        while True:
            self._refill()
            ready = dict(poll.poll())
            if 0 in ready and not os.read(0, 64):
                return
            if self._listener.fileno() in ready:
                connection, _ = self._listener.accept()
                with connection:
                    self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        connection.settimeout(_REQUEST_TIMEOUT_S)
        descriptors: list[int] = []
        try:
            if _peer_uid(connection) != os.geteuid():
                return
            body, descriptors, _, _ = socket.recv_fds(connection, MAX_REQUEST_BYTES, 3)
            if not body:
                return
            kind = Request.decode(body, ()).kind
            if kind not in _WORK:
                raise ValueError(kind)
            pid = self._hand_over(kind, body, [connection.fileno(), *descriptors])
            if kind == "job":
                connection.send(str(pid).encode())
        except (OSError, ValueError) as error:
            sys.stderr.write(f"fork server: request refused: {type(error).__name__}\n")
        finally:
            for fd in descriptors:
                os.close(fd)

    def _hand_over(self, kind: str, body: bytes, descriptors: Sequence[int]) -> int:
        """Gives the request to the kind's spare; its process id."""
        spare = self._spares.pop(kind, None)
        if spare is not None:
            with spare.channel, contextlib.suppress(OSError):
                _send(spare.channel, body, descriptors)
                return spare.pid
        # There is none, or it was killed while it waited.
        spare = self._fork(kind, not_for_it=descriptors)
        with spare.channel:
            _send(spare.channel, body, descriptors)
        return spare.pid

    def _refill(self) -> None:
        # Where nothing can be forked now, the next request tries again.
        with contextlib.suppress(OSError):
            for kind in _WORK:
                if kind not in self._spares:
                    self._spares[kind] = self._fork(kind)

    def _fork(self, kind: str, *, not_for_it: Sequence[int] = ()) -> _Spare:
        """A fork that waits for its request. What it is not to have open comes to it with the request, or never."""
        ours, theirs = _channel()
        try:
            pid = os.fork()
        except OSError:
            ours.close()
            theirs.close()
            raise
        if pid == 0:
            ours.close()
            for fd in not_for_it:
                os.close(fd)
            self._in_fork(lambda: _WORK[kind](theirs))
        theirs.close()
        return _Spare(pid, ours)

    def _in_fork(self, work: Callable[[], int]) -> None:
        code = _FAILED
        try:
            self._listener.close()
            # Or a spare would not see the server's end as long as this fork lives.
            for spare in self._spares.values():
                spare.channel.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)


@dataclass(frozen=True, slots=True)
class _Spare:
    """A fork that waits on `channel` for its request."""

    pid: int
    channel: socket.socket


def _channel() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _send(channel: socket.socket, body: bytes, descriptors: Sequence[int]) -> None:
    channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, len(body) + 65536)
    socket.send_fds(channel, [body], descriptors)


def _receive(channel: socket.socket) -> tuple[Request, socket.socket] | None:
    """The request and the connection it came on; None when the server has ended and there will be none."""
    with channel:
        body, descriptors, _, _ = socket.recv_fds(channel, MAX_REQUEST_BYTES, 4)
    if not body:
        return None
    return Request.decode(body, descriptors[1:]), socket.socket(fileno=descriptors[0])


def _keep_playbook(channel: socket.socket) -> int:
    """In the keeper: the playbook as a child, its exit code as the answer, its end when nobody waits for it."""
    os.setsid()
    descendants.adopt_orphans()
    ours, theirs = _channel()
    child = os.fork()
    if child == 0:
        ours.close()
        channel.close()
        return _exit_with(lambda: _playbook(theirs))
    theirs.close()
    received = _receive(channel)
    if received is None:
        ours.close()
        os.waitpid(child, 0)
        return 0
    request, connection = received
    with ours:
        _send(ours, request.encode(), [connection.fileno(), *request.descriptors])
    for fd in request.descriptors:
        os.close(fd)
    connection.setblocking(True)
    # Its failure shows at the next look at the connection, which is what ends the playbook.
    with contextlib.suppress(OSError):
        connection.send(b"taken")
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


def _playbook(channel: socket.socket) -> int:
    received = _receive(channel)
    if received is None:
        return 0
    request, connection = received
    # Only the keeper answers on it, and only the keeper's end may end it.
    connection.close()
    os.setsid()
    _place(request.descriptors)
    os.umask(request.umask)
    return playbook_child.become_playbook(request.argv, request.environment, request.directory)


def _run_job(channel: socket.socket) -> int:
    received = _receive(channel)
    if received is None:
        return 0
    request, connection = received
    connection.close()
    os.setsid()
    lock = request.descriptors[0]
    os.umask(request.umask)
    os.chdir(request.directory)
    os.environ.clear()
    os.environ.update(request.environment)
    return job.run_job(Path(request.argv[0]), lock)


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


# What a fork does, given the channel on which its request will come; its exit code.
_WORK: Mapping[str, Callable[[socket.socket], int]] = {"playbook": _keep_playbook, "job": _run_job}


def main() -> None:
    parser = argparse.ArgumentParser(prog="ppec-fork-server")
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--playbook", type=Path, required=True, help="what most forks will run")
    arguments = parser.parse_args()
    path = arguments.socket
    playbook_child.warm_up(job.callback_folder(), arguments.playbook)
    job.warm_up()
    # Keeps the collector from touching, and so copying, what the forks share.
    gc.collect()
    gc.freeze()
    server = ForkServer(path)
    try:
        os.write(1, b"ready\n")
    except BrokenPipeError:
        return  # Whoever started us is gone already.
    server.serve()


if __name__ == "__main__":
    main()
