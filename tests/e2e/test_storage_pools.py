# SPDX-License-Identifier: Apache-2.0
"""A VM in a storage pool, from the request to the file that its QEMU has open, and back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ppec_lab.cloud import POOL, POOL_MIB, POOL_PATH, Cloud
from ppec_lab.container_host import ContainerHost
from ppec_lab.orchestrator_process import CliError

pytestmark = [
    pytest.mark.containers,
    pytest.mark.libvirt,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
]

COUNT = 4
DISK_MIB = 4096
NO_CAPACITY = 6


@pytest.fixture(scope="module", autouse=True)
def _flavor(cloud: Cloud) -> None:
    size = ("--vcpus", "2", "--memory-mib", "256", "--disk-mib", str(DISK_MIB))
    cloud.orchestrator.ppec("flavor", "create", "deep", *size)


def free_mib(cloud: Cloud) -> list[int]:
    """By host, as the orchestrator has it: what is told of each pool of theirs."""
    hosts = (cloud.orchestrator.ppec("host", "show", host.name) for host in cloud.fleet.hosts)
    return [pool["free_mib"] for host in hosts for pool in host["pools"] if pool["name"] == POOL]


def ask(cloud: Cloud, *options: str) -> list[str]:
    return ["--flavor", "deep", "--image", "small", "--policy", "spread", *options]


def open_files(host: ContainerHost, vm: dict[str, Any]) -> str:
    """What the VM's QEMU has open."""
    return host.run("sh", "-c", f"ls -l /proc/$(cat /run/libvirt/qemu/{vm['name']}.pid)/fd").stdout


def test_disks_lie_in_the_pool_until_their_vms_are_deleted(cloud: Cloud) -> None:
    ppec = cloud.orchestrator.ppec
    assert free_mib(cloud) == [POOL_MIB] * 2
    ppec("vm", "create", "--count", str(COUNT), "--name", "deep", *ask(cloud, "--pool", POOL), "--wait", timeout_s=600)
    vms = ppec("vm", "list", "--pool", POOL)
    assert sorted(vm["host"] for vm in vms) == ["host1", "host1", "host2", "host2"]
    assert free_mib(cloud) == [POOL_MIB - 2 * DISK_MIB] * 2
    for vm in vms:
        host = cloud.fleet.host(vm["host"])
        disk = f"{POOL_PATH}/{vm['vm_id']}/root.qcow2"
        assert disk in open_files(host, vm)
        described = json.loads(host.run("qemu-img", "info", "-U", "--output=json", disk).stdout)
        assert described["virtual-size"] == DISK_MIB * 1024**2
        assert ppec("host", "show", host.name)["drift"] == []
        assert "root.qcow2" not in host.run("ls", f"/var/lib/ppec/vms/{vm['vm_id']}").stdout

    # Each pool has room for half a disk more, each host's own place for many.
    with pytest.raises(CliError) as refused:
        ppec("vm", "create", "--name", "late", *ask(cloud, "--pool", POOL), "--wait")
    assert refused.value.exit_code == NO_CAPACITY
    assert "2 hosts: 2 without enough free disk" in refused.value.errors

    ppec("vm", "delete", *(vm["name"] for vm in vms), "--wait", timeout_s=300)
    assert free_mib(cloud) == [POOL_MIB] * 2
    for host in cloud.fleet.hosts:
        assert host.run("ls", POOL_PATH).stdout.split() == []


def test_a_pool_that_no_host_has_is_a_reason(cloud: Cloud) -> None:
    with pytest.raises(CliError) as refused:
        cloud.orchestrator.ppec("vm", "create", "--name", "lost", *ask(cloud, "--pool", "nowhere"))
    assert refused.value.exit_code == NO_CAPACITY
    assert "2 hosts: 2 without that storage pool" in refused.value.errors
    assert "have its disk in no pool" in refused.value.errors
