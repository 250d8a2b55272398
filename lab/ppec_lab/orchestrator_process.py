# SPDX-License-Identifier: Apache-2.0
"""A real orchestrator on this machine: its process, its settings, and the CLI as its user."""

from __future__ import annotations

import json
import os
import socket
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ppec_lab.background_process import BackgroundProcess
from ppec_lab.conditions import wait_until

BIN = Path(sys.executable).parent


class CliError(RuntimeError):
    """`ppec` ended with an error; `exit_code` is the error table's."""

    def __init__(self, arguments: tuple[str, ...], exit_code: int, errors: str) -> None:
        super().__init__(f"ppec {' '.join(arguments)} ended with {exit_code}: {errors.strip()}")
        self.exit_code = exit_code
        self.errors = errors


@dataclass(frozen=True)
class OrchestratorProcess:
    """An orchestrator whose whole state is in `directory`; `addresses` are those it listens on."""

    directory: Path
    port: int
    addresses: tuple[str, ...] = ("127.0.0.1",)
    database_url: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def process(self) -> BackgroundProcess:
        return BackgroundProcess(self.directory, "orchestrator")

    @property
    def state_dir(self) -> Path:
        return self.directory / "state"

    @property
    def url(self) -> str:
        """Where hosts reach it: the last of its addresses."""
        return f"https://{self.addresses[-1]}:{self.port}"

    @property
    def ca(self) -> Path:
        return self.state_dir / "pki" / "ca.crt"

    @property
    def token(self) -> str:
        return (self.state_dir / "admin.token").read_text().strip()

    def start(self) -> None:
        """Starts it, or finds it running, and waits until it answers."""
        self.directory.mkdir(parents=True, exist_ok=True)
        config = self.directory / "orchestrator.toml"
        config.write_text(self._settings())
        command = [str(BIN / "ppec-orchestrator"), "--config", str(config), "serve"]
        self.process.start(command, self.environment)
        wait_until(self._answers_or_died, "the orchestrator answers", timeout_s=60)

    def stop(self) -> None:
        self.process.stop()

    def ppec(self, *arguments: str, timeout_s: float = 300.0) -> Any:
        """Runs the CLI with `--output json` and returns what it printed, parsed. Raises CliError."""
        done = subprocess.run(
            [str(BIN / "ppec"), "--output", "json", *arguments],
            env=self.user_environment(),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if done.returncode:
            raise CliError(arguments, done.returncode, done.stderr)
        return json.loads(done.stdout) if done.stdout.strip() else None

    def user_environment(self) -> dict[str, str]:
        """What a shell needs for `ppec` to talk to this orchestrator."""
        user = {"PPEC_SERVER": self.local_url, "PPEC_TOKEN": self.token, "PPEC_CA": str(self.ca)}
        return {**os.environ, **user}

    @property
    def local_url(self) -> str:
        return f"https://{self.addresses[0]}:{self.port}"

    def request(self, method: str, path: str, body: Any = None, *, headers: Mapping[str, str] | None = None) -> Any:
        """One REST request as the administrator; the parsed answer, whatever its status is."""
        request = urllib.request.Request(  # noqa: S310 - always https
            self.local_url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={
                "Authorization": f"Bearer {self.token}",
                "Content-Type": "application/json",
                **(headers or {}),
            },
        )
        context = ssl.create_default_context(cafile=str(self.ca))
        try:
            with urllib.request.urlopen(request, context=context, timeout=60) as answer:  # noqa: S310
                text = answer.read()
        except urllib.error.HTTPError as error:
            text = error.read()
        return json.loads(text) if text else None

    def _answers_or_died(self) -> bool:
        if self.process.pid() is None:
            raise RuntimeError(f"the orchestrator ended at once:\n{self.process.tail()}")
        try:
            with socket.create_connection((self.addresses[0], self.port), timeout=1):
                return (self.state_dir / "admin.token").exists()
        except OSError:
            return False

    def _settings(self) -> str:
        lines = {
            "state_dir": str(self.state_dir),
            "listen": list(self.addresses),
            "port": self.port,
            # Hosts fetch images from the first name.
            "server_names": list(reversed(self.addresses)),
            **self.settings,
        }
        if self.database_url:
            lines["database_url"] = self.database_url
        # JSON's strings, numbers and lists are TOML's too.
        return "".join(f"{key} = {json.dumps(value)}\n" for key, value in lines.items())


# Bound for as long as this process lives.
_held: list[socket.socket] = []


def free_port() -> int:
    """A TCP port that is left to whoever is told of it, as long as this process lives.

    It stays bound, so that the kernel gives it to nobody else, neither to listen on nor to connect from. That doesn't
    keep a listener with SO_REUSEADDR from it, which ours have.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("", 0))
    _held.append(held)
    return int(held.getsockname()[1])
