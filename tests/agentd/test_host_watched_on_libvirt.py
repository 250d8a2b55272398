# SPDX-License-Identifier: Apache-2.0
"""The agent as a process beside a real libvirtd and an orchestrator's double: a libvirtd that hangs is reported while
it hangs, and what is changed by hand is reported as it is changed."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import pytest

from ppec_contract.host import HostReport
from ppec_contract.host_delta import ReportChanges
from ppec_lab.conditions import wait_until
from ppec_lab.private_libvirtd import PrivateLibvirtd, private_libvirtd

pytestmark = [pytest.mark.libvirt, pytest.mark.slow]
# Long enough for a loaded machine; reached only when a test fails.
SOON_S = 60
SMALL = {"memory_mib": 64, "nics": []}


@pytest.fixture(scope="module")
def daemon() -> Iterator[PrivateLibvirtd]:
    with private_libvirtd() as running:
        yield running


@pytest.fixture
def reporting(
    agent_process: Callable[..., Any], orchestrator: Callable[..., Any], daemon: PrivateLibvirtd
) -> Iterator[tuple[Any, Any]]:
    """A started agent of this machine's own CPUs, and the orchestrator that it reports to."""
    server = orchestrator()
    agent = agent_process(
        hypervisor="libvirt",
        libvirt={"uri": daemon.uri, "domain_type": "qemu", "disk_cache": "writeback"},
        lab={"topology": None, "health_every_s": 0.5},
        # Nothing but an event makes a new report come before the test has failed.
        reports={"orchestrator_url": server.url, "heartbeat_interval_s": 0.5, "report_interval_s": 3600},
        tls=server.tls,
    )
    server.answers["POST"] = (
        200,
        {"send_report": False, "heartbeat_interval_s": 0.5, "report_interval_s": 3600.0},
    )
    agent.start()
    yield agent, server
    for name in virsh(daemon, "list", "--all", "--name").split():
        virsh(daemon, "destroy", name, check=False)
        virsh(daemon, "undefine", name, "--nvram", check=False)


def virsh(daemon: PrivateLibvirtd, *words: str, check: bool = True) -> str:
    command = ["virsh", "-q", "-c", daemon.uri, *words]
    return subprocess.run(command, check=check, capture_output=True, text=True, timeout=60).stdout.strip()


def create(agent: Any, *vms: Any) -> None:
    request = {"operation_id": f"op-{uuid4()}", "fence": 1, "vms": [vm.model_dump(mode="json") for vm in vms]}
    results = agent.client().call("CreateVms", request)["parameters"]["results"]
    assert [result["problem"] for result in results] == [None] * len(vms)


def define_by_hand(daemon: PrivateLibvirtd) -> None:
    path = daemon.base_dir / "by-hand.xml"
    path.write_text(
        "<domain type='qemu'><name>by-hand</name><memory unit='MiB'>32</memory><os><type>hvm</type></os></domain>"
    )
    virsh(daemon, "define", str(path))


def last_report(server: Any) -> HostReport:
    return HostReport.model_validate(server.sent("PUT")[-1]["report"])


def libvirt_level(server: Any) -> str:
    """The level that was last said; the message may be a report or a heartbeat."""
    told = [body["vitals"] for _, _, body in list(server.requests) if body.get("vitals")]
    return next((f["level"] for f in told[-1]["health"] if f["check"] == "libvirt"), "") if told else ""


def drift(server: Any) -> list[tuple[str, str, str]]:
    return [(found.kind.value, found.before, found.after) for found in last_report(server).drift]


@contextlib.contextmanager
def stopped(daemon: PrivateLibvirtd) -> Iterator[None]:
    pid = (daemon.base_dir / "libvirtd.pid").read_text().strip()
    daemon.run("kill", f"-{int(signal.SIGSTOP)}", pid)
    try:
        yield
    finally:
        daemon.run("kill", f"-{int(signal.SIGCONT)}", pid)


def test_a_libvirtd_that_hangs_is_reported_while_it_hangs_and_recovers(
    reporting: tuple[Any, Any], daemon: PrivateLibvirtd, vm: Any
) -> None:
    agent, server = reporting
    one = vm(**SMALL)
    create(agent, one)
    wait_until(lambda: libvirt_level(server) == "ok", "the first health", timeout_s=SOON_S)
    wait_until(lambda: len(last_report(server).vms) == 1, "the VM is reported", timeout_s=SOON_S)
    (qemu,) = daemon.run("pgrep", "-f", str(one.vm_id)).stdout.split()
    with stopped(daemon):
        wait_until(lambda: libvirt_level(server) == "error", "that it hangs is reported", timeout_s=SOON_S)
        # Heartbeats go on, of the report that stands; the agent answers, and the guest runs.
        beats = len(server.sent("POST"))
        wait_until(lambda: len(server.sent("POST")) >= beats + 3, "heartbeats go on", timeout_s=SOON_S)
        assert server.sent("POST")[-1]["digest"] == last_report(server).digest()
        assert agent.client().call("GetVersion")["parameters"]["host"] == "h1"
        assert daemon.run("kill", "-0", qemu, check=False).returncode == 0
    wait_until(lambda: libvirt_level(server) == "ok", "that it answers again is reported", timeout_s=SOON_S)
    (info,) = agent.client().call("ListVms")["parameters"]["vms"]
    assert info["state"] == "running"
    said = [line for line in agent.log_lines() if line.get("event") == "health_changed" and line["check"] == "libvirt"]
    assert [(line["before"], line["entered"]) for line in said] == [(None, "ok"), ("ok", "error"), ("error", "ok")]
    # What was missed meanwhile is looked up again: a change after it is reported as any other.
    virsh(daemon, "suspend", one.name)
    wait_until(lambda: last_report(server).vms[0].state == "paused", "a change after it is reported", timeout_s=SOON_S)


