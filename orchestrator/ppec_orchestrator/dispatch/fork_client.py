# SPDX-License-Identifier: Apache-2.0
"""The orchestrator's side of the fork server: starts it, asks it for job processes, replaces it when it is old."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import structlog

from ppec_orchestrator.dispatch.demand import MOST_STANDING_BY
from ppec_orchestrator.dispatch.dropin import SOCKET_VARIABLE
from ppec_orchestrator.dispatch.fork_server import Request
from ppec_orchestrator.dispatch.installation import Imported, Installation

_log = structlog.get_logger(__name__)
_SERVER_MODULE = "ppec_orchestrator.dispatch.fork_server"
_START_TIMEOUT_S = 30.0
# Long enough for a server that has stood still with the whole machine; without it the run would only be slower.
_ANSWER_TIMEOUT_S = 20.0
_RETRY_S = (0.0, 0.0, 1.0, 5.0, 30.0)
_STABLE_S = 5.0


class ForkClient:
    """Keeps one fork server. Everything works without it, only slower, so nothing here raises for its sake."""

    def __init__(
        self,
        installation: Installation,
        *,
        answer_timeout_s: float = _ANSWER_TIMEOUT_S,
        most_standing: int = MOST_STANDING_BY,
    ) -> None:
        self._installation = installation
        self._most_standing = most_standing
        self._answer_timeout_s = answer_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._imported: Imported | None = None
        self._stopping = threading.Event()
        self._wanted = threading.Event()
        self._guard: threading.Thread | None = None
        self._ready = threading.Condition()

    def start(self, *, wait: bool = False) -> None:
        """Starts the server and a thread that replaces it when it dies. With `wait`, until it answers."""
        self._wanted.set()
        self._guard = threading.Thread(target=self._keep, name="ppec-fork-guard", daemon=True)
        self._guard.start()
        if wait:
            self.wait_ready(_START_TIMEOUT_S)

    def wait_ready(self, timeout_s: float) -> bool:
        with self._ready:
            return self._ready.wait_for(lambda: self.pid is not None, timeout=timeout_s)

    @property
    def pid(self) -> int | None:
        """The running server's process id; None while there is none that answers."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def close(self) -> None:
        """Ends the server. Jobs and playbooks it has forked go on."""
        self._stopping.set()
        self._end()
        if self._guard is not None:
            self._guard.join(timeout=_START_TIMEOUT_S)

    def submit_job(self, directory: Path, lock: int) -> int | None:
        """The process id of the job that has the run, or None: then the caller starts one the slow way."""
        if self.pid is None:
            return None
        if self._imported is None or not self._imported.is_current(self._installation.environment()):
            _log.info("fork_server.outdated", reason="the collection, ansible.cfg or the environment changed")
            self._end()
            return None
        request = Request("job", str(directory), 0o077, (), {}, (lock,))
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
                connection.settimeout(self._answer_timeout_s)
                connection.connect(str(self._installation.socket))
                socket.send_fds(connection, [request.encode()], [lock])
                return int(connection.recv(64) or b"0") or None
        except (OSError, ValueError) as error:
            # One that hangs, or can't be reached any more, would make every run slow from now on.
            _log.warning("fork_server.unreachable", error=str(error) or type(error).__name__)
            self._end()
            return None

    def _keep(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            started = time.monotonic()
            try:
                process = self._launch()
            except OSError as error:
                _log.error("fork_server.failed", error=str(error))
                process = None
            if process is not None:
                process.wait()
                if process.stdin is not None:
                    process.stdin.close()
            # One that dies as soon as it stands is no better than one that doesn't come up.
            lived = process is not None and time.monotonic() - started >= _STABLE_S
            failures = 0 if lived else failures + 1
            self._stopping.wait(_RETRY_S[min(failures, len(_RETRY_S) - 1)])

    def _launch(self) -> subprocess.Popen[bytes] | None:
        imported = self._installation.imported()
        process = subprocess.Popen(
            server_command(self._installation, self._most_standing),
            env=imported.environment,
            cwd=self._installation.folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stdout is not None
        with process.stdout:
            line = process.stdout.readline()
        if line != b"ready\n":
            process.kill()
            _log.error("fork_server.failed", code=process.wait())
            return None
        if self._stopping.is_set():
            process.kill()
        with self._ready:
            self._process, self._imported = process, imported
            self._ready.notify_all()
        _log.info("fork_server.ready", pid=process.pid)
        return process

    def _end(self) -> None:
        with self._ready:
            process, self._process = self._process, None
            if process is None:
                return
            # The path goes first: a playbook that starts meanwhile must take the real ansible-playbook.
            self._installation.socket.unlink(missing_ok=True)
        # It has nothing to tidy up, and may be stopped.
        process.kill()


def server_command(installation: Installation, most_standing: int = MOST_STANDING_BY) -> list[str]:
    """The fork server's command line."""
    where = ["--socket", str(installation.socket), "--playbook", str(installation.playbook)]
    return [sys.executable, "-m", _SERVER_MODULE, *where, "--most-standing", str(most_standing)]


def start_job_process(installation: Installation, directory: Path, lock: int) -> int:
    """The slow way: a new interpreter. The process is nobody's to wait for; init reaps it when we are gone.

    Its playbook doesn't look for a fork server: there is none, or none that answers.
    """
    environment = installation.environment()
    del environment[SOCKET_VARIABLE]
    process = subprocess.Popen(
        [sys.executable, "-m", "ppec_orchestrator.dispatch.job", str(directory), str(lock), str(installation.playbook)],
        env=environment,
        cwd=directory,
        pass_fds=(lock,),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    threading.Thread(target=process.wait, name=f"ppec-job-{process.pid}", daemon=True).start()
    return process.pid
