# SPDX-License-Identifier: Apache-2.0
"""The orchestrator as a real process, over real TLS."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from sqlalchemy import insert, select, update

from ppec_lab.orchestrator_process import free_port
from ppec_orchestrator.pki.keys import key_pem, new_key
from ppec_orchestrator.serve import main
from ppec_orchestrator.store import tables
from ppec_orchestrator.store.database import Database

READY_S = 60
HOST = {"name": "h1", "rack": "r1", "vrf": "red", "address": "192.0.2.1"}


class Process:
    """`ppec-orchestrator` with its own state folder and port."""

    def __init__(self, place: Path) -> None:
        self.state = place / "state"
        self.port = free_port()
        self.config = place / "orchestrator.toml"
        self.config.write_text(f'listen = ["127.0.0.1"]\nport = {self.port}\nheartbeat_interval_s = 5.0\n')
        self.environment = os.environ | {"PPEC_STATE_DIR": str(self.state)}

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "ppec_orchestrator.serve", "--config", str(self.config), *words]

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words), env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )

    @contextmanager
    def serving(self) -> Iterator[subprocess.Popen[bytes]]:
        with (self.config.parent / "log").open("ab") as log:
            process = subprocess.Popen(self.command("serve"), env=self.environment, stderr=log, stdout=log)
        try:
            self._wait_until_ready(process)
            yield process
        finally:
            process.kill()
            process.wait(READY_S)

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        until = time.monotonic() + READY_S
        while time.monotonic() < until:
            assert process.poll() is None, self.log()
            try:
                with self.client() as client:
                    if client.get("/v1/health").status_code == 200:
                        return
            except (httpx2.HTTPError, FileNotFoundError):
                time.sleep(0.1)
        pytest.fail(f"not ready: {self.log()}")

    def log(self) -> str:
        return (self.config.parent / "log").read_text()

    def client(self, certificate: tuple[Path, Path] | None = None, token: str = "") -> httpx2.Client:
        context = ssl.create_default_context(cafile=str(self.state / "pki" / "ca.crt"))
        if certificate is not None:
            context.load_cert_chain(*certificate)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx2.Client(base_url=f"https://localhost:{self.port}", verify=context, headers=headers, timeout=30)

    def admin(self) -> httpx2.Client:
        return self.client(token=(self.state / "admin.token").read_text().strip())


@pytest.fixture
def orchestrator(tmp_path: Path) -> Process:
    return Process(tmp_path)


def _enrolled(orchestrator: Process, place: Path, token: str) -> tuple[Path, Path]:
    """h1's certificate and key, by its token."""
    key: ec.EllipticCurvePrivateKey = new_key()
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    body = {"host": "h1", "token": token, "csr_pem": request.public_bytes(Encoding.PEM).decode()}
    with orchestrator.client() as client:
        reply = client.post("/v1/enrol", json=body)
    assert reply.status_code == 201, reply.text
    certificate, key_path = place / "h1.crt", place / "h1.key"
    certificate.write_text(reply.json()["certificate_pem"])
    key_path.write_bytes(key_pem(key))
    return certificate, key_path


def test_a_host_joins_over_tls_and_the_record_survives_a_kill(orchestrator: Process, tmp_path: Path) -> None:
    with orchestrator.serving() as process:
        with orchestrator.admin() as admin:
            for path, body in (
                ("datacentres", {"name": "dc1", "region": "north"}),
                ("clusters", {"name": "c1", "datacentre": "dc1"}),
                ("racks", {"name": "r1", "cluster": "c1"}),
                ("vrfs", {"name": "red"}),
                ("hosts", HOST),
            ):
                assert admin.post(f"/v1/{path}", json=body).status_code == 201
            token = admin.post("/v1/hosts/h1/enrolment-token").json()["token"]
        pair = _enrolled(orchestrator, tmp_path, token)
        beat = {"agent_started_at_unix_ms": 1, "sequence": 1, "digest": "0" * 64}
        with orchestrator.client(pair) as host:
            answer = host.post("/v1/hosts/h1/heartbeat", json=beat)
            assert (answer.status_code, answer.json()["send_report"]) == (200, True)
            assert answer.json()["heartbeat_interval_s"] == 5.0
            assert host.post("/v1/hosts/h2/heartbeat", json=beat).json()["code"] == "auth.wrong_identity"
            assert host.get("/v1/hosts").json()["code"] == "auth.required"
        process.send_signal(signal.SIGKILL)
        process.wait(READY_S)
    with orchestrator.serving() as process, orchestrator.admin() as admin:
        assert admin.get("/v1/hosts/h1").json()["liveness"] in ("enrolled", "up", "unknown")
        with orchestrator.client(pair) as host:
            assert host.post("/v1/hosts/h1/heartbeat", json=beat).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(READY_S) == 0
    assert token not in orchestrator.log()
    assert (orchestrator.state / "admin.token").read_text().strip() not in orchestrator.log()
    assert "request.failed" not in orchestrator.log()
    # Each start knows the fleet before anybody asks for a VM: of no host at first, of one later.
    read = [line for line in orchestrator.log().splitlines() if "fleet.read" in line]
    assert ["hosts=0" in read[0] or '"hosts": 0' in read[0], "hosts=1" in read[1] or '"hosts": 1' in read[1]] == [
        True
    ] * 2