def test_a_change_is_told_as_a_delta_to_who_takes_them(
    reporting: tuple[Any, Any], daemon: PrivateLibvirtd, vm: Any
) -> None:
    agent, server = reporting
    status, reply = server.answers["POST"]
    server.answers |= {method: (status, reply | {"takes_deltas": True}) for method in ("PUT", "POST", "PATCH")}
    one = vm(**SMALL)
    create(agent, one)
    define_by_hand(daemon)

    def told() -> HostReport:
        """What the orchestrator would have: the last whole report, and what changed since."""
        whole = max(at for at, (method, _, _) in enumerate(server.requests) if method == "PUT")
        report = HostReport.model_validate(server.requests[whole][2]["report"])
        for method, _, body in server.requests[whole:]:
            if method == "PATCH":
                assert body["before"] == report.digest()
                report = ReportChanges.model_validate(body["changes"]).put_to(report)
                assert body["after"] == report.digest()
        return report

    wait_until(lambda: len(told().vms) == 2, "both domains are told", timeout_s=SOON_S)
    whole, before = len(server.sent("PUT")), len(server.sent("PATCH"))
    virsh(daemon, "suspend", one.name)
    states = {one.name: "paused", "by-hand": "stopped"}
    wait_until(lambda: {v.name: v.state for v in told().vms} == states, "one VM's change is told", timeout_s=SOON_S)
    changes = [body["changes"] for body in server.sent("PATCH")[before:]]
    assert {changed["vm_id"] for change in changes for changed in change["vms"]} == {str(one.vm_id)}
    assert len(server.sent("PUT")) == whole
    assert told() == HostReport.model_validate(agent.client().call("GetReport")["parameters"]["report"])


def test_the_use_of_real_vms_is_told(reporting: tuple[Any, Any], vm: Any) -> None:
    agent, server = reporting
    server.answers["POST"][1]["report_interval_s"] = 1.0
    one = vm(**SMALL)
    create(agent, one)

    def use() -> dict[str, Any]:
        told = [body["vitals"]["use"]["vms"] for _, _, body in list(server.requests) if body.get("vitals")]
        return next((vm for vms in reversed(told) for vm in vms if vm["vm_id"] == str(one.vm_id)), {})

    wait_until(lambda: use().get("cpu_time_ms", 0) > 0, "CPU time was used and told", timeout_s=SOON_S)
    assert 0 < use()["memory_mib"] < 4096


def test_what_is_changed_by_hand_is_reported_by_its_event(
    reporting: tuple[Any, Any], daemon: PrivateLibvirtd, vm: Any
) -> None:
    agent, server = reporting
    one = vm(**SMALL)
    create(agent, one)
    wait_until(lambda: len(last_report(server).vms) == 1, "the VM is reported", timeout_s=SOON_S)
    assert drift(server) == []
    pins = {pin.vcpu: pin.pcpu for pin in last_report(server).vms[0].pins}
    virsh(daemon, "vcpupin", one.name, "0", str(pins[1]), "--live")
    moved = ("pins", f"0:{pins[0]} 1:{pins[1]}", f"0:{pins[1]} 1:{pins[1]}")
    wait_until(lambda: moved in drift(server), "changed pins", timeout_s=SOON_S)
    virsh(daemon, "vcpupin", one.name, "0", str(pins[0]), "--live")
    wait_until(lambda: drift(server) == [], "pins put right", timeout_s=SOON_S)

    define_by_hand(daemon)
    wait_until(lambda: drift(server) == [("made_by_hand", "", "1 vCPUs, 32 MiB")], "made by hand", timeout_s=SOON_S)
    virsh(daemon, "undefine", "by-hand")
    wait_until(lambda: drift(server) == [], "gone again", timeout_s=SOON_S)

    virsh(daemon, "destroy", one.name)
    virsh(daemon, "undefine", one.name)
    removed = [("domain_removed", "defined", "its disk is there")]
    wait_until(lambda: drift(server) == removed, "a removed domain", timeout_s=SOON_S)
    # Nothing was repaired, and nothing of the VM's was touched.
    assert virsh(daemon, "list", "--all", "--name") == ""
    disk = agent.settings.storage.vms / str(one.vm_id) / "root.qcow2"
    assert disk.is_file()
    # A delete by order ends it.
    gone = {"operation_id": "op-gone", "fence": 1, "vm_ids": [str(one.vm_id)]}
    (result,) = agent.client().call("DeleteVms", gone)["parameters"]["results"]
    assert result["problem"] is None
    wait_until(lambda: drift(server) == [], "nothing is left to say", timeout_s=SOON_S)
    assert not disk.exists()
