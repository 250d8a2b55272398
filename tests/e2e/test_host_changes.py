# SPDX-License-Identifier: Apache-2.0
"""Through the whole chain, what is changed on a host while VMs run: the record follows, to the cell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from ppec_lab.local_cloud import LocalCloud

pytestmark = pytest.mark.slow


def delete(cloud: LocalCloud, names: list[str]) -> None:
    operation = cloud.orchestrator.request("POST", "/v1/vms/actions", {"action": "delete", "vms": names})
    assert cloud.ended(operation["operation_id"])["state"] == "succeeded"


def one_vm_per_cell(cloud: LocalCloud) -> list[str]:
    """VMs on h1, one in each of its two cells."""
    created = cloud.create(name="web", count=5, host="h1", policy="pack", mode="best-effort")
    assert cloud.ended(created["operation_id"])["state"] in ("succeeded", "partial")
    in_cell: dict[int, str] = {}
    for vm in cloud.vms():
        in_cell.setdefault(vm["cells"][0], vm["name"])
    assert sorted(in_cell) == [0, 1]
    delete(cloud, [vm["name"] for vm in cloud.vms() if vm["name"] not in in_cell.values()])
    return [in_cell[0], in_cell[1]]


def cores_free(cloud: LocalCloud) -> Counter[int]:
    host = cloud.orchestrator.ppec("host", "show", "h1")
    return Counter({cell["cell"]: cell["cores_free"] for cell in host["cells"]})


def test_cell_is_opened_a_vm_grows_and_the_record_follows(local_cloud: Callable[..., Any]) -> None:
    cloud = local_cloud(hosts=1, lab={"topology": "sockets=2,cores=4,threads=1,memory_mib=8192"})
    ppec, names = cloud.orchestrator.ppec, one_vm_per_cell(cloud)
    before = cores_free(cloud)
    plan = ppec("host", "retune", "h1", "--plan")
    (opened,), (move,) = plan["opened"], plan["moves"]
    assert (move["before"]["cell"], move["name"]) == (opened, names[opened])
    assert cores_free(cloud) == before
    assert [vm["cells"] for vm in cloud.vms()] == [[0], [1]] or names[0] > names[1]
    ended = ppec("host", "retune", "h1", "--wait")
    assert (ended["kind"], ended["state"]) == ("host.retune", "succeeded")
    assert [item["name"] for item in ended["items"]] == [names[opened]]
    vms = {vm["name"]: vm for vm in cloud.vms()}
    assert {tuple(vm["cells"]) for vm in vms.values()} == {(1 - opened,)}
    assert vms[names[opened]]["pins"] == ended["retune"]["plan"]["moves"][0]["after"]["pins"]
    assert {vm["observed"] for vm in vms.values()} == {"running"}
    after = cores_free(cloud)
    assert after[opened] == before[opened] + 2
    assert after[1 - opened] == before[1 - opened] - 2
    again = ppec("host", "retune", "h1", "--plan")
    assert again["moves"] == []
    refused = cloud.orchestrator.request("PATCH", f"/v1/vms/{names[0]}", {"vcpus": 4})
    assert (refused["code"], refused["details"]["free"]) == ("host.no_capacity", after[1 - opened])
    delete(cloud, names[1:])
    grown = ppec("vm", "resize", names[0], "--vcpus", "4", "--memory", "512M", "--wait")
    assert grown["state"] == "succeeded"
    effects = grown["items"][0]["resized"]
    vm = ppec("vm", "show", names[0])
    assert (vm["vcpus"], vm["memory_mib"]) == (4, 512)
    assert (vm["held"] is None) == (set(effects.values()) == {"now"})
    assert cores_free(cloud)[1 - opened] == after[1 - opened]
    ppec("vm", "stop", names[0], "--force", "--timeout", "0", "--wait")
    ppec("vm", "start", names[0], "--wait")
    vm = ppec("vm", "show", names[0])
    assert (vm["vcpus"], vm["memory_mib"], vm["held"], len(vm["pins"])) == (4, 512, None, 4)
    for action, state in (("pause", "paused"), ("resume", "running"), ("reset", "running")):
        assert ppec("vm", action, names[0], "--wait")["state"] == "succeeded"
        assert ppec("vm", "show", names[0])["observed"] == state
    delete(cloud, names[:1])
    assert cores_free(cloud) == Counter({cell: before[cell] + 2 for cell in before})


def test_a_cell_is_opened_for_a_vm_that_fits_nowhere(local_cloud: Callable[..., Any]) -> None:
    cloud = local_cloud(hosts=1, lab={"topology": "sockets=2,cores=4,threads=1,memory_mib=8192"})
    ppec, names = cloud.orchestrator.ppec, one_vm_per_cell(cloud)
    free = cores_free(cloud)
    wide = {"vcpus": max(free.values()) + 2, "memory_mib": 256, "disk_mib": 1024}
    asked = ["--image", "empty", "--vcpus", str(wide["vcpus"]), "--memory-mib", "256", "--disk-mib", "1024"]
    refused = cloud.orchestrator.request("POST", "/v1/vms", {"name": "wide", "image": "empty", "size": wide})
    assert refused["code"] == "placement.no_capacity"
    assert "retune" in [change["kind"] for change in refused["details"]["changes"]]
    plan = ppec("explain", "wide", *asked, "--max-moves", "1")
    (placed,) = plan["placed"]
    (move,) = placed["moves"]
    assert (move["vm"] in names, move["cells_before"]) == (True, placed["cells"])
    assert cores_free(cloud) == free
    ended = ppec("execute", plan["plan_id"], "--wait")
    assert (ended["kind"], ended["state"]) == ("vm.create", "succeeded")
    vms = {vm["name"]: vm for vm in cloud.vms()}
    assert vms["wide"]["cells"] == placed["cells"]
    assert vms[move["vm"]]["cells"] == move["cells_after"]
    assert {vm["observed"] for vm in vms.values()} == {"running"}
    assert sum(free.values()) - sum(cores_free(cloud).values()) == wide["vcpus"]
