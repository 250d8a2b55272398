# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the agent's tests: an agent put together in process on the fake hypervisor, and one as a real process."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ppec_agentd.actions.batch import Actions
from ppec_agentd.actions.context import HostContext
from ppec_agentd.assembly import make_context, make_hypervisor, prepare_state
from ppec_agentd.fake_hypervisor import FakeHypervisor
from ppec_agentd.report import ReportSource
from ppec_agentd.service import Service
from ppec_agentd.settings import Settings
from ppec_contract.agent import CreateVms, DeleteVms, VmResult, VmsReply, WriteCall
from ppec_contract.vm import VmSpec
from ppec_lab.conditions import wait_until

TOPOLOGY = "sockets=2,cores=4,threads=2,memory_mib=8192"
IMAGE = b"PPEC" + bytes(1024 * 1024 - 4)
IMAGE_SHA256 = hashlib.sha256(IMAGE).hexdigest()


def settings_of(folder: Path, **changes: Any) -> Settings:
    """Settings of an agent on the fake hypervisor, whole in `folder`; `changes` replace sections' values."""
    document: dict[str, Any] = {
        "host": "h1",
        "hypervisor": "fake",
        "socket": {"path": str(folder / "agentd.sock"), "group": ""},
        "storage": {"state_dir": str(folder / "state"), "disk_mib": 100_000},
        "reserve": {"memory_per_cell_mib": 0},
        "lab": {"topology": TOPOLOGY, "bridges": ["br0"]},
    }
    for section, values in changes.items():
        document[section] = {**document.get(section, {}), **values} if isinstance(values, dict) else values
    return Settings.model_validate(document)


@dataclass
class Agent:
    """An agent without its socket. `emitted` is everything it streamed."""

    settings: Settings
    hypervisor: FakeHypervisor
    context: HostContext
    actions: Actions
    service: Service
    emitted: list[VmsReply] = field(default_factory=list)

    async def run(self, request: WriteCall) -> tuple[VmResult, ...]:
        return (await self.actions.run(request, self.emitted.append)).results

    async def create(self, *vms: VmSpec, operation: str = "op-1", fence: int = 1) -> tuple[VmResult, ...]:
        return await self.run(CreateVms(operation_id=operation, fence=fence, vms=vms))

    async def delete(self, *vm_ids: uuid.UUID, operation: str = "op-1", fence: int = 1) -> tuple[VmResult, ...]:
        return await self.run(DeleteVms(operation_id=operation, fence=fence, vm_ids=vm_ids))

    async def left_behind(self) -> dict[str, object]:
        """What is on the host: empty values mean nothing is."""
        vms = self.context.vms_dir
        totals = self.context.ledger.totals()
        return {
            "domains": [domain.name for domain in await self.hypervisor.domains()],
            "folders": sorted(path.name for path in vms.iterdir()) if vms.is_dir() else [],
            "held": [held.name for held in self.context.ledger.holdings()],
            "cores": totals.cores - totals.cores_free,
            "memory_mib": totals.memory_mib - totals.memory_free_mib,
            "disk_mib": totals.disk_mib - totals.disk_free_mib,
        }


NOTHING = {"domains": [], "folders": [], "held": [], "cores": 0, "memory_mib": 0, "disk_mib": 0}


@asynccontextmanager
async def open_agent(settings: Settings) -> AsyncIterator[Agent]:
    journal = prepare_state(settings.storage)
    hypervisor = make_hypervisor(settings)
    assert isinstance(hypervisor, FakeHypervisor)
    await hypervisor.open()
    context = await make_context(settings, hypervisor, journal)
    actions = Actions(context)
    try:
        yield Agent(settings, hypervisor, context, actions, Service(actions, ReportSource(settings.host, context)))
    finally:
        await actions.drain(10)
        await hypervisor.close()
        journal.close()


@dataclass(frozen=True)
class Words:
    """The names above, for test files: test folders are no packages to import from."""

    open_agent: Callable[[Settings], Any] = open_agent
    settings_of: Callable[..., Settings] = settings_of
    nothing: dict[str, object] = field(default_factory=lambda: dict(NOTHING))
    image: bytes = IMAGE
    image_sha256: str = IMAGE_SHA256


@pytest.fixture(scope="session")
def words() -> Words:
    return Words()


@pytest.fixture
def settings(short_dir: Path) -> Settings:
    return settings_of(short_dir)


@pytest.fixture(scope="session")
def image_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "small.raw"
    path.write_bytes(IMAGE)
    return path


@pytest.fixture
def vm(image_file: Path) -> Callable[..., VmSpec]:
    """Makes a VM's specification: two vCPUs, 512 MiB, a disk of 16 MiB, one NIC on br0."""
    made = iter(range(1, 10_000))

    def make(name: str | None = None, **changes: Any) -> VmSpec:
        number = next(made)
        image = {
            "name": "small",
            "sha256": IMAGE_SHA256,
            "size_bytes": len(IMAGE),
            "format": "raw",
            "url": image_file.as_uri(),
        }
        document: dict[str, Any] = {
            "vm_id": str(uuid.uuid4()),
            "name": name or f"vm-{number}",
            "vcpus": 2,
            "memory_mib": 512,
            "cells": [0],
            "root_disk": {"size_mib": 16, "image": image | changes.pop("image", {})},
            "nics": [{"mac": f"52:54:00:00:{number // 256:02x}:{number % 256:02x}", "bridge": "br0"}],
        }
        return VmSpec.model_validate_json(json.dumps(document | changes, default=str))

    return make


class Client:
    """A Varlink client on a blocking socket, written without the code under test."""

    def __init__(self, path: Path, timeout_s: float = 30) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(timeout_s)
        self.socket.connect(str(path))
        self._pending = b""

    def send(self, method: str, parameters: Any = None, **flags: bool) -> None:
        message = {"method": method, "parameters": parameters or {}, **flags}
        self.socket.sendall(json.dumps(message, default=str).encode() + b"\0")

    def receive(self) -> dict[str, Any]:
        while b"\0" not in self._pending:
            data = self.socket.recv(65536)
            if not data:
                raise EOFError("the agent hung up")
            self._pending += data
        frame, self._pending = self._pending.split(b"\0", 1)
        answer: dict[str, Any] = json.loads(frame)
        return answer

    def call(self, method: str, parameters: Any = None, **flags: bool) -> dict[str, Any]:
        """The last reply; a bare name is a method of the agent's interface."""
        self.send(method if "." in method else f"cloud.ppec.agent.{method}", parameters, **flags)
        while (reply := self.receive()).get("continues"):
            pass
        return reply

    def close(self) -> None:
        self.socket.close()


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
        return [json.loads(line) for line in self._log.read_text().splitlines() if line.startswith("{")]


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