def _host_with_room(orchestrator: Process, admin: httpx2.Client) -> None:
    """As if h1 had reported eight cores and would be heard for an hour more; and all that a VM needs."""
    for path, body in (
        ("datacentres", {"name": "dc1", "region": "north"}),
        ("clusters", {"name": "c1", "datacentre": "dc1"}),
        ("racks", {"name": "r1", "cluster": "c1"}),
        ("vrfs", {"name": "red"}),
        ("prefixes", {"vrf": "red", "cidr": "10.0.0.0/27", "bridge": "br0", "cluster": "c1"}),
        ("flavors", {"name": "small", "vcpus": 2, "memory_mib": 512, "disk_mib": 1024}),
        ("hosts", HOST),
    ):
        assert admin.post(f"/v1/{path}", json=body).status_code == 201, path
    assert admin.put("/v1/images/tiny?format=raw", content=b"x" * 1024).status_code == 201
    database = Database(f"sqlite:///{orchestrator.state}/ppec.db")
    later = datetime.now(UTC) + timedelta(hours=1)
    with database.write() as conn:
        (host_id,) = conn.execute(select(tables.host.c.id)).scalars()
        conn.execute(update(tables.host).values(enrolled_at=later, last_seen_at=later, disk_mib=100_000))
        conn.execute(
            insert(tables.host_cell).values(
                host_id=host_id, cell=0, socket=0, threads_per_core=2, cores=8, memory_mib=16384, cores_used=0,
                memory_used_mib=0,
            )
        )  # fmt: skip
    database.close()


def test_the_settings_ask_for_an_approval_which_survives_a_kill(orchestrator: Process) -> None:
    with orchestrator.config.open("a") as config:
        config.write("approvals_vms_from = 2\n")
    asked = {"name": "web", "count": 2, "flavor": "small", "image": "tiny", "user_data": "hunter2"}
    with orchestrator.serving() as process:
        token = orchestrator.run("token", "create", "checker", "--role", "operator").stdout.strip()
        with orchestrator.admin() as admin, orchestrator.client(token=token) as checker:
            _host_with_room(orchestrator, admin)
            assert admin.post("/v1/vms", json=asked).json()["code"] == "approval.required"
            plan = admin.post("/v1/plans", json=asked).json()
            assert (plan["executable"], plan["needs_approval"]) == (True, True)
            path = f"/v1/plans/{plan['plan_id']}"
            assert admin.post(f"{path}/execute").json()["code"] == "approval.required"
            assert admin.post(f"{path}/approve").json()["code"] == "approval.by_maker"
            approved = checker.post(f"{path}/approve").json()
            assert (approved["state"], approved["approved_by"]) == ("approved", "checker")
            process.send_signal(signal.SIGKILL)
            process.wait(READY_S)
    with orchestrator.serving(), orchestrator.admin() as admin:
        assert admin.get(path).json() == approved
        assert not admin.post("/v1/plans", json=asked).json()["needs_approval"]
    assert "hunter2" not in orchestrator.log()


def test_tokens_made_and_revoked_and_a_certificate_of_another_fleet(orchestrator: Process, tmp_path: Path) -> None:
    made = orchestrator.run("token", "create", "ci", "--role", "viewer")
    assert made.returncode == 0, made.stderr
    told = json.loads(made.stderr)
    assert (told["event"], told["action"], told["subject"]) == ("audit", "create_token", "ci viewer")
    assert made.stdout.strip() not in made.stderr
    (tmp_path / "other").mkdir()
    stranger = Process(tmp_path / "other")
    issued = stranger.run("certificate", "issue", "--operator", "eve", "--directory", str(tmp_path / "eve"))
    assert issued.returncode == 0, issued.stderr
    pair = (tmp_path / "eve" / "eve.crt", tmp_path / "eve" / "eve.key")
    assert pair[1].stat().st_mode & 0o777 == 0o600
    with orchestrator.serving(), orchestrator.client(token=made.stdout.strip()) as client:
        assert client.get("/v1/flavors").status_code == 200
        assert client.post("/v1/vrfs", json={"name": "x"}).status_code == 403
        with orchestrator.client(pair) as eve, pytest.raises(httpx2.HTTPError):
            eve.get("/v1/health")
        assert orchestrator.run("token", "revoke", "ci").returncode == 0
        until = time.monotonic() + 30
        while client.get("/v1/flavors").status_code == 200 and time.monotonic() < until:
            time.sleep(0.2)
        assert client.get("/v1/flavors").status_code == 401


