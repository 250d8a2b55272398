# SPDX-License-Identifier: Apache-2.0
"""First light: machines deployed by the roles, VMs asked for as a user asks, guests that answer by their own address.

One cloud of two container hosts serves all tests here; each leaves it as it found it.
"""

from __future__ import annotations

import hashlib
import json
import socket
import ssl
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ppec_lab import guest_answer
from ppec_lab.cloud import PROJECT, Cloud
from ppec_lab.conditions import NotReachedError, wait_until
from ppec_lab.container_host import ContainerHost
from ppec_lab.debian_guest_image import debian_guest_image
from ppec_lab.orchestrator_process import BIN

pytestmark = [
    pytest.mark.containers,
    pytest.mark.libvirt,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
]


def create(cloud: Cloud, tmp_path: Path, *options: str, user_data: str = "") -> list[dict[str, Any]]:
    """`ppec vm create … --wait`, and the VMs it made, as they are seen at once."""
    ppec = cloud.orchestrator.ppec
    before = {vm["vm_id"] for vm in ppec("vm", "list")}
    file = tmp_path / "user-data"
    file.write_text(user_data)
    ppec("vm", "create", *options, "--user-data", str(file), "--wait", timeout_s=600)

    vms = [vm for vm in ppec("vm", "list") if vm["vm_id"] not in before]
    assert vms
    assert [vm["name"] for vm in vms if vm["observed"] != "running" or not vm["pins"]] == []
    return vms


def ipv4(vms: list[dict[str, Any]]) -> dict[str, str]:
    return {vm["name"]: next(a["address"] for a in vm["addresses"] if ":" not in a["address"]) for vm in vms}


def answers_of(cloud: Cloud, vms: list[dict[str, Any]], *, timeout_s: float = 300) -> dict[str, guest_answer.Answer]:
    """The guests' answers. Of silent ones the error tells what their consoles, QEMU and their hosts' links show."""
    try:
        return guest_answer.wait_for_answers(ipv4(vms), timeout_s=timeout_s)
    except NotReachedError as silent:
        for vm in vms:
            host = cloud.fleet.host(vm["host"])
            console = f"/var/lib/ppec/vms/{vm['vm_id']}/console.log"
            silent.add_note(f"{vm['name']}: {host.run('tail', '-c', '2000', console, check=False).stdout}")
            log = f"/var/log/libvirt/qemu/{vm['name']}.log"
            state = ("virsh", "domstate", "--reason", vm["name"])
            for command in (state, ("tail", "-n", "5", log), ("ip", "-br", "link"), ("bridge", "link")):
                silent.add_note(f"{vm['host']}: {host.run(*command, check=False).stdout}")
        raise


def delete(cloud: Cloud, vms: list[dict[str, Any]]) -> None:
    cloud.orchestrator.ppec("vm", "delete", *(vm["name"] for vm in vms), "--wait", timeout_s=300)


def virsh(host: ContainerHost, *words: str) -> str:
    return host.run("virsh", "--connect", "qemu:///system", *words).stdout


def serves(host: ContainerHost) -> bool:
    """Whether it can be worked with: ssh may answer before."""
    agent = host.run("systemctl", "is-active", "ppec-agentd.service", check=False).stdout.strip()
    with socket.socket() as probe:
        probe.settimeout(5)
        return agent == "active" and probe.connect_ex((host.address, 7443)) == 0


def assert_hosts_are_clean(cloud: Cloud) -> None:
    for host in cloud.fleet.hosts:
        assert virsh(host, "list", "--all", "--name").split() == []
        assert host.run("ls", "/var/lib/ppec/vms").stdout.split() == []
    used = [a for a in cloud.orchestrator.ppec("ipdb", "address", "list") if a["vm_id"]]
    assert used == []


def test_a_batch_boots_applies_its_seeds_and_answers_by_its_own_addresses(cloud: Cloud, tmp_path: Path) -> None:
    user_data = "#cloud-config\n# {{ 7 * 7 }} $(id) <xml/> 'quoted'\nhostname: ignored\n"
    vms = create(
        cloud, tmp_path, "--count", "4", "--name", "web", "--flavor", "small", "--image", "small", "--policy", "spread",
        user_data=user_data,
    )  # fmt: skip
    assert sorted(vm["name"] for vm in vms) == ["web-1", "web-2", "web-3", "web-4"]
    by_host = {host.name: [vm for vm in vms if vm["host"] == host.name] for host in cloud.fleet.hosts}
    assert {name: len(mine) for name, mine in by_host.items()} == {"host1": 2, "host2": 2}
    assert {vm["vrf"] for vm in by_host["host1"]} == {"blue"}
    assert {vm["vrf"] for vm in by_host["host2"]} == {"green"}
    for mine in by_host.values():
        pins = [pin["pcpu"] for vm in mine for pin in vm["pins"]]
        assert len(pins) == len(set(pins)) == 4
    for host in cloud.fleet.hosts:
        assert sorted(virsh(host, "list", "--name").split()) == sorted(vm["name"] for vm in by_host[host.name])

    answers = answers_of(cloud, vms)
    for vm in vms:
        assert answers[vm["name"]].instance_id == vm["vm_id"]
        assert answers[vm["name"]].user_data_sha256 == hashlib.sha256(user_data.encode()).hexdigest()

    delete(cloud, vms)
    assert_hosts_are_clean(cloud)


