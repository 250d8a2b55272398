# SPDX-License-Identifier: Apache-2.0
"""The collection against a real proxy and a real agent, as processes; only the hypervisor is the fake one."""

from __future__ import annotations

import grp
import hashlib
import json
import os
import signal
import socket
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import APPLY_PLAN, BIN, Fleet, Host
from test_playbooks import events_of, hostile_plan, hostile_texts, task, variables

from ppec_lab.orchestrator_process import free_port


@contextmanager
def daemon(folder, name, settings, probe):
    """`ppec-NAME` on its settings, once `probe()` says it serves; asked to end afterwards."""
    tables = {key: value for key, value in settings.items() if isinstance(value, dict)}
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items() if key not in tables]
    for table, values in tables.items():
        lines += [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    config = folder / f"{name}.toml"
    config.write_text("\n".join(lines) + "\n")
    log = folder / f"{name}.log"
    with log.open("wb") as out:
        process = subprocess.Popen([str(BIN / f"ppec-{name}"), "--config", str(config)], stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + 60
        while not probe():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield log
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def listens(family, address):
    with socket.socket(family) as probe:
        return probe.connect_ex(address) == 0


@pytest.fixture
def real_host(certificates, short_dir, tmp_path):
    """A fleet of one host, h1, whose agent is real; `fleet.socket` is the agent's socket."""
    certificate, key = certificates.issue("ppec://orchestrator/main")
    host_certificate, host_key = certificates.issue("ppec://host/h1")
    fleet = Fleet(certificates, certificate, key, tmp_path)
    fleet.socket = short_dir / "agentd.sock"
    port = free_port()
    fleet.hosts["h1"] = Host("h1", None, port)
    agentd = {
        "host": "h1",
        "hypervisor": "fake",
        "socket": {"path": str(fleet.socket), "mode": 0o600, "group": grp.getgrgid(os.getgid()).gr_name},
        "storage": {"state_dir": str(tmp_path / "state"), "disk_mib": 100_000},
        "lab": {"topology": "sockets=2,cores=64,threads=1,memory_mib=32768", "bridges": ["br0"]},
    }
    proxy = {
        "allow_from": ["127.0.0.0/8"],
        "certificate_path": str(host_certificate),
        "key_path": str(host_key),
        "ca_path": str(certificates.path),
        "listen_address": "127.0.0.1",
        "listen_port": port,
        "agent_socket_path": str(fleet.socket),
    }
    with (
        daemon(tmp_path, "agentd", agentd, lambda: listens(socket.AF_UNIX, str(fleet.socket))) as agentd_log,
        daemon(tmp_path, "proxy", proxy, lambda: listens(socket.AF_INET, ("127.0.0.1", port))) as proxy_log,
    ):
        fleet.logs = (agentd_log, proxy_log)
        yield fleet


@pytest.fixture
def real_spec(spec, tmp_path):
    """VMs from an image that is there: a raw file of one MiB."""
    image = tmp_path / "tiny.raw"
    image.write_bytes(bytes(1024 * 1024))
    source = {
        "name": "tiny",
        "sha256": hashlib.sha256(image.read_bytes()).hexdigest(),
        "size_bytes": image.stat().st_size,
        "format": "raw",
        "url": image.as_uri(),
    }

    def make(name, **other):
        number = int(hashlib.sha256(name.encode()).hexdigest()[:4], 16)
        nic = {"mac": f"52:54:00:00:{number >> 8:02x}:{number & 255:02x}", "bridge": "br0"}
        return spec(name, root_disk={"size_mib": 16, "image": source}, nics=[nic], **other)

    return make


def apply(fleet, ansible_playbook, plan, *arguments):
    Path(plan["events_path"]).unlink(missing_ok=True)
    return ansible_playbook(APPLY_PLAN, {"h1": {}}, *arguments, "-e", f"ppec_plan_file={fleet.write_plan(plan)}")


def test_a_plan_is_done_once_however_often_it_runs(real_host, real_spec, ansible_playbook):
    plan = real_host.plan({"h1": {"vms": [real_spec("a"), real_spec("b")]}})
    first = apply(real_host, ansible_playbook, plan)
    assert first.result()["succeeded"] == 2, first.output
    told = events_of(plan)
    assert [event.accepted for event in told].count(True) == 1
    assert sorted((e.result.name, e.result.replayed) for e in told if e.result) == [("a", False), ("b", False)]
    assert {str(e.progress.stage) for e in told if e.progress} >= {"admitted", "disk", "define", "start"}
    again = apply(real_host, ansible_playbook, plan)
    assert again.result()["succeeded"] == 2
    retold = sorted((e.result.name, e.result.replayed) for e in events_of(plan) if e.result)
    assert retold == [("a", True), ("b", True)]
    late = apply(real_host, ansible_playbook, {**plan, "fence": 0})
    assert late.result()["code"] == "operation.fenced"
    found = ansible_playbook(task("ppec.cloud.agent_vm_info"), {"h1": variables(real_host, "h1")})
    assert sorted(vm["name"] for vm in found.result()["vms"]) == ["a", "b"]


def test_a_vm_through_its_life_by_proxy_and_by_socket(real_host, real_spec, ansible_playbook):
    by_proxy, by_socket = real_host.connection("h1"), {"socket_path": str(real_host.socket)}
    a = real_spec("a")
    name = {"vm_id": a["vm_id"]}
    play = task("ppec.cloud.agent_info", **by_proxy)
    tasks = play[0]["tasks"]
    for wanted in (
        a,
        {**name, "state": "stopped", "force": True, "timeout_s": 1},
        {**name, "state": "started"},
        {**name, "state": "absent"},
    ):
        tasks += [
            {"ppec.cloud.agent_vm": {**wanted, **by_socket}, "check_mode": True},
            {"ppec.cloud.agent_vm": {**wanted, **by_proxy}},
            {"ppec.cloud.agent_vm": {**wanted, **by_socket}},
        ]
    tasks.append({"ppec.cloud.agent_info": by_socket})
    run = ansible_playbook(play, {"h1": {}})
    assert run.returncode == 0, run.output
    before, *steps, after = (result for _, _, result in run.tasks)
    assert [step["changed"] for step in steps] == [True, True, False] * 4
    for check, first in zip(steps[0::3], steps[1::3], strict=True):
        assert check["diff"] == first["diff"]
    assert before["report"] == after["report"]
    assert (after["host"], after["report"]["vms"]) == ("h1", [])


def test_hostile_text_is_never_evaluated_anywhere_on_the_way(real_host, real_spec, ansible_playbook):
    canary = real_host.folder / "canary"
    plan, vms = hostile_plan(real_host, real_spec, canary)
    run = apply(real_host, ansible_playbook, plan, "-vvvv")
    assert run.result()["succeeded"] == len(vms), run.output + json.dumps(
        [e.model_dump(mode="json") for e in events_of(plan)]
    )
    for text in hostile_texts(canary)[:2]:
        refused = apply(real_host, ansible_playbook, real_host.plan({"h1": {"vms": [{**vms[0], "name": text}]}}))
        assert refused.result()["code"] == "request.invalid"
    assert not canary.exists()
    texts = run.output + "".join(log.read_text() for log in real_host.logs)
    assert str(canary) not in texts


def test_what_the_host_refuses_is_told_by_its_code(real_host, real_spec, ansible_playbook):
    cases = {
        "vm.odd_vcpus": real_spec("odd", vcpus=3),
        "request.invalid": {**real_spec("extra"), "colour": "red"},
    }
    for code, vm in cases.items():
        plan = real_host.plan({"h1": {"vms": [vm]}})
        assert apply(real_host, ansible_playbook, plan).result()["code"] == code
        assert [e.problem.code for e in events_of(plan)] == [code]
    plan = real_host.plan({"h1": {"vms": [real_spec("fits"), real_spec("huge", vcpus=128)]}})
    result = apply(real_host, ansible_playbook, plan).result()
    assert (result["succeeded"], result["failed_names"]) == (1, ["huge"])