@pytest.mark.parametrize(
    ("words", "environment", "exit_code", "said"),
    [
        (["token", "revoke", "nobody"], {}, 2, "there is no token"),
        (["migrate"], {"PPEC_PORT": "70000"}, 2, "port"),
        (["migrate"], {"PPEC_DATABASE_URL": "mysql://u:hunter2@h/d"}, 2, "neither sqlite nor postgresql"),
        (["migrate"], {"PPEC_STATE_DIR": "/proc/nope"}, 2, "state_dir"),
        (["token", "create", "../x", "--role", "admin"], {}, 2, "lower-case letters"),
    ],
)
def test_what_can_not_be_done_is_said_in_a_sentence(
    orchestrator: Process, words: list[str], environment: dict[str, str], exit_code: int, said: str
) -> None:
    orchestrator.environment = orchestrator.environment | environment
    ended = orchestrator.run(*words)
    assert (ended.returncode, said in ended.stderr) == (exit_code, True), ended.stderr
    assert "Traceback" not in ended.stderr
    assert "hunter2" not in ended.stderr


def test_second_one_on_a_state_directory_leaves_the_first_alone(orchestrator: Process) -> None:
    with orchestrator.serving():
        ansible = orchestrator.state / "ansible"
        files = (ansible / "ansible.cfg", ansible / "bin" / "ansible-playbook")
        written = {path: path.stat().st_mtime_ns for path in files}
        second = orchestrator.run("serve")
        assert second.returncode != 0
        assert "another orchestrator runs on the state directory" in second.stdout + second.stderr
        assert {path: path.stat().st_mtime_ns for path in written} == written


def test_a_port_in_use_is_said(orchestrator: Process) -> None:
    with socket.create_server(("127.0.0.1", orchestrator.port)):
        ended = orchestrator.run("serve")
    assert ended.returncode == 2
    assert f"can't listen on 127.0.0.1 port {orchestrator.port}" in ended.stderr


def _answer(orchestrator: Process, sent: bytes) -> bytes:
    """All that comes back, until the server closes the connection; who is still sending is not reset."""
    context = ssl.create_default_context(cafile=str(orchestrator.state / "pki" / "ca.crt"))
    answer = b""
    with (
        socket.create_connection(("localhost", orchestrator.port), timeout=30) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        connection.sendall(sent)
        while chunk := connection.recv(4096):
            answer += chunk
    return answer


def _takes_endlessly(orchestrator: Process, head: bytes) -> bool:
    """Whether a body without an end is taken for as long as it is sent, here 64 MiB."""
    context = ssl.create_default_context(cafile=str(orchestrator.state / "pki" / "ca.crt"))
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    with (
        socket.create_connection(("localhost", orchestrator.port), timeout=30) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        try:
            connection.sendall(head + b"host: o\r\ntransfer-encoding: chunked\r\n\r\n")
            for _ in range(1024):
                connection.sendall(chunk)
        except OSError:
            return False
    return True


def test_body_that_was_refused_is_not_read_on(orchestrator: Process) -> None:
    viewer = orchestrator.run("token", "create", "ci", "--role", "viewer").stdout.strip().encode()
    upload = b"PUT /v1/images/x?format=raw HTTP/1.1\r\nauthorization: Bearer " + viewer + b"\r\n"
    with orchestrator.serving():
        assert not _takes_endlessly(orchestrator, b"POST /v1/enrol HTTP/1.1\r\n")
        assert not _takes_endlessly(orchestrator, upload)
        forbidden = _answer(orchestrator, upload + b"content-length: 9000000\r\n\r\n" + b"x" * 100_000)
    assert forbidden.startswith(b"HTTP/1.1 403 ")
    assert b"auth.forbidden" in forbidden


def test_strangers_are_cut_off(orchestrator: Process) -> None:
    """Anybody may connect, so nobody may fill the memory before having said who they are."""
    endless_head = b"GET /v1/health HTTP/1.1\r\n" + b"".join(b"x-%d: %s\r\n" % (n, b"y" * 1000) for n in range(67))
    head = b"POST /v1/vms HTTP/1.1\r\nhost: o\r\ncontent-type: application/json\r\ncontent-length: 8000000\r\n\r\n"
    with orchestrator.serving():
        too_long = _answer(orchestrator, endless_head)
        body_never_sent = _answer(orchestrator, head)
        body_begun = _answer(orchestrator, head + b'{"name": "' + b"a" * 100_000)
    assert too_long.startswith(b"HTTP/1.1 400 ")
    assert b"request.malformed" in too_long
    for answer in (body_never_sent, body_begun):
        assert answer.startswith(b"HTTP/1.1 401 ")
        assert b"auth.required" in answer


@pytest.fixture
def own_collector() -> Iterator[None]:
    """The tests' own is as before afterwards."""
    thresholds = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)
    gc.enable()


@pytest.mark.usefixtures("own_collector")
def test_garbage_is_collected_once_the_server_is_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = []
    monkeypatch.setattr("ppec_orchestrator.process.serve", lambda settings: found.append(gc.isenabled()))
    config = tmp_path / "orchestrator.toml"
    config.write_text(f'state_dir = "{tmp_path}"\n')
    assert main(["--config", str(config), "serve"]) == 0
    assert found == [True]
    assert gc.get_freeze_count() > 0
