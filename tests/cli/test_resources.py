# SPDX-License-Identifier: Apache-2.0
"""The catalogue, hosts, addresses, images and operations."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

HOST = {
    "name": "h1",
    "rack": "r1",
    "cluster": "c1",
    "datacentre": "d1",
    "vrf": "blue",
    "address": "10.0.0.1",
    "port": 7443,
    "liveness": "up",
    "draining": False,
}
PREFIX = {
    "prefix_id": 7,
    "vrf": "blue",
    "cidr": "10.1.0.0/24",
    "bridge": "br0",
    "cluster": "c1",
    "addresses_total": 253,
    "addresses_free": 250,
}
ORDINARY = {
    "nvme_drives": 0,
    "max_vcpus": None,
    "max_memory_mib": None,
    "numa": {"cpus": "dedicated", "smt": "prefer", "multi_cell": False, "huge_page_kib": 0},
}
DEFAULTS = {"flavor": ORDINARY, "cluster": {"n_plus_one": {"mode": "off", "level": "host"}}}
IMAGE = {
    "name": "tiny",
    "format": "qcow2",
    "architecture": "x86_64",
    "sha256": "ab" * 32,
    "size_bytes": 5 << 20,
    "virtual_size_mib": 64,
}


@pytest.mark.parametrize(
    ("line", "path", "body"),
    [
        (
            "flavor create small --vcpus 2 --memory-mib 512 --disk-mib 1024",
            "/v1/flavors",
            {"name": "small", "vcpus": 2, "memory_mib": 512, "disk_mib": 1024},
        ),
        ("datacentre create d1 --region eu", "/v1/datacentres", {"name": "d1", "region": "eu"}),
        (
            "cluster create c1 --datacentre d1",
            "/v1/clusters",
            {"name": "c1", "datacentre": "d1", "architecture": "x86_64"},
        ),
        (
            "cluster create c2 --datacentre d1 --n-plus-one required:rack",
            "/v1/clusters",
            {
                "name": "c2",
                "datacentre": "d1",
                "architecture": "x86_64",
                "n_plus_one": {"mode": "required", "level": "rack"},
            },
        ),
        ("rack create r1 --cluster c1", "/v1/racks", {"name": "r1", "cluster": "c1"}),
        ("ipdb vrf create blue --description x", "/v1/vrfs", {"name": "blue", "description": "x"}),
    ],
)
def test_create_show_list_delete(orchestrator: Any, ppec: Any, line: str, path: str, body: dict[str, Any]) -> None:
    *command, _, name = line.partition(" --")[0].split()
    made = ppec(*line.split(), "-o", "json")
    view = DEFAULTS.get(command[0], {}) | body
    assert (made.code, made.json) == (0, view)
    assert (orchestrator.requests[-1].path, orchestrator.requests[-1].json) == (path, body)
    assert ppec(*command, "list", "-o", "json").json == [view]
    assert name in ppec(*command, "list").out
    assert name in ppec(*command, "show", name).out
    deleted = ppec(*command, "delete", name)
    assert (deleted.code, deleted.out) == (0, "")
    assert ppec(*command, "show", name).code == 4


def test_the_rule_of_a_cluster_is_changed_and_shown_where_there_is_one(orchestrator: Any, ppec: Any) -> None:
    ppec("cluster", "create", "c1", "--datacentre", "d1")
    assert "n plus one" not in ppec("cluster", "show", "c1").out
    assert "N+1" not in ppec("cluster", "list").out
    changed = ppec("cluster", "update", "c1", "--n-plus-one", "warn:rack")
    assert changed.code == 0
    sent = orchestrator.requests[-1]
    assert (sent.method, sent.path) == ("PATCH", "/v1/clusters/c1")
    assert sent.json == {"n_plus_one": {"mode": "warn", "level": "rack"}}
    for shown in (changed.out, ppec("cluster", "show", "c1").out):
        assert "warn:rack" in shown
    assert ["c1", "d1", "x86_64", "warn:rack"] in [line.split() for line in ppec("cluster", "list").out.splitlines()]
    assert ppec("cluster", "update", "c1", "--n-plus-one", "off").code == 0
    assert "N+1" not in ppec("cluster", "list").out


@pytest.mark.parametrize("rule", ["maybe", "warn:planet"])
def test_what_is_no_rule_is_not_sent(orchestrator: Any, ppec: Any, rule: str) -> None:
    ran = ppec("cluster", "update", "c1", "--n-plus-one", rule)
    assert (ran.code, orchestrator.requests) == (2, [])
    assert "n_plus_one" in ran.err


@pytest.mark.parametrize(
    ("options", "sent", "shown"),
    [
        ("--smt isolate --multi-cell", {"numa": {"smt": "isolate", "multi_cell": True}}, "isolate, multi-cell"),
        ("--smt require", {"numa": {"smt": "require"}}, "require"),
        (
            "--cpus shared --huge-pages 2M --max-memory 1024",
            {"numa": {"cpus": "shared", "huge_page_kib": 2048}, "max_memory_mib": 1024},
            "512..1024 1 shared, huge pages 2M",
        ),
        ("--max-vcpus 8", {"max_vcpus": 8}, "2..8"),
        ("--nvme-drives 2", {"nvme_drives": 2}, "f 2 512 1 2"),
    ],
)
def test_a_flavor_says_how_its_vms_sit_where_it_is_not_the_ordinary_way(
    orchestrator: Any, ppec: Any, options: str, sent: dict[str, Any], shown: str
) -> None:
    size = {"name": "f", "vcpus": 2, "memory_mib": 512, "disk_mib": 1}
    made = ppec("flavor", "create", "f", "--vcpus", "2", "--memory-mib", "512", "--disk-mib", "1", *options.split())
    assert (made.code, made.err) == (0, "")
    assert orchestrator.requests[-1].json == size | sent
    assert shown in " ".join(ppec("flavor", "list").out.split())
    told = ppec("flavor", "show", "f").out
    assert ("numa" in told, "max vcpus" in told) == ("numa" in sent, "max_vcpus" in sent)
    assert ("nvme drives" in told) is ("nvme_drives" in sent)


def test_an_ordinary_flavor_has_no_word_of_policies(orchestrator: Any, ppec: Any) -> None:
    ppec("flavor", "create", "f", "--vcpus", "2", "--memory-mib", "512", "--disk-mib", "1")
    assert "policy" not in ppec("flavor", "list").out
    assert "numa" not in ppec("flavor", "show", "f").out


def test_a_policy_that_contradicts_itself_is_not_sent(orchestrator: Any, ppec: Any) -> None:
    size = ("--vcpus", "2", "--memory-mib", "512", "--disk-mib", "1")
    ran = ppec("flavor", "create", "f", *size, "--cpus", "shared", "--multi-cell")
    assert (ran.code, orchestrator.requests) == (2, [])
    assert "no cores of its own" in ran.err


def test_odd_vcpus_are_refused_with_advice(orchestrator: Any, ppec: Any) -> None:
    ran = ppec("flavor", "create", "f", "--vcpus", "3", "--memory-mib", "512", "--disk-mib", "1")
    assert ran.code == 2
    assert "ask for 2 or 4" in ran.err
    assert "[vm.odd_vcpus]" in ran.err
    assert orchestrator.requests == []


def test_prefixes(orchestrator: Any, ppec: Any) -> None:
    orchestrator.instead["POST", "/v1/prefixes"] = [lambda handler: handler.reply(201, PREFIX)]
    options = "--vrf blue --bridge br0 --cluster c1 --gateway 10.1.0.1 --nameserver 10.1.0.2 --nameserver 10.1.0.3"
    assert ppec("ipdb", "prefix", "create", "10.1.0.0/24", *options.split()).code == 0
    assert orchestrator.requests[-1].json == {
        "vrf": "blue",
        "cidr": "10.1.0.0/24",
        "gateway": "10.1.0.1",
        "bridge": "br0",
        "cluster": "c1",
        "nameservers": ["10.1.0.2", "10.1.0.3"],
    }
    orchestrator.resources["prefixes"] = [PREFIX]
    assert "250/253" in ppec("ipdb", "prefix", "list").out
    assert ppec("ipdb", "prefix", "delete", "7").code == 0
    assert ppec("ipdb", "prefix", "create", "10.1.0.1/24", *options.split()).code == 2


def test_addresses_are_asked_for_by_vrf_and_prefix(orchestrator: Any, ppec: Any) -> None:
    orchestrator.resources["addresses"] = [{"address": "10.1.0.9", "prefix": "10.1.0.0/24", "vrf": "blue", "vm": "a"}]
    assert "10.1.0.9" in ppec("ipdb", "address", "list", "--vrf", "blue", "--prefix", "7").out
    assert orchestrator.requests[-1].query == {"vrf": "blue", "prefix_id": "7", "limit": "500"}


def test_hosts(orchestrator: Any, ppec: Any) -> None:
    orchestrator.instead["POST", "/v1/hosts"] = [lambda handler: handler.reply(201, HOST)]
    assert ppec("host", "add", "h1", "--rack", "r1", "--vrf", "blue", "--address", "10.0.0.1").code == 0
    assert orchestrator.requests[-1].json == {"name": "h1", "rack": "r1", "vrf": "blue", "address": "10.0.0.1"}
    cell = {"cell": 0, "socket": 0, "threads_per_core": 2, "cores": 8, "cores_reserved": 2, "cores_free": 5}
    memory = {"memory_mib": 4096, "memory_reserved_mib": 512, "memory_free_mib": 3000}
    orchestrator.resources["hosts"] = [HOST | {"cells": [cell | memory, cell | memory | {"cell": 1}]}]
    assert "10/16" in ppec("host", "list").out
    assert "drives" not in ppec("host", "list").out
    drives, pool = {"nvme_drives": 2, "nvme_drives_free": 1}, {"name": "ssd", "size_mib": 500, "free_mib": 380}
    orchestrator.resources["hosts"] = [
        HOST | {"cells": [cell | memory | drives, cell | memory | {"cell": 1}], "pools": [pool]}
    ]
    assert "1/2" in ppec("host", "list").out
    assert "ssd: 380 of 500 MiB free" in ppec("host", "show", "h1").out
    assert ppec("host", "drain", "h1", "-o", "json").json["draining"] is True
    assert "up, draining" in ppec("host", "list").out
    assert ppec("host", "undrain", "h1", "-o", "json").json["draining"] is False
    assert ppec("host", "enrolment-token", "h1", "-o", "json").json["token"] == "t" * 20
    assert ppec("host", "delete", "h1").code == 0


@pytest.mark.parametrize(("content", "found"), [(b"QFI\xfb" + b"x" * 3_000_000, "qcow2"), (b"", "raw")])
def test_an_image_is_sent_whole_with_its_checksum(
    orchestrator: Any, ppec: Any, tmp_path: Path, content: bytes, found: str
) -> None:
    file = tmp_path / "disk"
    file.write_bytes(content)
    orchestrator.instead["PUT", "/v1/images/tiny"] = [lambda handler: handler.reply(201, IMAGE)]
    assert ppec("image", "import", "tiny", str(file)).code == 0
    sent = orchestrator.requests[-1]
    assert sent.body == content
    assert sent.query == {
        "format": found,
        "architecture": "x86_64",
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def test_a_file_that_is_not_there_is_no_image(orchestrator: Any, ppec: Any, tmp_path: Path) -> None:
    assert ppec("image", "import", "tiny", str(tmp_path / "none")).code == 2
    assert orchestrator.requests == []


def test_operations(orchestrator: Any, ppec: Any, make: Any) -> None:
    orchestrator.current = make.operation("succeeded", make.item(0, "web-1", "succeeded", stage_ms={"disk": 40}))
    assert "1/1" in ppec("operation", "list").out
    shown = ppec("operation", "show", "op-1").out
    assert "web-1" in shown
    assert "reserve" in shown
    assert "disk 40" in shown
    assert ppec("operation", "cancel", "op-1", "-o", "json").json["cancel_requested"] is True
    assert ppec("operation", "watch", "op-2").code == 4
