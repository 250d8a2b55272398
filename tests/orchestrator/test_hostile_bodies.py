# SPDX-License-Identifier: Apache-2.0
"""Bodies, queries and reports mutated at random (from a fixed seed): never a fault of ours, never a trace left."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

HOSTILE: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    3,
    2**31,
    2**53 + 1,
    2**63 - 1,
    1.5,
    1e308,
    "",
    "\x00",
    "a\x00b",
    "\n",
    "{{ lookup('pipe', 'id') }}",
    "$(reboot)",
    "../../etc/passwd",
    "<vm name='x'/>",
    "'; DROP TABLE host; --",
    "&lol;",
    "é" * 40,
    "\ufffe",
    "a" * 5000,
    "0.0.0.0/0",
    "::/0",
    "fe80::1%lo",
    "10.0.0.0/27",
    [],
    [None],
    [[[[[]]]]],
    {},
    {"a": {"b": {"c": 1}}},
)
CELL = {"cell": 0, "socket": 0, "threads_per_core": 1, "cores": 4, "cores_reserved": 0, "cores_free": 4}
MEMORY = {"memory_mib": 4096, "memory_reserved_mib": 0, "memory_free_mib": 4096}
VM = {"vm_id": "8f14e45f-ceea-467f-9c3f-0c5f1e4b2a3d", "name": "v", "state": "running", "managed": True}
REPORT = {
    "host": "h1",
    "boot_id": "b",
    "agent_version": "1",
    "api_version": 1,
    "capabilities": ["vm-lifecycle"],
    "architecture": "x86_64",
    "domain_type": "kvm",
    "libvirt_version": "9",
    "qemu_version": "7",
    "kernel_version": "6",
    "cells": [{**CELL, **MEMORY}],
    "disk_mib": 1,
    "disk_free_mib": 1,
    "bridges": ["br0"],
    "vms": [{**VM, "vcpus": 2, "memory_mib": 64, "pins": [{"vcpu": 0, "pcpu": 0}]}],
}
BODIES: dict[str, dict[str, Any]] = {
    "datacentres": {"name": "d", "region": "r"},
    "clusters": {"name": "c", "datacentre": "dc1", "architecture": "x86_64"},
    "racks": {"name": "r", "cluster": "c1"},
    "flavors": {"name": "f", "vcpus": 2, "memory_mib": 64, "disk_mib": 1},
    "vrfs": {"name": "v", "description": "d"},
    "prefixes": {
        "vrf": "red",
        "cidr": "10.7.0.0/29",
        "gateway": "10.7.0.1",
        "vlan": 5,
        "bridge": "br0",
        "cluster": "c1",
        "rack": "r1",
        "first": "10.7.0.2",
        "last": "10.7.0.5",
        "nameservers": ["10.7.0.1"],
    },
    "hosts": {"name": "h", "rack": "r1", "vrf": "red", "address": "192.0.2.9", "port": 7443},
    "enrol": {"host": "h1", "token": "x" * 43, "csr_pem": "x"},
}


def _paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from _paths(child, (*at, key))


def _mutated(rng: random.Random, body: dict[str, Any]) -> dict[str, Any]:
    """A copy with a place changed, removed, doubled into a strange name, or several of these."""
    copy: dict[str, Any] = json.loads(json.dumps(body))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        place = rng.choice([path for path in _paths(copy) if path] or [("x",)])
        *way, last = place
        holder: Any = copy
        for key in way:
            holder = holder[key]
        if rng.random() < 0.15 and isinstance(holder, dict):
            holder.pop(last, None)
        elif rng.random() < 0.1 and isinstance(holder, dict):
            holder[str(rng.choice(HOSTILE))[:50]] = rng.choice(HOSTILE)
        else:
            holder[last] = rng.choice(HOSTILE)
    return copy


def _check(answer: Any, sent: object) -> None:
    assert answer.status_code < 500, (sent, answer.text)
    assert "Traceback" not in answer.text
    if answer.status_code >= 400:
        assert answer.headers["content-type"] == "application/problem+json", sent
        assert set(answer.json()) >= {"type", "title", "status", "code", "detail"}


@pytest.mark.parametrize("path", BODIES)
def test_hostile_bodies_are_refused_or_taken_verbatim(ipv4_site: TestClient, path: str) -> None:
    rng = random.Random(path)
    for _ in range(120):
        body = _mutated(rng, BODIES[path])
        answer = ipv4_site.post(f"/v1/{path}", json=body)
        _check(answer, body)
        if answer.status_code == 201:
            view = answer.json()
            # A range is answered as it applies: without the network and broadcast address.
            told = {name: value for name, value in body.items() if value is not None and name not in ("first", "last")}
            assert {name: view[name] for name in told} == told
            key = view["prefix_id"] if path == "prefixes" else view["name"]
            assert ipv4_site.delete(f"/v1/{path}/{key}").status_code == 204


def test_hostile_reports_change_nothing_unless_they_are_taken(
    ipv4_site: TestClient, host_client: Callable[[str], TestClient]
) -> None:
    host = {"name": "h1", "rack": "r1", "vrf": "red", "address": "192.0.2.1"}
    assert ipv4_site.post("/v1/hosts", json=host).status_code == 201
    rng, agent = random.Random(1), host_client("h1")
    for sequence in range(1, 400):
        before = ipv4_site.get("/v1/hosts/h1").json()
        envelope = {"agent_started_at_unix_ms": 1, "sequence": sequence, "report": _mutated(rng, REPORT)}
        if rng.random() < 0.1:
            envelope = _mutated(rng, envelope)
        answer = agent.put("/v1/hosts/h1/report", json=envelope)
        _check(answer, envelope)
        if answer.status_code != 200:
            assert ipv4_site.get("/v1/hosts/h1").json() == before


@pytest.mark.parametrize("path", ["vrfs", "hosts", "prefixes", "addresses", "images"])
def test_hostile_queries_and_paths(ipv4_site: TestClient, path: str) -> None:
    for value in HOSTILE:
        for name in ("limit", "cursor", "vrf", "vm", "prefix_id", "free", "rack"):
            _check(ipv4_site.get(f"/v1/{path}", params={name: str(value)[:300]}), (path, name, value))
        _check(ipv4_site.get(f"/v1/{path}/{str(value)[:200]}".replace("\x00", "%00").replace("\n", "%0A")), value)
