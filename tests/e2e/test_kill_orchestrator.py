# SPDX-License-Identifier: Apache-2.0
"""kill -9 of the orchestrator or an agent in mid-batch: nothing is lost, nothing is done twice."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest

from ppec_lab.conditions import wait_until
from ppec_lab.local_cloud import LocalCloud

pytestmark = pytest.mark.slow
SLOW_STARTS = {"lab": {"delays_s": {"start": 0.7}}}


def some_domains(cloud: LocalCloud, at_least: int) -> bool:
    return sum(map(len, cloud.domains().values())) >= at_least


def nothing_open(cloud: LocalCloud) -> bool:
    operations = cloud.orchestrator.ppec("operation", "list")
    return all(one["state"] not in ("queued", "running") for one in operations)


def assert_whole(cloud: LocalCloud, operation: dict[str, Any], count: int) -> None:
    """Every VM is there once: in the operation, in the record, on exactly one host, with its own address."""
    assert operation["state"] == "succeeded", operation
    vms = cloud.vms()
    assert len(vms) == count
    assert {vm["record"] for vm in vms} == {"active"}
    on_hosts = [(name, vm_id) for name, ids in cloud.domains().items() for vm_id in ids]
    assert sorted(on_hosts) == sorted((vm["host"], vm["vm_id"]) for vm in vms)
    addresses = {a["address"] for vm in vms for a in vm["addresses"]}
    assert len(addresses) == count
    assert cloud.addresses_in_use() == addresses


def assert_adopted(cloud: LocalCloud, operation: dict[str, Any]) -> None:
    """The killed orchestrator's run was taken over, and nothing of it begun again."""
    log = cloud.orchestrator.process.tail(10_000)
    adopted = [line for line in log.splitlines() if "run.adopted" in line and operation["operation_id"] in line]
    assert adopted, f"the run was to be adopted:\n{log}"
    counters = operation["counters"]
    assert (counters["runs"], counters["planning_passes"]) == (1, 1), f"and nothing of it begun again:\n{log}"


def test_an_orchestrator_killed_in_mid_batch_adopts_the_run_and_finishes(
    local_cloud: Callable[..., LocalCloud],
) -> None:
    cloud = local_cloud(**SLOW_STARTS)
    _, late = cloud.hosts
    # However slow this machine is, the batch is not over before the successor is there.
    late.agentd.send(signal.SIGSTOP)
    operation = cloud.create(count=8, name="web", policy="spread")
    wait_until(lambda: some_domains(cloud, 1), "the first domain is defined", timeout_s=60)
    cloud.orchestrator.process.kill()
    assert not some_domains(cloud, 5)
    cloud.orchestrator.start()
    late.agentd.send(signal.SIGCONT)
    ended = cloud.ended(operation["operation_id"])
    assert_whole(cloud, ended, 8)
    assert_adopted(cloud, ended)


def test_a_host_without_its_image_waits_for_the_orchestrator_to_come_back(
    local_cloud: Callable[..., LocalCloud],
) -> None:
    cloud = local_cloud()
    early, late = cloud.hosts
    # Its call lies in the socket's queue until it is let on.
    late.agentd.send(signal.SIGSTOP)
    operation = cloud.create(count=8, name="web", policy="spread")
    wait_until(lambda: len(early.fake_domains()) == 4, "one host is done", timeout_s=60)
    cloud.orchestrator.process.kill()
    late.agentd.send(signal.SIGCONT)
    wait_until(
        lambda: "image_source_away" in late.agentd.log.read_text(),
        "the other host finds the orchestrator away",
        timeout_s=60,
    )
    assert late.fake_domains() == []
    cloud.orchestrator.start()
    ended = cloud.ended(operation["operation_id"])
    assert_whole(cloud, ended, 8)
    assert_adopted(cloud, ended)
    assert len(late.fake_domains()) == 4


def test_an_agent_killed_in_mid_create_comes_back_and_the_batch_is_whole(
    local_cloud: Callable[..., LocalCloud],
) -> None:
    cloud = local_cloud(**SLOW_STARTS)
    operation = cloud.create(count=6, name="web", policy="spread")
    victim = cloud.hosts[0]
    wait_until(lambda: len(victim.fake_domains()) >= 1, "the victim has defined a domain", timeout_s=60)
    victim.agentd.kill()
    victim.start_agentd()
    ended = cloud.ended(operation["operation_id"])
    # An agent that is away for longer than a call is repeated loses its VMs to the other host; what it has of them is
    # removed when it is back, as an operation of its own.
    wait_until(lambda: nothing_open(cloud), "every clean-up is over", timeout_s=150, every_s=0.5)
    assert_whole(cloud, ended, 6)


def test_a_killed_orchestrator_leaves_deletes_to_be_finished(local_cloud: Callable[..., LocalCloud]) -> None:
    cloud = local_cloud(hosts=1, lab={"delays_s": {"undefine": 0.5}})
    cloud.ended(cloud.create(count=4, name="web")["operation_id"])
    names = [vm["name"] for vm in cloud.vms()]
    body = {"action": "delete", "vms": names}
    operation = cloud.orchestrator.request("POST", "/v1/vms/actions", body)
    wait_until(lambda: not some_domains(cloud, 4), "the first domain is gone", timeout_s=60)
    cloud.orchestrator.process.kill()
    cloud.orchestrator.start()
    assert cloud.ended(operation["operation_id"])["state"] == "succeeded"
    assert cloud.vms() == []
    assert cloud.addresses_in_use() == set()
    assert cloud.domains() == {"h1": []}
