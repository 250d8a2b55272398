# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the collection's tests: certificates, hosts with scripted agents, plans, real ansible-playbook runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The collection is imported as Ansible imports it; the doubles lie beside this file.
sys.path[:0] = [str(ROOT / "collections"), str(Path(__file__).parent)]

from agent_double import FakeAgent, proxy_of, socket_of  # noqa: E402
from fleet_certificates import FleetCa  # noqa: E402

from ppec_contract.run import HostCall, RunPlan  # noqa: E402

BIN = Path(sys.executable).parent
APPLY_PLAN = ROOT / "collections/ansible_collections/ppec/cloud/playbooks/apply_plan.yml"


@dataclass
class Host:
    """A host whose proxy listens on `port` of the loopback address."""

    name: str
    agent: FakeAgent
    port: int


@dataclass
class Fleet:
    """Hosts, and the client's files to reach them."""

    ca: FleetCa
    certificate: Path
    key: Path
    folder: Path
    hosts: dict[str, Host] = field(default_factory=dict)

    def connection(self, host: str, **other: Any) -> dict[str, Any]:
        """A module's connection options for that host's proxy."""
        return {
            "proxy_address": "127.0.0.1",
            "proxy_port": self.hosts[host].port,
            "host_name": host,
            "ca_path": str(self.ca.path),
            "certificate_path": str(self.certificate),
            "key_path": str(self.key),
            "deadline_s": 60.0,
            **other,
        }

    def plan(self, parameters: dict[str, dict[str, Any]], action: str = "CreateVms", **other: Any) -> dict[str, Any]:
        """A run with each host's parameters, for `write_plan`; `events_path` is in the fleet's folder."""
        return {
            "operation_id": f"op-{uuid.uuid4().hex[:8]}",
            "fence": 1,
            "action": action,
            "hosts": {
                host: {"address": "127.0.0.1", "port": self.hosts[host].port, "parameters": call}
                for host, call in parameters.items()
            },
            "events_path": str(self.folder / "events.jsonl"),
            "ca_path": str(self.ca.path),
            "certificate_path": str(self.certificate),
            "key_path": str(self.key),
            "timeout_s": 60.0,
            **other,
        }

    def write_plan(self, plan: dict[str, Any]) -> Path:
        """The path of the plan, written into files as the orchestrator does."""
        terms = {name: value for name, value in plan.items() if name != "hosts"}
        calls = {host: HostCall(run=terms, **call) for host, call in plan["hosts"].items()}
        path = self.folder / "plan.json"
        (self.folder / "calls").mkdir(exist_ok=True)
        for host, call in calls.items():
            (self.folder / "calls" / f"{host}.json").write_text(call.model_dump_json())
        path.write_text(RunPlan(run=terms, hosts=dict.fromkeys(calls, frozenset())).model_dump_json())
        return path


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> FleetCa:
    return FleetCa(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def make_fleet(certificates: FleetCa, tmp_path: Path) -> Iterator[Callable[..., Fleet]]:
    """`make_fleet("h1", "h2")`: hosts with scripted agents behind scripted proxies."""
    with ExitStack() as stack:

        def make(*names: str) -> Fleet:
            certificate, key = certificates.issue("ppec://orchestrator/main")
            fleet = Fleet(certificates, certificate, key, tmp_path)
            for name in names:
                agent = FakeAgent(name)
                port = stack.enter_context(
                    proxy_of(agent, certificates.path, *certificates.issue(f"ppec://host/{name}"))
                )
                fleet.hosts[name] = Host(name, agent, port)
            return fleet

        yield make


@pytest.fixture
def agent() -> FakeAgent:
    return FakeAgent("h1")


@pytest.fixture
def agent_socket(agent: FakeAgent, short_dir: Path) -> Iterator[Path]:
    with socket_of(agent, short_dir / "a.sock") as path:
        yield path


@pytest.fixture
def spec() -> Callable[..., dict[str, Any]]:
    """`spec("web-1", vcpus=4)`: a VM as `agent_vms` and the contract take it; the id follows from the name."""

    def make(name: str, **other: Any) -> dict[str, Any]:
        image = {
            "name": "tiny",
            "sha256": "ab" * 32,
            "size_bytes": 1000,
            "format": "qcow2",
            "url": "https://images.example.net/tiny.qcow2",
        }
        return {
            "vm_id": str(uuid.uuid5(uuid.NAMESPACE_DNS, name)),
            "name": name,
            "vcpus": 2,
            "memory_mib": 256,
            "cells": [0],
            "root_disk": {"size_mib": 1024, "image": image},
            "nics": [{"mac": "52:54:00:00:00:01", "bridge": "br0", "addresses": ["10.0.0.5/24"]}],
            **other,
        }

    return make


@dataclass
class PlaybookRun:
    """What `ansible-playbook` did: `tasks` has one (host, task, result) per host-task, in the order they ended."""

    returncode: int
    output: str
    tasks: list[tuple[str, str, dict[str, Any]]]

    def result(self, host: str = "h1", task: int = -1) -> dict[str, Any]:
        return [result for name, _, result in self.tasks if name == host][task]


_CALLBACK = '''
import json, os
from ansible.plugins.callback import CallbackBase
DOCUMENTATION = """
name: record
type: notification
short_description: records results
description: One JSON line per host-task.
"""
class CallbackModule(CallbackBase):
    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "notification"
    CALLBACK_NAME = "record"
    def _record(self, result, **kwargs):
        line = [result._host.name, result._task.get_name(), result._result]
        with open(os.environ["RECORD_PATH"], "a") as out:
            out.write(json.dumps(line, default=str) + "\\n")
    v2_runner_on_ok = v2_runner_on_failed = v2_runner_on_unreachable = v2_runner_on_skipped = _record
'''

# Like a connection to another machine, as far as a plugin can tell.
_ELSEWHERE = '''
from ansible.plugins.connection.local import Connection as Local
DOCUMENTATION = """
name: elsewhere
short_description: the local connection under another name
description: For tests.
options: {}
extends_documentation_fragment: [connection_pipelining]
"""
class Connection(Local):
    transport = "elsewhere"
'''


@pytest.fixture
def ansible_playbook(tmp_path: Path) -> Callable[..., PlaybookRun]:
    """Runs the real ansible-playbook on an inventory of (host -> variables); a play may be given as data or path."""
    plugins = tmp_path / "test_plugins"
    for kind, name, text in (("callback", "record", _CALLBACK), ("connection", "elsewhere", _ELSEWHERE)):
        (plugins / kind).mkdir(parents=True)
        (plugins / kind / f"{name}.py").write_text(text)

    def run(
        play: Path | str | list[dict[str, Any]],
        hosts: dict[str, dict[str, Any]],
        *arguments: str,
        env: dict[str, str] | None = None,
    ) -> PlaybookRun:
        if isinstance(play, list):
            text, play = json.dumps(play), tmp_path / "play.yml"
            play.write_text(text)
        inventory = tmp_path / "inventory.json"
        inventory.write_text(json.dumps({"all": {"hosts": hosts}}))
        record = tmp_path / f"record-{uuid.uuid4().hex}.jsonl"
        record.touch()
        done = subprocess.run(
            [str(BIN / "ansible-playbook"), "-i", str(inventory), str(play), *arguments],
            cwd=tmp_path,
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(tmp_path),
                "LC_ALL": "C.UTF-8",
                "RECORD_PATH": str(record),
                "ANSIBLE_COLLECTIONS_PATH": str(ROOT / "collections"),
                "ANSIBLE_COLLECTIONS_SCAN_SYS_PATH": "False",
                "ANSIBLE_CALLBACK_PLUGINS": str(plugins / "callback"),
                "ANSIBLE_CALLBACKS_ENABLED": "record",
                "ANSIBLE_CONNECTION_PLUGINS": str(plugins / "connection"),
                "ANSIBLE_LOCAL_TEMP": str(tmp_path / "ansible-tmp"),
                "ANSIBLE_REMOTE_TEMP": str(tmp_path / "ansible-remote"),
                "ANSIBLE_PYTHON_INTERPRETER": sys.executable,
                "ANSIBLE_NOCOLOR": "1",
                **(env or {}),
            },
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        tasks = [tuple(json.loads(line)) for line in record.read_text().splitlines()]
        return PlaybookRun(done.returncode, done.stdout + done.stderr, tasks)

    return run
