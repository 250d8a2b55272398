# SPDX-License-Identifier: Apache-2.0
"""The socket: who may speak, how frames are taken, what a broken or slow or vanished client does (nothing)."""

from __future__ import annotations

import asyncio
import contextlib
import grp
import json
import os
import random
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ppec_agentd.peer import AllowedPeers, Peer
from ppec_agentd.server import bind_socket
from ppec_agentd.settings import SocketSettings
from ppec_contract.agent import FAILED, METHODS
from ppec_contract.varlink_interface import interface_description
from ppec_lab.conditions import wait_until

# Long enough for a loaded machine; reached only when a test fails.
SOON_S = 60


@pytest.fixture
def agent(agent_process: Callable[..., Any]) -> Any:
    return agent_process(socket={"max_connections": 8}).start()


def create(*vms: Any, operation: str = "op-1", fence: int = 1) -> dict[str, Any]:
    return {"operation_id": operation, "fence": fence, "vms": [vm.model_dump(mode="json") for vm in vms]}


# --- Varlink, by an independent client -------------------------------------------------------------------------------


def test_an_independent_varlink_client_speaks_with_it(agent: Any, vm: Any) -> None:
    from asyncvarlink import VarlinkClientProtocol, VarlinkMethodCall, connect_unix_varlink

    async def scenario() -> None:
        transport, protocol = await connect_unix_varlink(VarlinkClientProtocol, agent.settings.socket.path)

        async def call(method: str, parameters: dict[str, Any]) -> Any:
            answer = await protocol.call(VarlinkMethodCall(method, parameters))
            assert answer is not None
            return answer[0]

        info = await call("org.varlink.service.GetInfo", {})
        assert info.parameters["interfaces"] == ["org.varlink.service", "cloud.ppec.agent"]
        described = await call("org.varlink.service.GetInterfaceDescription", {"interface": "cloud.ppec.agent"})
        assert described.parameters["description"] == interface_description()
        for method in METHODS:
            assert f"method {method}(" in described.parameters["description"]
        missing = await call("cloud.ppec.agent.Nope", {})
        assert missing.error == "org.varlink.service.MethodNotFound"
        unknown = await call("org.example.Nope", {})
        assert unknown.error == "org.varlink.service.InterfaceNotFound"

        request = VarlinkMethodCall("cloud.ppec.agent.CreateVms", create(vm(), vm()), more=True)
        replies = [reply async for reply, _ in protocol.call_more(request)]
        assert [bool(reply.continues) for reply in replies] == [True] * (len(replies) - 1) + [False]
        assert len(replies[-1].parameters["results"]) == 2
        transport.close()

    asyncio.run(scenario())


def test_pipelined_calls_are_answered_in_order(agent: Any, vm: Any) -> None:
    client = agent.client()
    client.send("cloud.ppec.agent.CreateVms", create(vm(name="slow")))
    client.send("cloud.ppec.agent.GetVersion", oneway=True)
    client.send("cloud.ppec.agent.ListVms")
    client.send("org.varlink.service.GetInfo")
    assert client.receive()["parameters"]["results"][0]["name"] == "slow"
    assert client.receive()["parameters"]["vms"][0]["name"] == "slow"
    assert client.receive()["parameters"]["product"] == "ppec-agentd"


def test_a_refused_request_names_the_fault_and_changes_nothing(agent: Any, vm: Any) -> None:
    client = agent.client()
    good = create(vm())
    for change, code in [
        ({"fence": -1}, "request.invalid"),
        ({"operation_id": "../../x"}, "request.invalid"),
        ({"surprise": 1}, "request.invalid"),
        ({"vms": []}, "request.invalid"),
        ({"vms": [good["vms"][0] | {"vcpus": 3}]}, "vm.odd_vcpus"),
        ({"vms": [good["vms"][0] | {"name": "{{ lookup('pipe','id') }}"}]}, "request.invalid"),
    ]:
        reply = client.call("CreateVms", good | change)
        assert reply["error"] == FAILED
        assert reply["parameters"]["code"] == code
        assert "Traceback" not in json.dumps(reply)
    assert client.call("ListVms")["parameters"]["vms"] == []


def test_a_client_that_leaves_mid_stream_cancels_nothing(agent_process: Callable[..., Any], vm: Any) -> None:
    agent = agent_process(lab={"delays_s": {"start": 0.3}}).start()
    one = vm()
    client = agent.client()
    client.send("cloud.ppec.agent.CreateVms", create(one), more=True)
    assert client.receive()["parameters"]["progress"]["stage"] == "admitted"
    client.close()
    watcher = agent.client()
    wait_until(
        lambda: [v["state"] for v in watcher.call("ListVms")["parameters"]["vms"]] == ["running"],
        "the VM runs although nobody waits for it",
        timeout_s=SOON_S,
    )
    replayed = watcher.call("CreateVms", create(one))["parameters"]["results"][0]
    assert replayed["changed"]
    assert replayed["problem"] is None


# --- frames ----------------------------------------------------------------------------------------------------------


