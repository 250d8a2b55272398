# SPDX-License-Identifier: Apache-2.0
"""The agent as a real process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ppec_agentd.settings import Settings
from ppec_lab.conditions import wait_until

from .agent_settings import settings_of
from .varlink_client import Client


class AgentProcess:
    """`ppec-agentd` as a process of its own, on settings written to a file."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder = folder
        self.settings = settings
        self._config = folder / "agentd.toml"
        self._log = folder / "agentd.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.write_settings(settings)

    def write_settings(self, settings: Settings) -> None:
        self.settings = settings
        self._config.write_text(_toml(settings.model_dump(mode="json", exclude_none=True)))

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def spawn(self) -> None:
        argv = [sys.executable, "-m", "ppec_agentd.serve", "--config", str(self._config)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(argv, stderr=log, stdin=subprocess.DEVNULL)

    def start(self) -> AgentProcess:
        self.spawn()
        wait_until(self._answers, f"the agent answers; see {self._log}", timeout_s=60)
        return self

    def _answers(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError(f"the agent ended: {self._log.read_text()}")
        with contextlib.suppress(OSError, EOFError):
            return "parameters" in self.client().call("GetVersion")
        return False

    def client(self, timeout_s: float = 60) -> Client:
        return Client(self.settings.socket.path, timeout_s)

    def kill(self) -> None:
        self.end(signal.SIGKILL)

    def end(self, signum: signal.Signals = signal.SIGTERM) -> int:
        if self._process is None:
            return 0
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signum)
        status = self._process.wait(timeout=60)
        self._process = None
        return status

    def log_lines(self) -> list[dict[str, Any]]:
        """The lines written so far; of one that is just being written nothing."""
        whole, _, _ = self._log.read_bytes().rpartition(b"\n")
        return [json.loads(line) for line in whole.splitlines() if line.startswith(b"{")]


def _toml(document: dict[str, Any]) -> str:
    """JSON's scalars and lists are TOML's; sections are one level deep, or tables written inline."""
    scalars = [f"{k} = {_inline(v)}" for k, v in document.items() if not isinstance(v, dict)]
    tables = [
        "\n".join([f"[{name}]", *(f"{k} = {_inline(v)}" for k, v in table.items())])
        for name, table in document.items()
        if isinstance(table, dict)
    ]
    return "\n\n".join(["\n".join(scalars), *tables]) + "\n"


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {_inline(v)}" for k, v in value.items()) + " }"
    return json.dumps(value)


@pytest.fixture
def agent_process(short_dir: Path) -> Iterator[Callable[..., AgentProcess]]:
    """Makes agent processes (not started yet); all end with the test."""
    made: list[AgentProcess] = []

    def make(settings: Settings | None = None, **changes: Any) -> AgentProcess:
        folder = short_dir / f"a{len(made)}"
        folder.mkdir()
        made.append(AgentProcess(folder, settings or settings_of(folder, **changes)))
        return made[-1]

    yield make
    for process in made:
        process.kill()
