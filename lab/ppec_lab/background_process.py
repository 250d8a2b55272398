# SPDX-License-Identifier: Apache-2.0
"""A process that outlives the one that started it and can be found again by a file."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ppec_lab.conditions import wait_until


@dataclass(frozen=True)
class BackgroundProcess:
    """`<directory>/<name>.pid` names the process, `<name>.log` has what it printed.

    The file holds the pid and the time the process started, so that a pid used again by somebody else's process is
    never mistaken for ours, nor signalled.
    """

    directory: Path
    name: str

    @property
    def log(self) -> Path:
        return self.directory / f"{self.name}.log"

    @property
    def _pid_file(self) -> Path:
        return self.directory / f"{self.name}.pid"

    def start(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Starts it in a session of its own; does nothing when it already runs."""
        if self.pid() is not None:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            child = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, **(environment or {})},
            )
        self._pid_file.write_text(json.dumps({"pid": child.pid, "started": _start_time(child.pid)}))

    def pid(self) -> int | None:
        """The pid while the process runs."""
        try:
            known = json.loads(self._pid_file.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        pid = int(known["pid"])
        return pid if _start_time(pid) == known["started"] else None

    def stop(self, timeout_s: float = 20.0) -> None:
        """Asks it to end and waits; a process that doesn't is killed. May be repeated."""
        self._signal(signal.SIGTERM)
        if not self._ended_within(timeout_s):
            self.kill()
        self._pid_file.unlink(missing_ok=True)

    def kill(self) -> None:
        """kill -9, and waits until it is gone."""
        self._signal(signal.SIGKILL)
        wait_until(lambda: self.pid() is None, f"{self.name} is gone", timeout_s=60)

    def send(self, number: signal.Signals) -> None:
        """Sends a signal, if it runs."""
        self._signal(number)

    def tail(self, lines: int = 20) -> str:
        """The last lines of its log, for a message that says why it didn't come up."""
        if not self.log.exists():
            return ""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def _signal(self, number: signal.Signals) -> None:
        pid = self.pid()
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _ended_within(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while self.pid() is not None:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True


def _start_time(pid: int) -> str | None:
    """Clock ticks after boot at which the process started; None when it is gone.

    A killed process is a zombie as soon as its first thread is dead, while others may still hold its sockets open. Our
    own child is gone when it can be reaped, and no sooner; of somebody else's, being a zombie has to do.
    """
    ours = True
    try:
        if os.waitpid(pid, os.WNOHANG)[0] == pid:
            return None
    except ChildProcessError:
        ours = False
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" and not ours else fields[19]
