# SPDX-License-Identifier: Apache-2.0
"""What is asked of hosts directly: one suite on simulated hosts and on a real proxy with agentd, and what a host that
means harm gets from the client of proxies."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import ssl
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol
from uuid import UUID, uuid4

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from ppec_contract.agent import StartVms
from ppec_contract.errors import PpecError
from ppec_contract.guest import QueryGuests, QueryGuestsReply, ReadConsole, ReadConsoleReply, WriteConsole
from ppec_contract.guest import WriteConsoleReply as Written
from ppec_contract.vm import VmInfo, VmState
from ppec_lab.local_cloud import LocalCloud
from ppec_orchestrator.dispatch.simulated import SimulatedFleet
from ppec_orchestrator.host_views import proxy
from ppec_orchestrator.host_views.port import HostDoor, HostViews
from ppec_orchestrator.host_views.proxy import ProxyViews
from ppec_orchestrator.host_views.simulated import SimulatedViews
from ppec_orchestrator.pki.ca import FleetCa, KeyPair
from ppec_orchestrator.pki.keys import new_key

pytestmark = pytest.mark.anyio
SOON_S = 60


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class SuiteHost(Protocol):
    """A host with one running VM, `web`."""

    views: HostViews
    door: HostDoor
    vm_id: UUID

    def write(self, data: bytes) -> None:
        """As the guest would, on its console."""

    def act(self, action: str) -> None:
        """`stop`, `start`, `delete`: as an operation would."""


class SimulatedHost:
    def __init__(self) -> None:
        self.vm_id = uuid4()
        self._fleet = SimulatedFleet()
        self.views = SimulatedViews(self._fleet)
        self.door = HostDoor("h1", "127.0.0.1", 1)
        self._vms = self._fleet.vms["h1"]
        self._vms[self.vm_id] = VmInfo(
            vm_id=self.vm_id, name="web", state=VmState.RUNNING, vcpus=2, memory_mib=256, disk_mib=64, managed=True
        )

    def write(self, data: bytes) -> None:
        self.views.consoles[self.vm_id] += data

    def act(self, action: str) -> None:
        if action == "delete":
            del self._vms[self.vm_id]
            return
        state = {"stop": VmState.STOPPED, "start": VmState.RUNNING}[action]
        self._vms[self.vm_id] = self._vms[self.vm_id].model_copy(update={"state": state})


class RealHost:
    """agentd with its fake hypervisor behind the real proxy; the certificate is the orchestrator's own."""

    def __init__(self, cloud: LocalCloud) -> None:
        self._cloud = cloud
        (host,) = cloud.hosts
        self.door = HostDoor(host.name, host.address, host.port)
        pki = cloud.orchestrator.state_dir / "pki"
        self.views = ProxyViews(KeyPair(pki / "orchestrator.crt", pki / "orchestrator.key", pki / "ca.crt"))
        self._cloud.ended(cloud.create(name="web")["operation_id"])
        self.vm_id = UUID(cloud.vms()[0]["vm_id"])
        (self._folder,) = host.vm_folders()

    def write(self, data: bytes) -> None:
        with (self._folder / "console.log").open("ab") as log:
            log.write(data)

    def act(self, action: str) -> None:
        asked = {"action": action, "vms": [str(self.vm_id)], "force": True, "timeout_s": 0}
        operation = self._cloud.orchestrator.request("POST", "/v1/vms/actions", asked)
        assert self._cloud.ended(operation["operation_id"])["state"] == "succeeded"


@pytest.fixture(scope="module")
def cloud() -> Iterator[LocalCloud]:
    directory = Path(tempfile.mkdtemp(prefix="ppec-views-", dir="/tmp"))
    made = LocalCloud(directory)
    try:
        made.start(hosts=1)
        yield made
    finally:
        made.remove()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(params=["simulated", "proxy"])
def host(request: pytest.FixtureRequest) -> Iterator[SuiteHost]:
    if request.param == "simulated":
        yield SimulatedHost()
        return
    cloud = request.getfixturevalue("cloud")
    yield RealHost(cloud)
    for vm in cloud.vms():
        operation = cloud.orchestrator.request("DELETE", f"/v1/vms/{vm['vm_id']}")
        cloud.ended(operation["operation_id"])


async def code_of(call: Awaitable[object]) -> str:
    try:
        await call
    except PpecError as error:
        return error.code
    return ""


async def test_guests_are_asked_and_strangers_are_left_out(host: SuiteHost) -> None:
    async with host.views.line(host.door) as line:
        for _ in range(3):  # on one connection
            reply = await line.ask(QueryGuests(vm_ids=(host.vm_id, uuid4())), QueryGuestsReply)
            (guest,) = reply.guests
            assert (guest.vm_id, guest.hostname, guest.agent_connected) == (host.vm_id, "web", True)


async def test_what_changes_a_host_never_goes_this_way(host: SuiteHost) -> None:
    async with host.views.line(host.door) as line:
        with pytest.raises(TypeError, match="operation"):
            await line.ask(StartVms(operation_id="op-1", fence=1, vm_ids=(host.vm_id,)), Written)