def raw(agent: Any, data: bytes) -> bytes:
    """Everything the agent says to these bytes, until it hangs up or our own end is closed."""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(SOON_S)
        peer.connect(str(agent.settings.socket.path))
        try:
            peer.sendall(data)
            peer.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass
        said = b""
        try:
            while chunk := peer.recv(65536):
                said += chunk
        except ConnectionResetError:
            pass
        return said


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\0", "request.malformed"),
        (b"{}\0", "request.malformed"),
        (b"[]\0", "request.malformed"),
        (b'{"method":"a","method":"b"}\0', "request.malformed"),
        (b'{"method":"org.varlink.service.GetInfo","parameters":{"a":NaN}}\0', "request.malformed"),
        (b'{"method":"org.varlink.service.GetInfo","parameters":{"a":9223372036854775808}}\0', "request.malformed"),
        (b"\xff\xfe\0", "request.malformed"),
        (b"[" * 100_000 + b"\0", "request.malformed"),
        (b'{"method":1}\0', "request.malformed"),
        (b'{"method":"org.varlink.service.GetInfo","more":true,"oneway":true}\0', "request.malformed"),
        (b'{"method":"org.varlink.service.GetInfo","upgrade":true}\0', "request.malformed"),
        (b'"' + b"x" * (4 * 1024 * 1024 + 1), "request.too_large"),
    ],
    ids=range(12),
)
def test_a_broken_frame_gets_its_code(agent: Any, data: bytes, code: str) -> None:
    said = raw(agent, data)
    assert json.loads(said.split(b"\0")[0])["parameters"]["code"] == code


def test_a_frame_that_drips_in_is_cut_off(agent_process: Callable[..., Any]) -> None:
    agent = agent_process(socket={"frame_timeout_s": 0.5}).start()
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(SOON_S)
        peer.connect(str(agent.settings.socket.path))

        def cut_off() -> bool:
            try:
                peer.sendall(b" ")
            except (BrokenPipeError, ConnectionResetError):
                return True
            return False

        wait_until(cut_off, "the agent hangs up on a frame that never ends", timeout_s=SOON_S)


def mutated(frame: bytes, dice: random.Random) -> bytes:
    data = bytearray(frame)
    for _ in range(dice.randint(1, 4)):
        where = dice.randrange(len(data) + 1)
        match dice.randrange(6):
            case 0:
                del data[where:]
            case 1:
                data[where : where + 1] = bytes([dice.randrange(256)])
            case 2:
                data[where:where] = dice.choice([b"\0", b"{", b"[" * 40, b"NaN", b"-1", b'"', b"\xff", b"1e999"])
            case 3:
                del data[where : where + dice.randint(1, 30)]
            case 4:
                data[where:where] = data[: dice.randrange(len(data) + 1)][:200]
            case 5:
                data = bytearray(
                    data.replace(b'"fence":1', dice.choice([b'"fence":9223372036854775808', b'"fence":[]']))
                )
    return bytes(data) or b"\0"


def test_thousands_of_mutated_frames_change_nothing(agent: Any, vm: Any, words: Any) -> None:
    """Mutants of valid frames that, should one stay valid, ask for what is refused: an image of another content."""
    frames = [
        json.dumps({"method": "cloud.ppec.agent.CreateVms", "parameters": create(vm(image={"sha256": "0" * 64}))}),
        json.dumps({"method": "cloud.ppec.agent.StopVms", "parameters": {"operation_id": "op-9", "fence": 1}}),
        json.dumps({"method": "cloud.ppec.agent.ListVms", "parameters": {"vm_ids": []}, "more": True}),
        json.dumps({"method": "org.varlink.service.GetInterfaceDescription", "parameters": {"interface": "x"}}),
    ]
    dice = random.Random(20261120)
    before = agent.client().call("GetReport")["parameters"]["report"]
    memory_before = _resident_kib(agent.pid)
    sent = 0
    while sent < 6000:
        # A batch to a connection: the first broken one ends it, so most go one by one.
        said = raw(agent, mutated(dice.choice(frames).encode(), dice) + b"\0")
        for reply in filter(None, said.split(b"\0")):
            assert "Traceback" not in json.dumps(json.loads(reply))
        sent += 1
    after = agent.client().call("GetReport")["parameters"]["report"]
    assert after == before
    assert list((agent.settings.storage.vms).iterdir()) == []
    assert _resident_kib(agent.pid) - memory_before < 50 * 1024
    assert [line for line in agent.log_lines() if line["event"] in ("call_broke", "connection_failed")] == []


def _resident_kib(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4


# --- who may speak ---------------------------------------------------------------------------------------------------


def test_the_socket_has_its_mode_from_the_start_and_replaces_a_stale_one(short_dir: Path) -> None:
    path = short_dir / "s.sock"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    bound = bind_socket(SocketSettings(path=path, group=""))
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(path))
    assert sorted(p.name for p in short_dir.iterdir()) == ["s.sock"]
    bound.close()
    stale.close()


