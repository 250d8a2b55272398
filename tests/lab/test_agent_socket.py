# SPDX-License-Identifier: Apache-2.0
"""A call to an agent's socket: the program that carries it, and what its replies become."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from ppec_contract.errors import PpecError
from ppec_lab.agent_socket import CALLER, call_agent


@pytest.fixture
def place() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="ppec-lab-", dir="/tmp"))
    yield directory
    shutil.rmtree(directory)


def test_the_caller_sends_one_frame_and_prints_the_reply(place: Path) -> None:
    heard = bytearray()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(str(place / "s"))
        server.listen()

        def serve() -> None:
            channel, _ = server.accept()
            with channel:
                while not heard.endswith(b"\0"):
                    heard.extend(channel.recv(65536))
                # In two parts: a stream has no borders.
                channel.sendall(b'{"parameters": ')
                channel.sendall(b'{"name": "\xc3\xa9"}}\0')

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        command = [sys.executable, "-I", "-c", CALLER, str(place / "s"), '{"method": "x"}']
        done = subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8", timeout=60)
        thread.join(timeout=60)
    assert bytes(heard) == b'{"method": "x"}\0'
    assert json.loads(done.stdout) == {"parameters": {"name": "é"}}


def test_parameters_go_whole_and_come_back() -> None:
    asked: list[Sequence[str]] = []

    def read(command: Sequence[str]) -> str:
        asked.append(command)
        return json.dumps({"parameters": {"report": {}}})

    assert call_agent(read, "GetReport", {"text": "it's \"; $(id)"}) == {"report": {}}
    *_, path, call = asked[0]
    assert path == "/run/ppec/agentd.sock"
    assert json.loads(call) == {"method": "cloud.ppec.agent.GetReport", "parameters": {"text": "it's \"; $(id)"}}


def test_the_agents_own_errors_are_raised_as_such() -> None:
    problem = PpecError("host.no_capacity", "no room", subject="host h1").problem().model_dump(mode="json")
    reply = json.dumps({"error": "cloud.ppec.agent.Failed", "parameters": problem})
    with pytest.raises(PpecError) as refused:
        call_agent(lambda _: reply, "CreateVms")
    assert refused.value.code == "host.no_capacity"


def test_errors_of_the_interface_are_faults_of_the_caller() -> None:
    reply = json.dumps({"error": "org.varlink.service.MethodNotFound", "parameters": {"method": "Nope"}})
    with pytest.raises(RuntimeError, match="MethodNotFound"):
        call_agent(lambda _: reply, "Nope")
