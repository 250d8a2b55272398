# SPDX-License-Identifier: Apache-2.0
"""ppec-fleet/1: what is written is read again to the last figure, and what can't be is refused with its path."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppec_contract.errors import PpecError
from ppec_contract.vm import CpuPolicy, NumaPolicy, SmtPolicy
from ppec_orchestrator.fleets.file import MOST_REQUESTS, FleetFile
from ppec_orchestrator.fleets.reading import read_fleet, read_requests
from ppec_orchestrator.fleets.snapshot import written
from ppec_orchestrator.placement.demand import CELL_RESOURCES, cpu_part, cpu_resource, free_name, memory_part
from ppec_orchestrator.placement.demand import memory_resource as memory_of
from ppec_orchestrator.placement.fleet import CellState, Fleet, HostState, PoolState, SeatedVm
from ppec_orchestrator.placement.request import (
    NO_SPARE_RULE,
    Group,
    Level,
    Profile,
    Shape,
    Spare,
    SpareRule,
    VmRequest,
    Where,
)

GOLDEN = Path(__file__).parent / "golden" / "fleet.json"
names = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=1, max_size=12)
numas = st.sampled_from(
    [
        NumaPolicy(),
        NumaPolicy(smt=SmtPolicy.ISOLATE),
        NumaPolicy(multi_cell=True),
        NumaPolicy(huge_page_kib=2048),
        NumaPolicy(cpus=CpuPolicy.SHARED),
    ]
)
# Rack, cluster, data centre, region; where nobody says, hosts stand in none.
STANDS = (
    ("r1", "c1", "d1", "south"),
    ("r2", "c1", "d1", "south"),
    ("r3", "c2", "d2", "south"),
    ("", "ü", "", ""),
    ("", "", "d1", "south"),
)
wheres = st.builds(
    Where,
    rack=st.none() | st.sampled_from(["r1", "r2", "r3"]),
    region=st.none() | st.just("south"),
    labels=st.frozensets(st.tuples(names, names), max_size=2),
    without=st.frozensets(st.tuples(names, st.just("")), max_size=2),
)
profiles = st.builds(
    Profile,
    st.builds(
        Shape,
        vcpus=st.integers(1, 32).map(lambda half: half * 2),
        memory_mib=st.integers(1, 64).map(lambda units: units * 1024),
        disk_mib=st.integers(0, 100_000),
        numa=numas,
        nvme=st.integers(0, 2),
    ),
    st.just("x86_64"),
    wheres,
    st.frozensets(names, max_size=2),
    st.lists(st.none() | st.frozensets(st.integers(1, 9), max_size=2), max_size=2).map(tuple),
    st.lists(st.frozensets(st.integers(1, 9), max_size=2), max_size=1).map(tuple),
)
spare_rules = st.just(NO_SPARE_RULE) | st.builds(
    SpareRule, st.sampled_from((Spare.WARN, Spare.REQUIRED)), st.sampled_from((Level.HOST, Level.RACK))
)
# No group holds its own together: that is for the tests of groups.
groups = st.lists(
    st.builds(Group, names, st.just(True), st.sampled_from(Level), st.booleans()),
    max_size=3,
    unique_by=lambda group: group.name,
)


def held(vms: list[SeatedVm], cell: int, threads: int) -> dict[str, int]:
    taken = dict.fromkeys(CELL_RESOURCES, 0)
    for vm in vms:
        if cell in vm.cells:
            shape, parts = vm.profile.shape, len(vm.cells)
            taken[cpu_resource(shape)] += cpu_part(shape, threads, parts)
            taken[memory_of(shape)] += memory_part(shape, parts)
            taken["nvme"] += -(-shape.nvme // parts)
    return {**taken}


@st.composite
def hosts(draw: st.DrawFn, number: int, known: list[Profile], bound: list[Group]) -> HostState:
    def seated(index: int) -> SeatedVm:
        profile = draw(st.sampled_from(known))
        cells = (0, 1) if profile.shape.numa.multi_cell else (draw(st.integers(0, 1)),)
        mine = draw(st.lists(st.sampled_from(bound), unique=True)) if bound else []
        vm_id = UUID(int=number * 1000 + index)
        return SeatedVm(vm_id, f"v{number}-{index}", profile, cells, tuple(mine), draw(st.booleans()))

    def cell(index: int, vms: list[SeatedVm]) -> CellState:
        threads = draw(st.integers(1, 2))
        taken = held(vms, index, threads)
        figures = {}
        for resource in CELL_RESOURCES:
            figures[free_name(resource)] = draw(st.integers(0, 3))
            figures[resource] = taken[resource] + figures[free_name(resource)] + draw(st.integers(0, 1))
        shared_cpus = draw(st.integers(figures["shared_vcpus"] > 0, 4))
        return CellState(index, draw(st.integers(0, 1)), threads, shared_cpus=shared_cpus, **figures)

    rack, cluster, datacentre, region = draw(st.sampled_from(STANDS))
    vms = [seated(index) for index in range(draw(st.integers(0, 3)))]
    disk_mib, disk_free_mib = sum(vm.profile.shape.disk_mib for vm in vms), draw(st.integers(0, 9))
    return HostState(
        host_id=number,
        name=f"h{number}",
        datacentre=datacentre,
        cluster=cluster,
        rack=rack,
        vrf=draw(names),
        architecture="x86_64",
        cells=tuple(cell(index, vms) for index in range(2)),
        disk_mib=disk_mib + disk_free_mib,
        disk_free_mib=disk_free_mib,
        vms=tuple(vms),
        live=draw(st.booleans()),
        draining=draw(st.booleans()),
        prefixes=draw(st.sampled_from([(), ((1,),), ((1, 2), (3,))])),
        capabilities=draw(st.frozensets(names, max_size=2)),
        region=region,
        labels=draw(st.dictionaries(names, names, max_size=2)),
        pools=draw(st.dictionaries(names, st.just(PoolState(100, 40)), max_size=2)),
        generation=draw(st.integers(0, 9)),
    )


@st.composite
def files(draw: st.DrawFn) -> FleetFile:
    known = draw(st.lists(profiles, min_size=1, max_size=3))
    bound = draw(groups)
    rules = {cluster: draw(spare_rules) for _, cluster, _, _ in STANDS}
    standing_there = [draw(hosts(number, known, bound)) for number in range(draw(st.integers(0, 3)))]
    fleet = Fleet.build(
        [replace(host, spare=rules[host.cluster]) for host in standing_there],
        draw(st.dictionaries(st.integers(1, 3), st.integers(0, 1000))),
    )
    possible = [
        profile
        for profile in known
        if all(
            name is None or name in fleet.places[place]
            for place, name in (("rack", profile.where.rack), ("region", profile.where.region))
        )
    ]
    standing = [host.name for host in fleet.hosts]
    requests = tuple(
        VmRequest(
            UUID(int=10**9 + index),
            f"new-{index}",
            draw(st.sampled_from(possible)),
            draw(st.frozensets(st.sampled_from(standing), max_size=2)) if standing else frozenset(),
            tuple(bound[: draw(st.integers(0, 3))]),
            draw(st.integers(-5, 5)),
        )
        for index in range(draw(st.integers(0, 3)) if possible else 0)
    )
    return FleetFile(fleet, requests)


@given(files())
@settings(max_examples=60)
def test_a_fleet_comes_back_to_the_last_figure(file: FleetFile) -> None:
    text = "".join(written(file.fleet, file.requests))
    again = read_fleet(text.encode(), "it")
    assert again.fleet.hosts == file.fleet.hosts
    assert again.fleet.free_addresses == file.fleet.free_addresses
    assert again.requests == file.requests
    for name, array in file.fleet.cells.items():
        assert np.array_equal(again.fleet.cells[name], array), name
    assert "".join(written(again.fleet, again.requests)) == text


def golden() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(GOLDEN.read_text())
    return document


def test_the_golden_file_is_read_and_written() -> None:
    """The format is kept: files that people have stay readable. A change that adds to it adds to this file."""
    file = read_fleet(GOLDEN.read_bytes(), "golden")
    assert [host.name for host in file.fleet.hosts] == ["h1", "h2"]
    first = file.fleet.hosts[0]
    assert first.vms[0].profile.shape == Shape(8, 32768, 102400, NumaPolicy(huge_page_kib=2048), nvme=1)
    assert first.vms[0].groups == (Group("db", level=Level.RACK),)
    assert first.pools == {"san": PoolState(1_000_000, 900_000)}
    assert file.fleet.free_addresses == {1: 250}
    assert file.fleet.spare_rules == {"c1": SpareRule(Spare.WARN, Level.RACK)}
    assert [host.spare for host in file.fleet.hosts] == [SpareRule(Spare.WARN, Level.RACK)] * 2
    assert file.requests[0].profile.where == Where(rack="r1", labels=frozenset({("tier", "gold")}))
    assert "".join(written(file.fleet, file.requests, file.names)) == GOLDEN.read_text()


def test_what_is_left_out_has_its_default() -> None:
    host = golden()["hosts"][1]
    for field in ("live", "draining", "labels", "prefixes"):
        del host[field]
    document = {"schema": "ppec-fleet/1", "hosts": [host]}
    (read,) = read_fleet(json.dumps(document).encode(), "it").fleet.hosts
    assert (read.live, read.draining, read.labels, read.prefixes, read.vms) == (True, False, {}, (), ())


def test_the_schema_may_stand_at_the_end() -> None:
    document = golden()
    document["schema"] = document.pop("schema")
    assert len(read_fleet(json.dumps(document).encode(), "it").fleet.hosts) == 2


def set_at(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    """Puts a value at `hosts.0.cells.1.cores`."""

    def change(document: Any) -> None:
        *parts, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        for part in parts:
            document = document[part]
        document[last] = value

    return change


def append_to(path: str, from_index: int = 0) -> Callable[[dict[str, Any]], None]:
    """Doubles an item of a list."""

    def change(document: Any) -> None:
        for part in path.split("."):
            document = document[int(part) if part.isdigit() else part]
        document.append(document[from_index])

    return change


def together(level: str) -> Callable[[dict[str, Any]], None]:
    """Both VMs of `db`, which stands on racks of its own, are to stand together on a level."""

    def change(document: dict[str, Any]) -> None:
        document["groups"].append({"name": "pair", "apart": False, "level": level})
        document["hosts"][0]["vms"][0]["groups"] = ["db", "pair"]
        document["requests"]["batch"][0]["groups"] = ["pair", "db"]

    return change


def moved(path: str, **places: str) -> Callable[[dict[str, Any]], None]:
    changes = [set_at(f"{path}.{place}", name) for place, name in places.items()]

    def change(document: dict[str, Any]) -> None:
        for each in changes:
            each(document)

    return change


MALFORMED: list[tuple[Callable[[dict[str, Any]], None], str, str]] = [
    (set_at("hosts.0.cells.1.cores", -1), "hosts[0].cells[1].cores", "greater than or equal to 0"),
    (set_at("hosts.0.cells.1.cores", "8"), "hosts[0].cells[1].cores", "valid integer"),
    (set_at("hosts.0.cells.1.cores", 10**6), "hosts[0].cells[1].cores", "less than or equal"),
    (set_at("hosts.0.cells.1.cores_free", -1), "hosts[0].cells[1].cores_free", "-1 are free"),
    (set_at("hosts.0.cells.1.cores_free", 50), "hosts[0].cells[1].cores_free", "50 are free of 16"),
    (set_at("hosts.0.cells.0.cores_free", 10), "hosts[0].cells[0].cores_free", "overlap"),
    (set_at("hosts.0.cells.0.pages_2m_free", 16385), "hosts[0].cells[0].pages_2m_free", "overlap"),
    (set_at("hosts.0.cells.0.nvme_free", 2), "hosts[0].cells[0].nvme_free", "overlap"),
    (set_at("hosts.0.disk_mib", -5), "hosts[0].disk_mib", "greater than or equal to 0"),
    (set_at("hosts.0.disk_free_mib", 1_000_000), "hosts[0].disk_free_mib", "overlap"),
    (set_at("hosts.0.pools.san.free_mib", 1_000_001), "hosts[0].pools.san.free_mib", "are free of"),
    (set_at("hosts.0.wheels", 4), "hosts[0].wheels", "not permitted"),
    (set_at("hosts.1.name", "h1"), "hosts[1].name", "there twice, first at hosts[0].name"),
    (set_at("hosts.1.host_id", 1), "hosts[1].host_id", "there twice"),
    (set_at("hosts.0.cells.1.cell", 0), "hosts[0].cells[1].cell", "there twice"),
    (set_at("hosts.0.vms.0.cells", [3]), "hosts[0].vms[0].cells", "no cell 3"),
    (set_at("hosts.0.vms.0.cells", [0, 0]), "hosts[0].vms[0].cells", "there twice"),
    (set_at("hosts.0.vms.0.profile", "p9"), "hosts[0].vms[0].profile", "no profile 'p9'"),
    (set_at("hosts.0.vms.0.groups", ["db", "web"]), "hosts[0].vms[0].groups[1]", "no group 'web'"),
    (set_at("hosts.0.vms.0.groups", ["db", "db"]), "hosts[0].vms[0].groups[1]", "there twice"),
    (set_at("hosts.0.vms.0.vm_id", "x"), "hosts[0].vms[0].vm_id", "UUID"),
    (append_to("hosts.0.vms"), "hosts[0].vms[1]", "there twice"),
    (set_at("hosts.0.vms.0.cells", [0.0]), "hosts[0].vms[0].cells[0]", "valid integer"),
    (set_at("hosts.0.live", 1), "hosts[0].live", "valid boolean"),
    (set_at("hosts.0.architecture", "vax"), "hosts[0].architecture", "'x86_64'"),
    (set_at("hosts.0.architecture", "aarch64"), "hosts[0].vms[0].profile", "for x86_64, and host 'h1' is of aarch64"),
    (set_at("profiles.1.architecture", ""), "profiles[1].architecture", "'x86_64'"),
    (moved("hosts.1", rack="r1", cluster="c2"), "hosts[1].rack", "is in cluster 'c2', and at hosts[0] it is in 'c1'"),
    (moved("hosts.1", datacentre="d2"), "hosts[1].cluster", "cluster 'c1' is in data centre 'd2', and at hosts[0]"),
    (moved("hosts.1", region="north"), "hosts[1].datacentre", "data centre 'd1' is in region 'north'"),
    (set_at("hosts.0.cells.1.shared_cpus", 0), "hosts[0].cells[1].shared_cpus", "16 vCPUs may share them"),
    (set_at("hosts.0.prefixes", [[1], []]), "hosts[0].prefixes[1]", "at least 1 item"),
    (set_at("hosts.0.prefixes", [[1], [2], [3]]), "hosts[0].prefixes", "at most 2 items"),
    (set_at("hosts.0.prefixes", [[1, 2], [1]]), "hosts[0].prefixes", "a prefix is there twice"),
    (set_at("hosts.0.prefixes", [[1], [2, 777]]), "hosts[0].prefixes[1][1]", "there is no prefix '777'"),
    (set_at("profiles.0.networks", [None, [1, 555]]), "profiles[0].networks[1][1]", "there is no prefix '555'"),
    (set_at("profiles.1.networks", [[555]]), "profiles[1].networks[0][0]", "there is no prefix '555'"),
    (set_at("profiles.1.fixed", [[1], [555]]), "profiles[1].fixed[1][0]", "there is no prefix '555'"),
    (set_at("profiles.1.where.rack", "r9"), "requests.batch[0].profile", "for rack 'r9' alone, where there is no host"),
    (set_at("profiles.1.where.host", "h9"), "requests.batch[0].profile", "for host 'h9' alone"),
    (set_at("requests.batch.0.excluded_hosts", ["h1", "h9"]), "requests.batch[0].excluded_hosts[1]", "no host 'h9'"),
    (set_at("profiles.0.shape.vcpus", 0), "profiles[0].shape.vcpus", "greater than or equal to 1"),
    (set_at("profiles.0.shape.memory_mib", 32767), "profiles[0].shape.memory_mib", "32767 MiB"),
    (set_at("profiles.0.shape.numa", {"huge_page_kib": 3}), "profiles[0].shape.numa.huge_page_kib", "Input should"),
    (set_at("profiles.1.name", "big"), "profiles[1].name", "there twice"),
    (set_at("groups.0.level", "planet"), "groups[0].level", "host"),
    (append_to("groups"), "groups[1].name", "there twice"),
    (append_to("prefixes"), "prefixes[2].id", "there twice"),
    (append_to("clusters"), "clusters[1].name", "there twice"),
    (set_at("clusters.0.name", "c9"), "clusters[0].name", "no host is in cluster 'c9'"),
    (set_at("clusters.0.n_plus_one.mode", "off"), "clusters[0].n_plus_one.mode", "'warn' or 'required'"),
    (set_at("clusters.0.n_plus_one.level", "planet"), "clusters[0].n_plus_one.level", "'host' or 'rack'"),
    (set_at("requests.batch.0.profile", "p9"), "requests.batch[0].profile", "no profile"),
    (set_at("requests.batch.0.name", "db-1"), "requests.batch[0].name", "stands in the fleet already"),
    (append_to("requests.batch"), "requests.batch[1].name", "there twice"),
    (together("host"), "requests.batch[0]", "'db' holds it apart from the VM at hosts[0].vms[0], and group 'pair'"),
    (together("rack"), "requests.batch[0]", "holds the two together"),
]


@pytest.mark.parametrize(("change", "where", "what"), MALFORMED, ids=[where for _, where, _ in MALFORMED])
def test_what_is_wrong_is_refused_with_its_path(
    change: Callable[[dict[str, Any]], None], where: str, what: str
) -> None:
    document = golden()
    change(document)
    with pytest.raises(PpecError) as refused:
        read_fleet(json.dumps(document).encode(), "broken.json")
    assert refused.value.code == "fleet.invalid"
    assert refused.value.details["where"] == where
    assert what in refused.value.message
    assert refused.value.message.startswith(f"broken.json: {where}: ")


def test_a_file_without_a_list_of_prefixes_counts_none_and_knows_those_of_its_hosts() -> None:
    document = golden()
    del document["prefixes"]
    document["profiles"][1]["networks"] = [None, [2]]
    file = read_fleet(json.dumps(document).encode(), "it")
    assert (file.fleet.free_addresses, file.fleet.hosts[0].prefixes) == ({}, ((1,), (2,)))
    document["profiles"][1]["networks"] = [[3]]
    with pytest.raises(PpecError) as refused:
        read_fleet(json.dumps(document).encode(), "it")
    assert refused.value.details["where"] == "profiles[1].networks[0][0]"


def test_a_fleet_that_counts_no_prefixes_lists_none() -> None:
    document = golden()
    del document["prefixes"]
    file = read_fleet(json.dumps(document).encode(), "it")
    assert json.loads("".join(written(file.fleet, file.requests, file.names)))["prefixes"] == []


def test_together_in_a_data_centre_and_apart_on_racks_is_no_contradiction() -> None:
    document = golden()
    together("datacentre")(document)
    assert len(read_fleet(json.dumps(document).encode(), "it").requests) == 1


def test_a_cell_that_shrank_under_its_vms_is_read() -> None:
    """Its VMs hold more than there is, and the file says so."""
    document = golden()
    cell = document["hosts"][0]["cells"][0]
    assert (cell["cores"], cell["cores_free"]) == (16, 8)
    cell |= {"cores": 6, "cores_free": -2}
    fleet = read_fleet(json.dumps(document).encode(), "it").fleet
    assert fleet.free("cores")[0, 0] == -2


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (b'{"schema": "ppec-fleet/2", "hosts": []}', "fleet.unreadable"),
        (b'{"hosts": []}', "fleet.unreadable"),
        (b"[]", "fleet.unreadable"),
        (b'{"schema": "ppec-fleet/1"}', "fleet.invalid"),
        (b'{"schema": "ppec-fleet/1", "hosts": [', "fleet.invalid"),
        (b'{"schema": "ppec-fleet/1", "hosts": ' + b"[" * 100_000, "fleet.invalid"),
        (b'{"schema": "ppec-fleet/1", "hosts": [\xff]}', "fleet.invalid"),
    ],
)
def test_what_is_no_fleet_is_refused(text: bytes, code: str) -> None:
    with pytest.raises(PpecError) as refused:
        read_fleet(text, "it")
    assert refused.value.code == code


def test_too_many_requests_are_refused_before_they_are_made() -> None:
    document = golden()
    text = json.dumps(document["requests"]["batch"][0])
    document["requests"]["batch"] = ["HERE"]
    whole = json.dumps(document).replace('"HERE"', ",".join([text] * (MOST_REQUESTS + 1)))
    with pytest.raises(PpecError) as refused:
        read_fleet(whole.encode(), "it")
    assert refused.value.details["where"] == "requests.batch"
    assert f"at most {MOST_REQUESTS} items" in refused.value.message


# --- requests in a file of their own ---------------------------------------------------------------------------------


SMALL = {"name": "small", "shape": {"vcpus": 2, "memory_mib": 512, "disk_mib": 10}, "architecture": "x86_64"}


def read_golden_requests(**document: Any) -> tuple[VmRequest, ...]:
    return read_requests(
        json.dumps(document).encode(), "requests.json", read_fleet(GOLDEN.read_bytes(), "golden")
    ).requests


def test_requests_name_the_fleets_profiles_and_groups_and_their_own() -> None:
    batch = [{"name": "a", "profile": "big", "groups": ["db"]}, {"name": "b", "profile": "small", "groups": ["new"]}]
    first, second = read_golden_requests(
        schema="ppec-requests/1", profiles=[SMALL], groups=[{"name": "new", "hard": False}], batch=batch
    )
    assert (first.profile.shape.vcpus, first.groups[0].level) == (8, Level.RACK)
    assert (second.profile.shape.vcpus, second.groups[0].hard) == (2, False)
    assert first.vm_id != second.vm_id


@pytest.mark.parametrize(
    ("document", "where"),
    [
        ({"batch": [{"name": "db-1", "profile": "big"}]}, "batch[0].name"),
        ({"batch": [{"name": "a", "profile": "none"}]}, "batch[0].profile"),
        ({"groups": [{"name": "db", "apart": False}], "batch": []}, "groups[0]"),
        ({"batch": [{"name": "a"}]}, "batch[0].profile"),
        ({"batch": [{"name": "a", "profile": "big", "excluded_hosts": ["h9"]}]}, "batch[0].excluded_hosts[0]"),
        (
            {"profiles": [SMALL | {"where": {"vrf": "blue"}}], "batch": [{"name": "a", "profile": "small"}]},
            "batch[0].profile",
        ),
        (
            {"profiles": [SMALL | {"networks": [[2], [1, 3]]}], "batch": [{"name": "a", "profile": "small"}]},
            "profiles[0].networks[1][1]",
        ),
        ({}, "batch"),
    ],
)
def test_wrong_requests_are_refused_with_their_path(document: dict[str, Any], where: str) -> None:
    with pytest.raises(PpecError) as refused:
        read_golden_requests(**document)
    assert refused.value.code == "fleet.invalid"
    assert refused.value.details["where"] == where


def test_members_that_define_a_group_in_two_ways_are_not_written() -> None:
    vms = [
        SeatedVm(UUID(int=n), f"v{n}", Profile(Shape(2, 1, 1), "x"), (0,), (Group("g", hard=n > 1),)) for n in (1, 2)
    ]
    file = read_fleet(GOLDEN.read_bytes(), "golden")
    requests = [VmRequest(vm.vm_id, vm.name, vm.profile, groups=vm.groups) for vm in vms]
    with pytest.raises(ValueError, match="two ways"):
        next(written(file.fleet, requests))