def test_membership_decides() -> None:
    allowed = AllowedPeers(frozenset({0, 7}), frozenset({500}))
    assert allowed.allow(Peer(1, 0, frozenset()))
    assert allowed.allow(Peer(1, 7, frozenset({1})))
    assert allowed.allow(Peer(1, 1000, frozenset({1000, 500})))
    assert not allowed.allow(Peer(1, 1000, frozenset({1000})))


@pytest.mark.skipif(os.getuid() != 0, reason="takes another user's identity")
@pytest.mark.parametrize("groups", [[], [12345]], ids=["no-group", "member"])
def test_another_user_needs_the_group(agent_process: Callable[..., Any], groups: list[int]) -> None:
    member = grp.getgrnam("daemon").gr_gid
    agent = agent_process(socket={"mode": 0o666, "group": "daemon"}).start()
    agent.folder.parent.chmod(0o755)
    speak = (
        "import os, socket, sys\n"
        f"os.setgroups({[member, *groups] if groups else []}); os.setgid(65534); os.setuid(65534)\n"
        "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
        'call = b\'{"method":"cloud.ppec.agent.GetVersion"}\' + bytes(1)\n'
        "s.sendall(call) if len(os.getgroups()) > 1 else None\n"
        "print(s.recv(65536).rstrip(bytes(1)).decode())"
    )
    done = subprocess.run(
        [sys.executable, "-c", speak, str(agent.settings.socket.path)],
        capture_output=True, text=True, timeout=SOON_S, check=True,
    )  # fmt: skip
    said = json.loads(done.stdout)
    if groups:
        assert said["parameters"]["host"] == "h1"
    else:
        assert said["error"] == FAILED
        assert said["parameters"]["code"] == "auth.peer_refused"


def test_one_client_too_many_is_told_so_and_the_others_stay(agent: Any) -> None:
    clients = [_let_in(agent) for _ in range(8)]
    crowded = agent.client()
    assert crowded.receive()["parameters"]["code"] == "agent.busy"
    clients.pop().close()
    clients.append(_let_in(agent))
    assert ["error" in client.call("GetVersion") for client in clients] == [False] * 8


def _let_in(agent: Any) -> Any:
    """A client that is answered. One that has left keeps its place until the agent notices."""

    def answered() -> Any:
        client = agent.client()
        with contextlib.suppress(OSError, EOFError):
            if "error" not in client.call("GetVersion"):
                return client
        client.close()
        return None

    return wait_until(answered, "there is a place for a client", timeout_s=SOON_S)


def test_a_socket_handed_over_by_systemd_is_served(agent_process: Callable[..., Any], short_dir: Path) -> None:
    agent = agent_process()
    listening = bind_socket(agent.settings.socket)
    starter = (
        "import os, sys\n"
        "os.dup2(int(sys.argv[1]), 3); os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1')\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'ppec_agentd.serve', '--config', sys.argv[2]])"
    )
    config = str(agent.folder / "agentd.toml")
    process = subprocess.Popen(
        [sys.executable, "-c", starter, str(listening.fileno()), config],
        pass_fds=[listening.fileno(), 3], stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        # The connection waits in the backlog until the agent serves.
        assert agent.client().call("GetVersion")["parameters"]["host"] == "h1"
        process.terminate()
        assert process.wait(timeout=SOON_S) == 0
        assert agent.settings.socket.path.exists()  # not the agent's to remove
    finally:
        process.kill()
        listening.close()


def test_who_waits_when_it_is_told_to_stop_gets_the_answer(agent_process: Callable[..., Any], vm: Any) -> None:
    agent = agent_process(lab={"delays_s": {"start": 0.5}}).start()
    client = agent.client()
    client.send("cloud.ppec.agent.CreateVms", create(vm()), more=True)
    while client.receive()["parameters"]["progress"]["stage"] != "start":
        pass
    assert agent.end() == 0
    last = client.receive()
    while last.get("continues"):
        last = client.receive()
    assert last["parameters"]["results"][0]["problem"] is None


def test_ready_and_stopping_are_told_to_systemd(
    agent_process: Callable[..., Any], short_dir: Path, monkeypatch: Any
) -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener.bind(str(short_dir / "notify"))
    listener.settimeout(SOON_S)
    monkeypatch.setenv("NOTIFY_SOCKET", str(short_dir / "notify"))
    agent = agent_process().start()
    assert b"READY=1" in listener.recv(4096)
    assert agent.end() == 0
    assert b"STOPPING=1" in listener.recv(4096)
    assert not agent.settings.socket.path.exists()
    listener.close()


def test_credentials_struct_is_what_the_kernel_sends() -> None:
    from ppec_agentd.peer import peer_of

    ours, theirs = socket.socketpair(socket.AF_UNIX)
    peer = peer_of(ours)
    assert (peer.pid, peer.uid) == (os.getpid(), os.getuid())
    assert {os.getgid(), *os.getgroups()} <= peer.gids
    assert struct.calcsize("3i") == 12
    ours.close()
    theirs.close()