async def test_a_console_is_followed_through_a_stop_to_its_vm_s_end(host: SuiteHost) -> None:
    host.write(b"0123456789")
    got, states = b"", []
    question = ReadConsole(vm_id=host.vm_id, tail_bytes=4)

    async with (
        asyncio.timeout(SOON_S),
        host.views.line(host.door) as line,
        aclosing(line.follow(question, ReadConsoleReply)) as pieces,
    ):

        async def until(found: Callable[[], bool]) -> None:
            nonlocal got
            while not found():
                piece = await anext(pieces)
                got += base64.b64decode(piece.data)
                states.extend([piece.state] if piece.state is not None else [])

        await until(lambda: got == b"6789" and states == [VmState.RUNNING])
        await asyncio.to_thread(host.write, b"\xff\x00bye")
        await until(lambda: got == b"6789\xff\x00bye")
        await asyncio.to_thread(host.act, "stop")
        await until(lambda: states == [VmState.RUNNING, VmState.STOPPED])
        await asyncio.to_thread(host.act, "start")
        await until(lambda: states == [VmState.RUNNING, VmState.STOPPED, VmState.RUNNING])
        await asyncio.to_thread(host.act, "delete")
        async for piece in pieces:
            states.extend([piece.state] if piece.state is not None else [])
    assert VmState.STOPPED not in states[3:]


async def test_without_follow_it_ends_with_what_is_there(host: SuiteHost) -> None:
    host.write(b"abc")
    async with host.views.line(host.door) as line:
        question = ReadConsole(vm_id=host.vm_id, follow=False)
        pieces = [piece async for piece in line.follow(question, ReadConsoleReply)]
    assert b"".join(base64.b64decode(piece.data) for piece in pieces) == b"abc"


async def test_typing_is_counted_and_refused_when_off(host: SuiteHost) -> None:
    typed = WriteConsole(vm_id=host.vm_id, data=base64.b64encode(b"x\x00y").decode())
    async with host.views.line(host.door) as line:
        assert (await line.ask(typed, Written)).written_bytes == 3
        await asyncio.to_thread(host.act, "stop")
        assert await code_of(line.ask(typed, Written)) == "vm.wrong_state"
        await asyncio.to_thread(host.act, "start")
        assert (await line.ask(typed, Written)).written_bytes == 3


async def test_a_vm_that_is_not_there(host: SuiteHost) -> None:
    async with host.views.line(host.door) as line:
        first = anext(line.follow(ReadConsole(vm_id=uuid4()), ReadConsoleReply))
        assert await code_of(first) == "vm.not_found"
    async with host.views.line(host.door) as line:
        typed = WriteConsole(vm_id=uuid4(), data="eA==")
        assert await code_of(line.ask(typed, Written)) == "vm.not_found"


# --- hosts that mean harm, and hosts that are none --------------------------------------------------------------------


@dataclass
class Impostor:
    """TLS with certificates of the fleet's, and an answer of the test's own; `heard` is what it was sent."""

    folder: Path
    ca: FleetCa
    heard: bytes = b""
    connections: int = 0

    @property
    def views(self) -> ProxyViews:
        return ProxyViews(self.ca.orchestrator_pair)

    @asynccontextmanager
    async def answering(self, answer: bytes, name: str = "h1", pause: asyncio.Event | None = None) -> Any:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(*self._certificate(name))
        tls.load_verify_locations(self.ca.orchestrator_pair.ca_path)
        tls.verify_mode = ssl.CERT_REQUIRED

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.connections += 1
            try:
                self.heard += await reader.readuntil(b"\r\n\r\n")
                writer.write(answer)
                await writer.drain()
                if pause is not None:
                    await pause.wait()
            except (OSError, asyncio.IncompleteReadError):
                pass
            finally:
                writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
        async with server:
            yield HostDoor("h1", "127.0.0.1", server.sockets[0].getsockname()[1])

    def _certificate(self, name: str) -> tuple[Path, Path]:
        if "/" in name:
            pair = self.ca.orchestrator_pair
            return pair.certificate_path, pair.key_path
        from cryptography import x509
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.x509.oid import NameOID

        key = new_key()
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
        request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, SHA256())
        csr = request.public_bytes(Encoding.PEM).decode()
        issued = self.ca.issue_host(csr, name, "127.0.0.1", now=datetime.now(UTC))
        certificate, private = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        certificate.write_text(issued.pem)
        private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return certificate, private


@pytest.fixture
def impostor(tmp_path: Path) -> Impostor:
    ca = FleetCa.open(tmp_path / "pki", now=datetime.now(UTC))
    ca.ensure_orchestrator(["localhost"], now=datetime.now(UTC))
    return Impostor(tmp_path, ca)


def http(body: bytes, status: str = "200 OK", **headers: str) -> bytes:
    more = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status}\r\n{more}".encode() + b"content-length: %d\r\n\r\n" % len(body) + body


QUESTION = QueryGuests(vm_ids=(UUID(int=1),))
CONSOLE = ReadConsole(vm_id=UUID(int=1))