def test_stop_asks_the_guest_and_start_brings_it_back(cloud: Cloud, tmp_path: Path) -> None:
    vms = create(cloud, tmp_path, "--name", "pet", "--flavor", "small", "--image", "small")
    ppec = cloud.orchestrator.ppec
    answers_of(cloud, vms)
    ppec("vm", "stop", "pet", "--timeout-s", "120", "--wait", timeout_s=300)
    assert ppec("vm", "show", "pet")["observed"] == "stopped"
    ppec("vm", "start", "pet", "--wait", timeout_s=300)
    answers_of(cloud, vms)
    delete(cloud, vms)
    assert_hosts_are_clean(cloud)


def test_a_host_that_lost_power_and_came_back_still_knows_its_vms(cloud: Cloud, tmp_path: Path) -> None:
    vms = create(cloud, tmp_path, "--name", "kept", "--flavor", "small", "--image", "small", "--host", "host1")
    host1 = cloud.fleet.host("host1")
    host1.restart()
    wait_until(lambda: serves(host1), "agent and proxy of host1 serve", timeout_s=180, every_s=0.5)
    cloud.wait_up(timeout_s=120)
    ppec = cloud.orchestrator.ppec
    ppec("vm", "start", "kept", "--wait", timeout_s=300)
    answers_of(cloud, vms)
    delete(cloud, vms)
    assert_hosts_are_clean(cloud)


# Emulated, Debian takes a processor for minutes.
@pytest.mark.long
def test_a_debian_cloud_image_finishes_cloud_init(cloud: Cloud, tmp_path: Path) -> None:
    cloud.import_image("debian", debian_guest_image())
    vms = create(
        cloud, tmp_path, "--name", "deb", "--flavor", "large", "--image", "debian",
        user_data=guest_answer.DEBIAN_USER_DATA,
    )  # fmt: skip
    answers = guest_answer.wait_for_answers(ipv4(vms), timeout_s=900)
    assert answers["deb"].instance_id == vms[0]["vm_id"]
    delete(cloud, vms)


def test_the_proxy_turns_away_whoever_has_no_certificate_of_the_fleet(cloud: Cloud) -> None:
    stranger = ssl.create_default_context(cafile=str(cloud.orchestrator.ca))
    # TLS 1.2 asks for the client's certificate within the handshake, so the refusal is seen at once.
    stranger.maximum_version = ssl.TLSVersion.TLSv1_2
    for host in cloud.fleet.hosts:
        with socket.create_connection((host.address, 7443), timeout=10) as plain:
            with pytest.raises(OSError) as refused:
                stranger.wrap_socket(plain, server_hostname=host.address)
            assert not isinstance(refused.value, ssl.SSLCertVerificationError), "the proxy itself must be the fleet's"


def test_deploying_again_changes_nothing(cloud: Cloud) -> None:
    done = subprocess.run(
        [
            str(BIN / "ansible-playbook"), "-i", str(cloud.directory / "inventory.json"), "playbooks/site.yml",
            "-e", "ppec_serial=100%",
        ],
        cwd=PROJECT, capture_output=True, text=True, timeout=900, check=False,
        env={**cloud.orchestrator.user_environment(), "ANSIBLE_STDOUT_CALLBACK": "ansible.builtin.default"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    recap = [line for line in done.stdout.splitlines() if "changed=" in line]
    assert len(recap) == 2
    assert all("changed=0 " in line for line in recap), done.stdout[-3000:]


def test_nothing_secret_or_tenant_made_is_left_in_the_runs_folders(cloud: Cloud, tmp_path: Path) -> None:
    secret = "s3cr3t-" + tmp_path.name
    vms = create(cloud, tmp_path, "--name", "quiet", "--flavor", "small", "--image", "small", user_data=f"# {secret}\n")
    delete(cloud, vms)
    state = cloud.orchestrator.state_dir
    key = (state / "pki" / "ca.key").read_text()
    log = cloud.orchestrator.process.log.read_text()
    assert secret not in log
    assert cloud.orchestrator.token not in log
    for path in (state / "runs").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, f"{path} is open to others"
        if path.is_file():
            text = path.read_text(errors="replace")
            assert key not in text
            assert cloud.orchestrator.token not in text
            assert json.dumps(cloud.orchestrator.token) not in text
