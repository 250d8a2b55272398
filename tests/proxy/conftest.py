# SPDX-License-Identifier: Apache-2.0
"""A fleet CA, a proxy as a real process, and a scripted agent behind it."""

from __future__ import annotations

import contextlib
import datetime as dt
import http.client
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from ppec_contract.frames import FrameReader, encode

# Long enough for a loaded machine; reached only when a test fails.
DEADLINE_S = 60


@dataclass
class Credential:
    certificate: Path
    key: Path
    serial: int


class FleetCa:
    """Issues what the fleet CA would, and what it never would."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = dt.datetime.now(dt.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(self._name)
            .issuer_name(self._name)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=1))
            .not_valid_after(now + dt.timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.path = folder / f"{name}.ca.pem"
        self.path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, *uris: str, expired: bool = False, file: str | None = None) -> Credential:
        key = ec.generate_private_key(ec.SECP256R1())
        now = dt.datetime.now(dt.UTC)
        end = now - dt.timedelta(hours=1) if expired else now + dt.timedelta(days=1)
        serial = x509.random_serial_number()
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "peer")]))
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(serial)
            .not_valid_before(now - dt.timedelta(days=2))
            .not_valid_after(end)
        )
        if uris:
            names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri) for uri in uris])
            builder = builder.add_extension(names, critical=False)
        stem = file or f"{serial:x}"
        credential = Credential(self._folder / f"{stem}.crt", self._folder / f"{stem}.key", serial)
        credential.certificate.write_bytes(
            builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        )
        credential.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return credential


@pytest.fixture(scope="session")
def fleet_ca(tmp_path_factory: pytest.TempPathFactory) -> FleetCa:
    return FleetCa(tmp_path_factory.mktemp("ca"), "fleet")


@pytest.fixture(scope="session")
def other_ca(tmp_path_factory: pytest.TempPathFactory) -> FleetCa:
    return FleetCa(tmp_path_factory.mktemp("other"), "other")


class Call:
    """One call the agent was given, and how to answer it."""

    def __init__(self, message: dict[str, Any], connection: socket.socket) -> None:
        self.message = message
        self._connection = connection

    def reply(self, parameters: dict[str, Any], *, continues: bool = False) -> None:
        self.send({"parameters": parameters} | ({"continues": True} if continues else {}))

    def error(self, name: str, parameters: dict[str, Any] | None = None) -> None:
        self.send({"error": name, "parameters": parameters or {}})

    def send(self, message: dict[str, Any]) -> None:
        self._connection.sendall(encode(message))

    def raw(self, data: bytes) -> None:
        self._connection.sendall(data)

    def hang_up(self) -> None:
        self._connection.shutdown(socket.SHUT_RDWR)


VERSION = {"host": "h1", "agent_version": "0", "api_version": 1, "capabilities": []}


class ScriptedAgent:
    """The server's side of the socket; a test says by `script` what each call gets. One thread a connection."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.calls: list[dict[str, Any]] = []
        self.connections: list[socket.socket] = []
        self.finished = threading.Semaphore(0)
        self.script: Callable[[Call], None] = lambda call: call.reply(VERSION)
        self._listener: socket.socket | None = None
        self.listen()

    def listen(self) -> None:
        self.path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen(128)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def die(self) -> None:
        """What kill -9 looks like from outside: no listener, every connection closed."""
        assert self._listener is not None
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.connections.clear()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                self.connections.append(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        frames = FrameReader()
        with contextlib.suppress(OSError), connection:
            while data := connection.recv(65536):
                for message in frames.feed(data):
                    self.calls.append(message)
                    try:
                        self.script(Call(message, connection))
                    finally:
                        self.finished.release()


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.body.splitlines()]


@dataclass
class ProxyProcess:
    """The proxy, started by its own main(), with its log lines and address."""

    ca: FleetCa
    process: subprocess.Popen[bytes]
    port: int
    agent: ScriptedAgent
    config: Path
    log_path: Path
    server: Credential
    operator: Credential = field(init=False)

    def __post_init__(self) -> None:
        self.operator = self.ca.issue("ppec://operator/alice")

    def context(self, credential: Credential | None = None) -> ssl.SSLContext:
        chosen = credential or self.operator
        context = ssl.create_default_context(cafile=str(self.ca.path))
        context.check_hostname = False
        context.load_cert_chain(chosen.certificate, chosen.key)
        return context

    def connection(
        self, credential: Credential | None = None, source: str | None = None
    ) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection(
            "127.0.0.1",
            self.port,
            context=self.context(credential),
            timeout=DEADLINE_S,
            source_address=(source, 0) if source else None,
        )

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: dict[str, str] | None = None,
        credential: Credential | None = None,
    ) -> Answer:
        data = json.dumps(body).encode() if isinstance(body, dict | list) else body
        with contextlib.closing(self.connection(credential)) as connection:
            connection.request(method, path, data, headers or {})
            response = connection.getresponse()
            return Answer(response.status, dict(response.headers), response.read())

    def call(self, method: str, body: Any = None, *, stream: bool = False, **more: Any) -> Answer:
        headers = {"Accept": "application/x-ndjson"} if stream else {}
        return self.request("POST", f"/v1/agent/{method}", {} if body is None else body, headers=headers, **more)

    def log_lines(self) -> list[dict[str, Any]]:
        """The lines written so far; of one that is just being written nothing."""
        whole, _, _ = self.log_path.read_bytes().rpartition(b"\n")
        return [json.loads(line) for line in whole.splitlines()]