async def asked(impostor: Impostor, door: HostDoor) -> PpecError:
    with pytest.raises(PpecError) as refused:
        async with asyncio.timeout(SOON_S), impostor.views.line(door) as line:
            await line.ask(QUESTION, QueryGuestsReply)
    return refused.value


async def followed(impostor: Impostor, door: HostDoor) -> PpecError:
    async with asyncio.timeout(SOON_S), impostor.views.line(door) as line:
        try:
            async for _ in line.follow(CONSOLE, ReadConsoleReply):
                pass
        except PpecError as error:
            return error
    pytest.fail("it was believed")


@pytest.mark.parametrize("name", ["h2", "ppec://orchestrator/main"])
async def test_another_one_s_certificate_is_sent_nothing(impostor: Impostor, name: str) -> None:
    async with impostor.answering(http(b'{"guests": []}'), name) as door:
        for call in (asked, followed):
            error = await call(impostor, door)
            assert error.code == "host.unreachable"
            assert "wanted ppec://host/h1, found ppec://" in error.message
    assert impostor.heard == b""


async def test_another_ca_s_host_is_sent_nothing(impostor: Impostor, tmp_path: Path) -> None:
    other = FleetCa.open(tmp_path / "other", now=datetime.now(UTC))
    other.ensure_orchestrator(["localhost"], now=datetime.now(UTC))
    (tmp_path / "files").mkdir()
    stranger = Impostor(tmp_path / "files", other)
    async with stranger.answering(http(b'{"guests": []}')) as door:
        assert (await asked(impostor, door)).code == "host.unreachable"
    assert stranger.heard == b""


PROBLEM = PpecError("agent.busy", "x" * 5000, details={"big": "y" * 9000}).problem().model_dump_json().encode()
NOT_YOU = PpecError("auth.wrong_identity", "not you").problem().model_dump_json().encode()
TOO_MUCH = b"a" * (proxy.MAX_REPLY_BYTES + 100)


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (b"", "host.unreachable"),
        (b"SSH-2.0-x\r\n", "host.unreachable"),
        (b"HTTP/1.1 200 OK\r\n" + b"x: " + b"y" * 200_000, "host.unreachable"),
        (http(b"{}"), "host.unreachable"),
        (http(b'{"guests": [{"vm_id": 1}]}'), "host.unreachable"),
        (http(b"[" * 100_000), "host.unreachable"),
        (http(TOO_MUCH), "host.unreachable"),
        (http(b'{"guests": []}')[:-3], "host.unreachable"),
        (http(b"", "302 Found", location="https://elsewhere.example"), "host.unreachable"),
        (http(PROBLEM, "503 Service Unavailable"), "agent.busy"),
        (http(NOT_YOU, "403 Forbidden"), "internal.error"),
        (http(b"<html>", "500 Oops"), "host.unreachable"),
    ],
)
async def test_an_answer_that_is_none_of_the_contract_s(impostor: Impostor, answer: bytes, code: str) -> None:
    async with impostor.answering(answer) as door:
        error = await asked(impostor, door)
        assert error.code == code
        assert len(error.message) < 3000
        assert len(json.dumps(error.details)) < 5000
        assert impostor.connections == 1  # asked once, whatever it said


def line_of(reply: dict[str, Any]) -> bytes:
    return json.dumps(reply).encode() + b"\n"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (line_of({"parameters": {"data": ""}, "continues": True}), "host.unreachable"),
        (line_of({"parameters": {"data": "", "more": 1}}), "host.unreachable"),
        (line_of({"error": "x.y", "parameters": {}}), "host.unreachable"),
        (line_of({"error": "cloud.ppec.agent.Failed", "parameters": json.loads(PROBLEM)}), "agent.busy"),
        (b"not json\n", "host.unreachable"),
        (TOO_MUCH, "host.unreachable"),
    ],
)
async def test_a_stream_that_is_none_of_the_contract_s(impostor: Impostor, body: bytes, code: str) -> None:
    async with impostor.answering(http(body)) as door:
        assert (await followed(impostor, door)).code == code


async def test_what_nobody_takes_is_not_fetched(impostor: Impostor) -> None:
    """A host that writes without end fills sockets, not our memory."""
    sent, pause = [0], asyncio.Event()
    piece = line_of({"parameters": {"data": "eA==" * 10_000}, "continues": True})

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 999999999\r\n\r\n")
            while True:
                writer.write(piece)
                await writer.drain()
                sent[0] += len(piece)
        except OSError:
            pause.set()

    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(*impostor._certificate("h1"))
    server = await asyncio.start_server(flood, "127.0.0.1", 0, ssl=tls)
    async with server, asyncio.timeout(SOON_S):
        door = HostDoor("h1", "127.0.0.1", server.sockets[0].getsockname()[1])
        async with impostor.views.line(door) as line:
            pieces = line.follow(CONSOLE, ReadConsoleReply)
            await anext(pieces)
            before = -1
            while before != sent[0]:
                before = sent[0]
                await asyncio.sleep(0.2)
            await pieces.aclose()
        await pause.wait()
    assert sent[0] < 32 * 1024 * 1024
