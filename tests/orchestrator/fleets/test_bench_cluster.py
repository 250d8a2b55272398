# SPDX-License-Identifier: Apache-2.0
"""ppec-bench-cluster/1: sockets are cells, the reserve is the host's own, an app stands apart if the rules say so."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from ppec_contract.errors import PpecError
from ppec_orchestrator.fleets.file import FleetFile
from ppec_orchestrator.fleets.reading import read_fleet, read_requests
from ppec_orchestrator.placement.planner import plan
from ppec_orchestrator.placement.reasons import Reason
from ppec_orchestrator.placement.request import Group, PlanRequest


def socket(number: int) -> dict[str, int]:
    return {"id": number, "cores": 18, "reserved_cores": 2, "mem_mib": 40960, "reserved_mem_mib": 8192}


def vm(name: str, host: str = "h1", socket: int = 0, app: str = "a1", **more: Any) -> dict[str, Any]:
    row = {"name": name, "vcpus": 8, "mem_mib": 16384, "disk_mib": 1000, "host": host, "socket": socket, "app": app}
    return row | more


CLUSTER: dict[str, Any] = {
    "schema": "ppec-bench-cluster/1",
    "seed": 1,
    "storage": "local",
    "rules": {"vcpu_ratio": 1.0, "even_vcpus": True, "vm_fits_one_socket": True, "anti_affinity": True},
    "flavours": [
        {"name": "c8", "weight": 1, "vcpus": 8, "mem_mib": 16384, "disk_mib": 1000},
        {"name": "c2", "weight": 1, "vcpus": 2, "mem_mib": 1024, "disk_mib": 10},
    ],
    "groups": [{"name": "g1", "uuid": "1"}],
    "hosts": [
        {"name": name, "group": "g1", "rack": f"r{name}", "class": "s", "sockets": [socket(0), socket(1)],
         "disk_mib": 5000, "free": free}
        for name, free in (
            ("h1", {"cores": 16, "mem_mib": 32768, "disk_mib": 3000}),
            ("h2", {"cores": 24, "mem_mib": 49152, "disk_mib": 4000}),
        )
    ],
    "vms": [vm("v1"), vm("v2", socket=1, app="a2"), vm("v3", host="h2")],
    "requests": {"one": {"flavour": "c8"}, "batch": [{"name": "n1", "flavour": "c8", "app": "a1"},
                                                    {"name": "n2", "flavour": "c2", "app": "a3"}]},
}  # fmt: skip


def read(change: Callable[[dict[str, Any]], object] | None = None) -> FleetFile:
    document = copy.deepcopy(CLUSTER)
    if change is not None:
        change(document)
    return read_fleet(json.dumps(document).encode(), "cluster.json")


def test_what_stands_in_the_file_is_what_is_free() -> None:
    file = read()
    first, second = file.fleet.hosts
    assert (first.cluster, first.rack) == ("g1", "rh1")
    assert [(c.cores, c.cores_free, c.cores_reserved) for c in first.cells] == [(16, 8, 2), (16, 8, 2)]
    assert [(c.memory_mib, c.memory_free_mib, c.memory_reserved_mib) for c in second.cells] == [
        (32768, 16384, 8192),
        (32768, 32768, 8192),
    ]
    assert (first.disk_mib, first.disk_free_mib, second.disk_free_mib) == (5000, 3000, 4000)
    assert [seated.cells for seated in first.vms] == [(0,), (1,)]
    assert first.vms[0].groups == (Group("app:a1"),)
    assert len({seated.vm_id for host in file.fleet.hosts for seated in host.vms}) == 3


def test_an_app_that_stands_on_every_host_is_refused_and_another_is_placed() -> None:
    file = read()
    made = plan(file.fleet, PlanRequest(file.requests))
    assert [(each.name, each.reasons) for each in made.refused] == [("n1", {Reason.ANTI_AFFINITY: 2})]
    assert [each.name for each in made.placed] == ["n2"]


def test_without_the_rule_an_app_may_stand_anywhere() -> None:
    file = read(lambda document: document["rules"].update(anti_affinity=False))
    assert len(plan(file.fleet, PlanRequest(file.requests)).placed) == 2


def test_shared_storage_takes_no_disk_of_a_host() -> None:
    file = read(lambda document: document.update(storage="shared"))
    assert [host.disk_free_mib for host in file.fleet.hosts] == [5000, 5000]
    assert {each.profile.shape.disk_mib for each in file.requests} == {0}


def test_a_mirror_takes_as_much_of_its_second_host() -> None:
    def mirrored(document: dict[str, Any]) -> None:
        document["storage"] = "mirrored"
        document["vms"][0]["secondary"] = "h2"
        document["hosts"][1]["free"]["disk_mib"] = 3000

    assert [host.disk_free_mib for host in read(mirrored).fleet.hosts] == [3000, 3000]


def test_more_requests_are_written_as_the_file_writes_them() -> None:
    file = read()
    (found,) = read_requests(b'{"batch": [{"name": "x", "flavour": "c2", "app": "a9"}]}', "more.json", file).requests
    assert (found.profile.shape.vcpus, found.groups) == (2, (Group("app:a9"),))
    again = read_requests(json.dumps(CLUSTER).encode(), "cluster.json", file).requests
    assert again == file.requests
    own = b'{"schema": "ppec-requests/1", "batch": [{"name": "x", "profile": "c2"}]}'
    assert read_requests(own, "own.json", file).requests[0].profile == found.profile


def at(*path: str | int, value: object) -> Callable[[dict[str, Any]], None]:
    def change(document: Any) -> None:
        for part in path[:-1]:
            document = document[part]
        document[path[-1]] = value

    return change


def in_another_group(document: Any) -> None:
    document["groups"].append({"name": "g2"})
    document["hosts"][1] |= {"group": "g2", "rack": "rh1"}


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (at("hosts", 1, "sockets", 0, "cores", value=-4), "hosts[1].sockets[0].cores"),
        (at("hosts", 1, "sockets", 0, "cores", value=4.5), "hosts[1].sockets[0].cores"),
        (at("hosts", 1, "sockets", 0, "mem_mib", value=2**40), "hosts[1].sockets[0].mem_mib"),
        (at("hosts", 1, "sockets", 0, "reserved_cores", value=20), "hosts[1].sockets[0].reserved_cores"),
        (at("hosts", 1, "sockets", 0, "id", value=1), "hosts[1].sockets[1].id"),
        (at("hosts", 1, "sockets", value=[]), "hosts[1].sockets"),
        (at("hosts", 1, "name", value="h1"), "hosts[1].name"),
        (at("hosts", 1, "group", value="g9"), "hosts[1].group"),
        (at("hosts", 1, "disk_mib", value=-1), "hosts[1].disk_mib"),
        (at("hosts", 1, "disk_mib", value=999), "vms[2]"),
        (at("groups", value=[{"name": "g1"}, {"name": "g1"}]), "groups[1].name"),
        (at("vms", 1, "name", value="v1"), "vms[1].name"),
        (at("vms", 1, "host", value="h9"), "vms[1].host"),
        (at("vms", 1, "socket", value=2), "vms[1].socket"),
        (at("vms", 1, "vcpus", value=-2), "vms[1].vcpus"),
        (at("vms", 1, "vcpus", value=7), "vms[1].vcpus"),
        (at("vms", 1, "vcpus", value=18), "vms[1]"),
        (at("vms", 1, value=vm("v2", app="a2", mem_mib=20000)), "vms[1]"),
        (at("vms", 0, "secondary", value="h9"), "vms[0].secondary"),
        (at("vms", 0, "secondary", value="h1"), "vms[0].secondary"),
        (at("flavours", 1, "name", value="c8"), "flavours[1].name"),
        (at("flavours", 1, "vcpus", value=3), "flavours[1].vcpus"),
        (at("requests", "batch", 1, "flavour", value="c9"), "requests.batch[1].flavour"),
        (at("requests", "batch", 1, "name", value="n1"), "requests.batch[1].name"),
        (at("requests", "batch", 1, "name", value="v1"), "requests.batch[1].name"),
        (at("rules", "vcpu_ratio", value=4.0), "rules.vcpu_ratio"),
        (at("rules", "vcpu_ratio", value=float("nan")), "rules.vcpu_ratio"),
        (at("storage", value="tape"), "storage"),
        (at("vms", value={}), "vms"),
        (at("rules", "vcpu_ratio", value=True), "rules.vcpu_ratio"),
        (at("rules", "anti_affinity", value=0), "rules.anti_affinity"),
        (at("groups", value=[{"name": "g1"}, {"name": "g2", "uuid": 2}]), "groups[1].uuid"),
        (in_another_group, "hosts[1].rack"),
        (at("hosts", 1, "free", "cores", value=25), "hosts[1].free.cores"),
        (at("hosts", 1, "free", "mem_mib", value=0), "hosts[1].free.mem_mib"),
        (at("hosts", 1, "free", "disk_mib", value=5000), "hosts[1].free.disk_mib"),
        (at("hosts", 1, "free", value={"cores": 24}), "hosts[1].free.mem_mib"),
        (at("hosts", 1, "free", value=None), "hosts[1].free"),
        (at("hosts", 1, "class", value=[]), "hosts[1].class"),
        (at("hosts", 1, "sockets", 0, "clock", value=1), "hosts[1].sockets[0].clock"),
        (at("hosts", 1, "colour", value=1), "hosts[1].colour"),
        (at("vms", 0, "secundary", value="h2"), "vms[0].secundary"),
        (at("vms", 0, "secondary", value="h2"), "vms[0].secondary"),
        (at("vms", 0, "flavour", value="c9"), "vms[0].flavour"),
        (at("flavours", 0, "weight", value=float("nan")), "flavours[0].weight"),
        (at("flavours", 0, "weight", value=-1), "flavours[0].weight"),
        (at("requests", "one", "flavour", value="c9"), "requests.one.flavour"),
        (at("requests", "one", value={}), "requests.one.flavour"),
        (at("requests", "batch", 0, "application", value="a1"), "requests.batch[0].application"),
        (at("seed", value="1"), "seed"),
        (at("request", value={"batch": []}), "request"),
    ],
)
def test_what_is_wrong_is_refused_with_its_path(change: Callable[[dict[str, Any]], None], where: str) -> None:
    with pytest.raises(PpecError) as refused:
        read(change)
    assert refused.value.code == "fleet.invalid"
    assert refused.value.details["where"] == where


def test_what_follows_from_the_rest_may_be_left_out() -> None:
    def without(document: dict[str, Any]) -> None:
        for host in document["hosts"]:
            del host["free"]

    assert read(without).fleet.hosts == read().fleet.hosts


def test_a_flavour_may_be_of_another_size_than_the_vms_that_came_from_it() -> None:
    def grown(document: dict[str, Any]) -> None:
        document["vms"][0]["flavour"] = "c8"
        document["flavours"][0]["mem_mib"] *= 2

    assert read(grown).fleet.hosts == read().fleet.hosts


def test_vms_that_overlap_are_refused_with_what_is_lacking() -> None:
    with pytest.raises(PpecError, match=r"socket 0 of host 'h1' lacks 8 cores for it"):
        read(lambda document: document["vms"].extend([vm("v4", mem_mib=1), vm("v5", mem_mib=1)]))