class ReadySocket:
    """Stands for systemd: receives what the daemon notifies."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.path))
        self._socket.settimeout(DEADLINE_S)

    def wait_for(self, assignment: str) -> list[str]:
        while True:
            received = self._socket.recv(4096).decode().split("\n")
            if assignment in received:
                return received


@pytest.fixture
def notify(short_dir: Path) -> ReadySocket:
    """To be given to `start_proxy`, for a test that waits for more than the start."""
    return ReadySocket(short_dir)


StartProxy = Callable[..., ProxyProcess]


@dataclass
class _Starter:
    folder: Path
    ca: FleetCa
    stack: contextlib.ExitStack
    count: int = 0

    def __call__(self, *, notify: ReadySocket | None = None, **settings: Any) -> ProxyProcess:
        self.count += 1
        folder = self.folder / str(self.count)
        folder.mkdir()
        ready = notify or ReadySocket(folder)
        agent = ScriptedAgent(folder / "agentd.sock")
        server = self.ca.issue("ppec://host/h1")
        values = {
            "listen_address": "127.0.0.1",
            "listen_port": 0,
            "allow_from": ["127.0.0.1/32"],
            "certificate_path": str(server.certificate),
            "key_path": str(server.key),
            "ca_path": str(self.ca.path),
            "agent_socket_path": str(agent.path),
        } | settings
        config = folder / "proxy.toml"
        config.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
        log_path = folder / "log"
        process = subprocess.Popen(
            [sys.executable, "-m", "ppec_proxy.serve", "--config", str(config)],
            env={**os.environ, "NOTIFY_SOCKET": str(ready.path)},
            stderr=self.stack.enter_context(log_path.open("wb")),
        )
        self.stack.callback(_end, process)
        status = next(part for part in ready.wait_for("READY=1") if part.startswith("STATUS="))
        return ProxyProcess(self.ca, process, int(status.split()[-1]), agent, config, log_path, server)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    process.wait(DEADLINE_S)


@pytest.fixture
def start_proxy(short_dir: Path, fleet_ca: FleetCa) -> Iterator[StartProxy]:
    """Starts a proxy of the test's own; keyword arguments are settings."""
    with contextlib.ExitStack() as stack:
        yield _Starter(short_dir, fleet_ca, stack)


@pytest.fixture(scope="module")
def shared_proxy(fleet_ca: FleetCa) -> Iterator[ProxyProcess]:
    folder = Path(tempfile.mkdtemp(prefix="ppec-proxy-", dir="/tmp"))
    with contextlib.ExitStack() as stack:
        yield _Starter(folder, fleet_ca, stack)()
    shutil.rmtree(folder)


@pytest.fixture
def proxy(shared_proxy: ProxyProcess) -> Iterator[ProxyProcess]:
    """A proxy shared by the tests of a file, its agent fresh for each."""
    shared_proxy.agent.calls.clear()
    shared_proxy.agent.finished = threading.Semaphore(0)
    shared_proxy.agent.script = lambda call: call.reply(VERSION)
    yield shared_proxy
    assert shared_proxy.process.poll() is None, "the proxy died"


def vm_spec(**changes: Any) -> dict[str, Any]:
    """A valid VM as JSON."""
    return {
        "vm_id": "6f2f9d0c-3b0b-4f55-9f2e-0d6c0b1a2c3d",
        "name": "web-1",
        "vcpus": 2,
        "memory_mib": 1024,
        "cells": [0],
        "root_disk": {
            "size_mib": 1024,
            "image": {
                "name": "tiny",
                "sha256": "ab" * 32,
                "size_bytes": 1,
                "format": "qcow2",
                "url": "https://orchestrator:8443/images/tiny",
            },
        },
    } | changes


@pytest.fixture
def create_call() -> Callable[..., dict[str, Any]]:
    """Parameters of a CreateVms call; keyword arguments change its one VM."""
    return lambda **changes: {"operation_id": "op-1", "fence": 1, "vms": [vm_spec(**changes)]}
