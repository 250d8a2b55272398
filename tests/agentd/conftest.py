# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the agent's tests: an agent put together in process on the fake hypervisor, and one as a real process."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import http.server
import ipaddress
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

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


# --- an orchestrator to report to and fetch images from --------------------------------------------------------


class FleetCa:
    """A throw-away fleet CA; `issue` gives the paths of a certificate and its key for one URI identity."""

    def __init__(self, folder: Path) -> None:
        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import NameOID

        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fleet CA")])
        self.path = folder / "ca.pem"
        constraints = x509.BasicConstraints(ca=True, path_length=0)
        self._write(self.path, self._name, self._key.public_key(), [constraints])

    def issue(self, identity: str) -> tuple[Path, Path]:
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        names = x509.SubjectAlternativeName(
            [x509.UniformResourceIdentifier(identity), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        )
        stem = identity.removeprefix("ppec://").replace("/", "-")
        certificate, key_path = self._folder / f"{stem}.pem", self._folder / f"{stem}.key"
        self._write(certificate, x509.Name([]), key.public_key(), [names])
        pem, pkcs8, plain = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        key_path.write_bytes(key.private_bytes(pem, pkcs8, plain))
        return certificate, key_path

    def _write(self, path: Path, subject: Any, public_key: Any, extensions: list[Any]) -> None:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization

        now = datetime.datetime.now(datetime.UTC)
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(self._name).public_key(public_key)
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(1))
        builder = builder.not_valid_after(now + datetime.timedelta(1))
        for extension in extensions:
            builder = builder.add_extension(extension, critical=True)
        path.write_bytes(builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))


class Orchestrator:
    """An HTTPS server that keeps what it is sent and serves `files`. `answers` are what requests get, by method.

    `troubles` befall GETs, one each: a status to answer, or "cut" to hang up in mid-body, "silent" to say nothing more.
    """

    def __init__(self, folder: Path, identity: str = "ppec://orchestrator/main") -> None:
        folder.mkdir(exist_ok=True)
        self.ca = FleetCa(folder)
        self.requests: list[tuple[str, str, dict[str, Any]]] = []
        self.peers: list[str] = []
        self.files: dict[str, bytes] = {}
        self.troubles: list[int | Literal["cut", "silent"]] = []
        self.answers: dict[str, tuple[int, Any]] = {
            "PUT": (204, None),
            "POST": (200, {"send_report": False, "heartbeat_interval_s": 0.5, "report_interval_s": 60.0}),
        }
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._note({})
                content = outer.files.get(self.path)
                trouble = outer.troubles.pop(0) if outer.troubles else 404 if content is None else 200
                if isinstance(trouble, int):
                    self._answer(trouble, content or b"" if trouble == 200 else b"")
                    return
                self._answer(200, content or b"", sent=len(content or b"") // 2)
                if trouble == "silent":
                    outer.closed.wait(60)
                self.close_connection = True

            def do_PUT(self) -> None:
                self._note(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                status, body = outer.answers[self.command]
                self._answer(status, b"" if body is None else json.dumps(body).encode())

            def do_POST(self) -> None:
                self.do_PUT()

            def _note(self, body: dict[str, Any]) -> None:
                certificate = self.connection.getpeercert()  # type: ignore[attr-defined]
                outer.peers += [value for kind, value in certificate["subjectAltName"] if kind == "URI"]
                outer.requests.append((self.command, self.path, body))

            def _answer(self, status: int, content: bytes, sent: int | None = None) -> None:
                self.send_response(status)
                if status != 204:
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[:sent])

            def log_message(self, *_: Any) -> None:
                pass

        self._handler = Handler
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(*self.ca.issue(identity))
        self._context.load_verify_locations(self.ca.path)
        self._context.verify_mode = ssl.CERT_REQUIRED
        self.closed = threading.Event()
        self._port = 0
        self.open()
        self.url = f"https://127.0.0.1:{self._port}"
        certificate, key = self.ca.issue("ppec://host/h1")
        self.tls = {"ca_path": str(self.ca.path), "certificate_path": str(certificate), "key_path": str(key)}

    def open(self) -> None:
        """Listens; after `close`, on the same port again."""
        self.closed.clear()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self._port), self._handler)
        self._port = self._server.server_address[1]
        self._server.daemon_threads = True
        self._server.socket = self._context.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Connections are refused from now on."""
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()

    def sent(self, method: str) -> list[dict[str, Any]]:
        return [body for seen, _, body in self.requests if seen == method]


@pytest.fixture
def orchestrator(tmp_path: Path) -> Iterator[Callable[..., Orchestrator]]:
    made: list[Orchestrator] = []

    def make(identity: str = "ppec://orchestrator/main") -> Orchestrator:
        made.append(Orchestrator(tmp_path / f"orchestrator-{len(made)}", identity))
        return made[-1]

    yield make
    for server in made:
        server.close()
