# SPDX-License-Identifier: Apache-2.0
"""After kill -9 at any moment of a create: the VM is whole or nothing of it is left, and a repeat gets it right."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable
from typing import Any

import pytest

from ppec_agentd.hypervisor import Domain
from ppec_agentd.recovery import recover
from ppec_contract.agent import StopVms
from ppec_contract.vm import VmState
from ppec_lab.conditions import wait_until


def create(*vms: Any, fence: int = 1) -> dict[str, Any]:
    return {"operation_id": "op-1", "fence": fence, "vms": [vm.model_dump(mode="json") for vm in vms]}


def usage(report: dict[str, Any]) -> tuple[int, int, int]:
    cells = report["cells"]
    cores = sum(cell["cores"] - cell["cores_free"] for cell in cells)
    memory_mib = sum(cell["memory_mib"] - cell["memory_free_mib"] for cell in cells)
    return cores, memory_mib, report["disk_mib"] - report["disk_free_mib"]


def assert_whole_or_gone(agent: Any, vm_ids: set[str]) -> set[str]:
    """Domains, folders and ledger tell one story; returns the ids of the VMs that are there."""
    report = agent.client().call("GetReport")["parameters"]["report"]
    present = {vm["vm_id"] for vm in report["vms"]}
    assert present <= vm_ids
    assert {vm["state"] for vm in report["vms"]} <= {"running"}
    assert {path.name for path in agent.settings.storage.vms.iterdir()} == present
    assert usage(report) == (len(present), 512 * len(present), 16 * len(present))
    pins = [pin["pcpu"] for vm in report["vms"] for pin in vm["pins"]]
    assert len(pins) == len(set(pins)) == 2 * len(present)
    return present


# Each method of the hypervisor is slowed in turn and the agent killed while in it, or on the way there.
@pytest.mark.parametrize("slow", ["domain", "define", "start"])
def test_killed_in_mid_create_it_comes_back_clean_and_a_repeat_succeeds(
    agent_process: Callable[..., Any], vm: Any, slow: str
) -> None:
    agent = agent_process(lab={"delays_s": {slow: 600}}).start()
    vms = [vm() for _ in range(3)]
    ids = {str(v.vm_id) for v in vms}
    client = agent.client()
    client.send("cloud.ppec.agent.CreateVms", create(*vms), more=True)
    journal = agent.settings.storage.journal
    wait_until(lambda: journal.read_bytes().count(b"\n") >= 3, "the intents are on disk", timeout_s=60)
    time.sleep(0.3)
    agent.kill()
    settings = agent.settings
    agent.write_settings(settings.model_copy(update={"lab": settings.lab.model_copy(update={"delays_s": {}})}))
    agent.start()
    recovered = next(line for line in reversed(agent.log_lines()) if line["event"] == "recovered")
    assert len(recovered["finished"]) + len(recovered["undone"]) == 3
    assert_whole_or_gone(agent, ids)
    results = agent.client().call("CreateVms", create(*vms))["parameters"]["results"]
    assert [result["problem"] for result in results] == [None] * 3
    assert assert_whole_or_gone(agent, ids) == ids
    # A second restart changes nothing.
    agent.end()
    agent.start()
    assert assert_whole_or_gone(agent, ids) == ids


def test_killed_again_and_again_nothing_is_lost_or_doubled(agent_process: Callable[..., Any], vm: Any) -> None:
    agent = agent_process(lab={"delays_s": {"define": 0.05, "start": 0.1, "domain": 0.02}})
    vms = [vm() for _ in range(6)]
    vms[3:] = [vm(cells=[1]) for _ in range(3)]
    ids = {str(v.vm_id) for v in vms}
    for turn in range(5):
        agent.start()
        assert_whole_or_gone(agent, ids)
        client = agent.client()
        client.send("cloud.ppec.agent.CreateVms", create(*vms, fence=turn), more=True)
        client.receive()
        time.sleep(0.08 * turn)
        agent.kill()
    agent.start()
    results = agent.client().call("CreateVms", create(*vms, fence=9))["parameters"]["results"]
    assert [result["problem"] for result in results] == [None] * 6
    assert assert_whole_or_gone(agent, ids) == ids


def test_killed_in_mid_delete_the_delete_is_finished(agent_process: Callable[..., Any], vm: Any) -> None:
    agent = agent_process(lab={"delays_s": {"undefine": 0.6}}).start()
    vms = [vm() for _ in range(2)]
    ids = {str(v.vm_id) for v in vms}
    assert agent.client().call("CreateVms", create(*vms))["parameters"]["results"][0]["changed"]
    request = {"operation_id": "op-2", "fence": 1, "vm_ids": sorted(ids)}
    client = agent.client()
    client.send("cloud.ppec.agent.DeleteVms", request, more=True)
    while client.receive()["parameters"]["progress"]["stage"] != "undefine":
        pass
    agent.kill()
    agent.start()
    assert assert_whole_or_gone(agent, ids) == set()
    results = agent.client().call("DeleteVms", request)["parameters"]["results"]
    assert [(result["problem"], result["replayed"]) for result in results] == [(None, True)] * 2


def test_a_lost_journal_is_made_good_from_the_domains(settings: Any, words: Any, vm: Any) -> None:
    async def scenario() -> None:
        one, two = vm(), vm()
        async with words.open_agent(settings) as agent:
            await agent.create(one, two)
        settings.storage.journal.unlink()
        async with words.open_agent(settings) as agent:
            recovered = await recover(agent.context)
            assert recovered.adopted == 2
            left = await agent.left_behind()
            assert (left["cores"], left["memory_mib"], left["disk_mib"]) == (2, 1024, 32)
            (again,) = await agent.create(one)
            assert again.problem is None
            assert not again.changed
            (other,) = await agent.create(vm(vm_id=two.vm_id), operation="op-2")
            assert other.problem.code == "vm.exists"

    asyncio.run(scenario())


def test_domains_made_by_hand_and_unknown_folders_are_left_alone(settings: Any, words: Any, vm: Any) -> None:
    async def scenario() -> None:
        unknown = settings.storage.vms / str(uuid.uuid4())
        unknown.mkdir(parents=True)
        async with words.open_agent(settings) as agent:
            agent.hypervisor.make_by_hand(Domain(uuid.uuid4(), "hand", VmState.RUNNING, 2, 1000))
            await recover(agent.context)
            left = await agent.left_behind()
            assert left["domains"] == left["held"] == ["hand"]
            assert left["memory_mib"] == 1000
            assert unknown.is_dir()

    asyncio.run(scenario())


def test_a_create_that_was_refused_takes_no_disk_away(settings: Any, words: Any, vm: Any) -> None:
    """A VM stands, its create is asked for again and refused for that, and its domain is undefined by hand: its disk is
    all there is of it."""

    async def scenario() -> None:
        one = vm()
        async with words.open_agent(settings) as agent:
            assert [r.problem for r in await agent.create(one)] == [None]
            stop = StopVms(operation_id="op-1", fence=1, vm_ids=(one.vm_id,), timeout_s=0, force=True)
            await agent.run(stop)
            (again,) = await agent.create(one, fence=2)
            assert again.problem.code == "vm.exists"
            assert agent.context.journal.gone_ids() == frozenset()
            await agent.hypervisor.undefine(one.vm_id)
        async with words.open_agent(settings) as agent:
            assert (await recover(agent.context)).folders_removed == ()
            assert (await agent.left_behind())["folders"] == [str(one.vm_id)]

    asyncio.run(scenario())


def test_only_folders_of_vms_that_are_gone_are_removed(settings: Any, words: Any, vm: Any) -> None:
    async def scenario() -> None:
        standing, deleted = vm(), vm()
        async with words.open_agent(settings) as agent:
            await agent.create(standing, deleted)
            await agent.delete(deleted.vm_id, operation="op-2")
            agent.context.folder(deleted.vm_id).make()  # as if the wipe had come back after a power loss
            # Undefined by hand: the disk is all that is left of it.
            await agent.hypervisor.destroy(standing.vm_id)
            await agent.hypervisor.undefine(standing.vm_id)
        async with words.open_agent(settings) as agent:
            recovered = await recover(agent.context)
            assert recovered.folders_removed == (str(deleted.vm_id),)
            assert (await agent.left_behind())["folders"] == [str(standing.vm_id)]

    asyncio.run(scenario())


def test_it_waits_for_a_hypervisor_that_is_away(agent_process: Callable[..., Any]) -> None:
    """Not reachable is no reason to end: the process says so, serves nothing yet, and obeys SIGTERM meanwhile."""
    agent = agent_process(hypervisor="libvirt", libvirt={"uri": "qemu+unix:///system?socket=/nonexistent"})
    agent.spawn()
    wait_until(lambda: any(line["event"] == "waiting" for line in agent.log_lines()), "it says it waits", timeout_s=60)
    assert not agent.settings.socket.path.exists()
    assert agent.end() == 0
    assert json.dumps(agent.log_lines()).count("hypervisor.unavailable") >= 1
