# SPDX-License-Identifier: Apache-2.0
"""The proxy in front of the real agent (on the fake hypervisor): what the scripted one stands for is true."""

from __future__ import annotations

import base64
import contextlib
import grp
import hashlib
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ppec_contract.agent import VmsReply
from ppec_contract.guest import ReadConsoleReply
from ppec_lab.conditions import wait_until

IMAGE = bytes(1 << 20)
CONFIG = """
host = "h1"
hypervisor = "fake"
[socket]
path = "{folder}/real.sock"
group = "{group}"
[storage]
state_dir = "{folder}/state"
disk_mib = 100000
[reserve]
memory_per_cell_mib = 0
[lab]
topology = "sockets=2,cores=4,threads=2,memory_mib=8192"
bridges = ["br0"]
"""


class Agent:
    def __init__(self, folder: Path) -> None:
        self.socket = folder / "real.sock"
        self._folder = folder
        self._config = folder / "agentd.toml"
        self._config.write_text(CONFIG.format(folder=folder, group=grp.getgrgid(os.getgid()).gr_name))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "ppec_agentd.serve", "--config", str(self._config)]
        with (self._folder / "agentd.log").open("ab") as log:
            self._process = subprocess.Popen(command, stderr=log)

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(60)
            self._process = None


@pytest.fixture
def agent(short_dir: Path) -> Iterator[Agent]:
    agent = Agent(short_dir)
    agent.start()
    yield agent
    agent.kill()


@pytest.fixture
def fronted(agent: Agent, start_proxy: Any) -> Any:
    proxy = start_proxy(agent_socket_path=str(agent.socket))
    wait_until(lambda: proxy.request("GET", "/healthz").status == 200, "the agent answers", timeout_s=60)
    return proxy


@pytest.fixture
def create(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    file = tmp_path / "image.raw"
    file.write_bytes(IMAGE)
    image = {
        "name": "small",
        "sha256": hashlib.sha256(IMAGE).hexdigest(),
        "size_bytes": len(IMAGE),
        "format": "raw",
        "url": file.as_uri(),
    }

    def call(*names: str, operation: str = "op-1") -> dict[str, Any]:
        vms = [
            {
                "vm_id": str(uuid.uuid5(uuid.NAMESPACE_DNS, name)),
                "name": name,
                "vcpus": 2,
                "memory_mib": 512,
                "cells": [0],
                "root_disk": {"size_mib": 16, "image": image},
                "user_data": "#cloud-config\n# {{ lookup('pipe', 'id') }} $(id)\n",
                "tags": {"<a>": "</a>"},
            }
            for name in names
        ]
        return {"operation_id": operation, "fence": 1, "vms": vms}

    return call


def test_a_batch_from_admission_to_deletion(fronted: Any, create: Any) -> None:
    request = create("web-1", "web-2")
    lines = fronted.call("CreateVms", request, stream=True).lines
    assert [line.get("continues", False) for line in lines] == [True] * (len(lines) - 1) + [False]
    replies = [VmsReply.model_validate(line["parameters"]) for line in lines]
    assert any(reply.progress for reply in replies)
    assert [(result.name, result.changed, result.problem) for result in replies[-1].results] == [
        ("web-1", True, None),
        ("web-2", True, None),
    ]
    again = VmsReply.model_validate(fronted.call("CreateVms", request).json)
    assert [(result.vm_id, result.replayed) for result in again.results] == [
        (result.vm_id, True) for result in replies[-1].results
    ]
    assert {vm["name"] for vm in fronted.call("ListVms").json["vms"]} == {"web-1", "web-2"}
    ids = [vm["vm_id"] for vm in request["vms"]]
    gone = fronted.call("DeleteVms", {"operation_id": "op-2", "fence": 1, "vm_ids": ids}).json
    assert [result["changed"] for result in gone["results"]] == [True, True]
    assert fronted.call("ListVms").json == {"vms": []}


def test_the_report_and_version_fit_the_contract(fronted: Any) -> None:
    from ppec_contract.agent import METHODS

    for name in ("GetReport", "GetVersion"):
        METHODS[name].reply.model_validate(fronted.call(name).json)


def test_an_agent_killed_and_started_again_is_found_again(fronted: Any, agent: Agent, create: Any) -> None:
    assert fronted.call("CreateVms", create("web-1")).status == 200
    agent.kill()
    assert fronted.call("ListVms").json["code"] == "agent.unavailable"
    agent.start()
    wait_until(lambda: fronted.call("ListVms").status == 200, "the agent is back", timeout_s=60)
    assert [vm["name"] for vm in fronted.call("ListVms").json["vms"]] == ["web-1"]


def test_a_console_from_the_agent_to_the_client_and_back(fronted: Any, create: Any, agent: Agent) -> None:
    request = create("web-1")
    assert fronted.call("CreateVms", request).status == 200
    vm_id = request["vms"][0]["vm_id"]
    console = agent.socket.parent / "state" / "vms" / vm_id / "console.log"
    console.write_bytes(b"login: \xff")
    with contextlib.closing(fronted.connection()) as connection:
        headers = {"Accept": "application/x-ndjson"}
        connection.request("POST", "/v1/agent/ReadConsole", json.dumps({"vm_id": vm_id}), headers)
        response = connection.getresponse()
        first = ReadConsoleReply.model_validate(json.loads(response.readline())["parameters"])
        assert (base64.b64decode(first.data), first.state) == (b"login: \xff", "running")
        typed = {"vm_id": vm_id, "data": base64.b64encode(b"root\n").decode()}
        assert fronted.call("WriteConsole", typed).json == {"written_bytes": 5}
        with console.open("ab") as log:
            log.write(b"root")
        while not (data := json.loads(response.readline())["parameters"]["data"]):
            pass
        assert base64.b64decode(data) == b"root"
    (guest,) = fronted.call("QueryGuests", {"vm_ids": [vm_id]}).json["guests"]
    assert (guest["hostname"], guest["agent_connected"]) == ("web-1", True)
