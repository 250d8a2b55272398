# SPDX-License-Identifier: Apache-2.0
"""Hosts, what they report, and what is made of silence."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from datetime import datetime
from typing import Any
from uuid import UUID

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import insert, select, update

from ppec_contract.host import HostReport
from ppec_orchestrator.api.services import Services
from ppec_orchestrator.store import tables

HOST = {"name": "h1", "rack": "r1", "vrf": "red", "address": "192.0.2.1"}
STARTED = 1_000_000


def cell(number: int = 0, **values: int) -> dict[str, Any]:
    figures = {"cores": 8, "cores_reserved": 1, "cores_free": 7, "threads_per_core": 2, "socket": number}
    memory = {"memory_mib": 16384, "memory_reserved_mib": 2048, "memory_free_mib": 14336}
    shared = {"cores_shared": 0, "shared_vcpus": 0, "shared_vcpus_free": 0, "huge_pages": []}
    drives = {"nvme_drives": 0, "nvme_drives_free": 0}
    return {"cell": number, **figures, **memory, **shared, **drives, **values}


def report(**values: Any) -> dict[str, Any]:
    return {
        "host": "h1",
        "boot_id": "b",
        "agent_version": "0.1.0",
        "api_version": 1,
        "capabilities": ["vm-lifecycle"],
        "architecture": "x86_64",
        "domain_type": "qemu",
        "libvirt_version": "9.0.0",
        "qemu_version": "7.2.0",
        "kernel_version": "6.1",
        "cells": [cell(0), cell(1)],
        "disk_mib": 100_000,
        "disk_free_mib": 90_000,
        "bridges": ["br0"],
        "vms": [],
        **values,
    }


def vm_info(vm_id: UUID, **values: Any) -> dict[str, Any]:
    known = {"name": "v1", "state": "running", "managed": True, "vcpus": 2, "memory_mib": 512}
    return {"vm_id": str(vm_id), **known, "pins": [{"vcpu": 0, "pcpu": 1}], **values}


@pytest.mark.parametrize("name", ["all", "ungrouped", "ppec_run"])
def test_host_can_not_have_the_name_of_an_inventory_group(ipv4_site: TestClient, name: str) -> None:
    refused = ipv4_site.post("/v1/hosts", json=HOST | {"name": name})
    assert (refused.status_code, refused.json()["code"]) == (422, "request.invalid")
    assert ipv4_site.get("/v1/hosts").json()["items"] == []


class HostAgent:
    """Speaks for a host as its agent would."""

    def __init__(self, client: TestClient, name: str = "h1") -> None:
        self.client = client
        self.name = name

    def put(self, body: dict[str, Any], sequence: int, started: int = STARTED) -> Any:
        envelope = {"agent_started_at_unix_ms": started, "sequence": sequence, "report": body}
        return self.client.put(f"/v1/hosts/{self.name}/report", json=envelope)

    def beat(self, body: dict[str, Any], sequence: int, started: int = STARTED) -> Any:
        digest = HostReport.model_validate(body).digest()
        message = {"agent_started_at_unix_ms": started, "sequence": sequence, "digest": digest}
        return self.client.post(f"/v1/hosts/{self.name}/heartbeat", json=message)


@pytest.fixture
def site(ipv4_site: TestClient, services: Services) -> TestClient:
    """The site with the enrolled host `h1`."""
    assert ipv4_site.post("/v1/hosts", json=HOST).status_code == 201
    with services.database.write() as conn:
        conn.execute(update(tables.host).values(enrolled_at=services.now()))
    return ipv4_site


@pytest.fixture
def agent(site: TestClient, host_client: Callable[[str], TestClient]) -> HostAgent:
    return HostAgent(host_client("h1"))


@pytest.fixture
def vm_on_h1(site: TestClient, services: Services) -> UUID:
    """A VM allocated on h1: 1 core and 512 MiB of cell 0."""
    vm_id, now = uuid.uuid4(), services.now()
    image = {"name": "i", "format": "raw", "architecture": "x86_64", "sha256": "0" * 64}
    row = {"id": vm_id, "name": "v1", "record": "active", "flavor": "f", "vcpus": 2, "memory_mib": 512, "disk_mib": 9}
    with services.database.write() as conn:
        conn.execute(insert(tables.image).values(id=1, size_bytes=512, virtual_size_mib=1, **image))
        conn.execute(insert(tables.vm).values(image_id=1, labels={}, created_at=now, operation_id="o", **row))
        conn.execute(insert(tables.allocation).values(vm_id=vm_id, host_id=1, disk_mib=9))
    return vm_id


def _observed(services: Services, vm_id: UUID) -> tuple[str, bool, Any]:
    with services.database.read() as conn:
        row = conn.execute(select(tables.vm).where(tables.vm.c.id == vm_id)).one()
    return row.observed, row.observed_at is not None, row.pins


def test_a_host_is_registered(ipv4_site: TestClient) -> None:
    created = ipv4_site.post("/v1/hosts", json=HOST)
    assert created.status_code == 201
    view = created.json()
    assert (view["cluster"], view["datacentre"], view["liveness"], view["port"]) == ("c1", "dc1", "registered", 7443)
    assert ipv4_site.get("/v1/hosts?rack=r1").json()["items"] == [view]
    assert ipv4_site.get("/v1/hosts?rack=r2").json()["items"] == []
    assert ipv4_site.post("/v1/hosts", json=HOST).json()["code"] == "host.exists"
    assert ipv4_site.patch("/v1/hosts/h1", json={"draining": True}).json()["draining"] is True
    assert ipv4_site.patch("/v1/hosts/h9", json={"draining": True}).json()["code"] == "host.not_found"
    assert ipv4_site.delete("/v1/hosts/h1").status_code == 204
    assert ipv4_site.get("/v1/hosts/h1").json()["code"] == "host.not_found"


@pytest.mark.parametrize("address", ["-x", "a..b", "a" * 64, ":", "192.0.2.999:"])
def test_an_address_that_can_not_be_certified_is_refused(ipv4_site: TestClient, address: str) -> None:
    refused = ipv4_site.post("/v1/hosts", json=HOST | {"address": address})
    assert (refused.status_code, refused.json()["code"]) == (422, "request.invalid")


def test_a_report_fills_the_host_in(site: TestClient, agent: HostAgent) -> None:
    answer = agent.put(report(), 1)
    assert (answer.status_code, answer.json()["send_report"]) == (200, False)
    view = site.get("/v1/hosts/h1").json()
    assert (view["liveness"], view["architecture"], view["bridges"]) == ("up", "x86_64", ["br0"])
    assert (view["disk_mib"], view["disk_free_mib"]) == (100_000, 100_000)
    assert view["cells"] == [cell(0), cell(1)]


def test_what_is_used_stays_when_a_report_comes(site: TestClient, agent: HostAgent, services: Services) -> None:
    agent.put(report(), 1)
    with services.database.write() as conn:
        conn.execute(update(tables.host_cell).values(cores_used=3, memory_used_mib=4096))
    agent.put(report(cells=[cell(0, cores=10)]), 2)
    cells = site.get("/v1/hosts/h1").json()["cells"]
    figures = [(c["cores"], c["cores_free"], c["memory_free_mib"]) for c in cells]
    assert figures == [(10, 6, 10240), (0, 0, 0)]


def test_a_cell_that_is_gone_and_empty_goes(site: TestClient, agent: HostAgent) -> None:
    agent.put(report(), 1)
    agent.put(report(cells=[cell(0)]), 2)
    assert [c["cell"] for c in site.get("/v1/hosts/h1").json()["cells"]] == [0]


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        ({"cells": [cell(0, cores=4), cell(1)]}, True),
        ({"cells": [cell(0)]}, True),
        ({"disk_mib": 90_000}, True),
        ({"pools": [{"name": "san", "size_mib": 500, "free_mib": 500}]}, True),
        ({"agent_version": "9.9"}, False),
    ],
)
def test_other_room_than_before_is_another_generation(
    agent: HostAgent, services: Services, change: dict[str, Any], counts: bool
) -> None:
    """Plans that count on the host for a loss (N+1) rely on it."""

    def generation() -> int:
        with services.database.read() as conn:
            return int(conn.execute(select(tables.host.c.generation)).scalar_one())

    agent.put(report(), 1)
    before = generation()
    assert agent.put(report(**change), 2).status_code == 200
    assert generation() - before == counts


def test_what_is_gone_and_still_held_is_told_once(agent: HostAgent, services: Services) -> None:
    """Every later report has not got it either."""
    agent.put(report(pools=[{"name": "san", "size_mib": 500, "free_mib": 500}]), 1)
    with services.database.write() as conn:
        conn.execute(update(tables.host_cell).where(tables.host_cell.c.cell == 1).values(cores_used=1))
        conn.execute(update(tables.host_pool).values(used_mib=1))
    found = []
    for number in range(2, 5):
        assert agent.put(report(cells=[cell(0)], agent_version=f"9.{number}"), number).status_code == 200
        with services.database.read() as conn:
            found.append(conn.execute(select(tables.host.c.generation)).scalar_one())
    assert len(set(found)) == 1


def test_an_unchanged_host_writes_no_row(agent: HostAgent, services: Services) -> None:
    agent.put(report(), 1)
    before = services.database.commits
    for sequence in range(2, 12):
        assert agent.beat(report(), sequence).json()["send_report"] is False
    assert agent.put(report(), 12).status_code == 200
    assert services.database.commits == before
    assert services.liveness.flush() == 1
    assert services.liveness.flush() == 0
    assert services.database.commits == before + 1


def test_a_heartbeat_with_another_digest_asks_for_the_report(agent: HostAgent) -> None:
    assert agent.beat(report(), 1).json()["send_report"] is True
    agent.put(report(), 2)
    assert agent.beat(report(), 3).json()["send_report"] is False
    assert agent.beat(report(disk_mib=1), 4).json()["send_report"] is True


def test_a_restarted_orchestrator_still_knows_the_report(
    agent: HostAgent, services: Services, host_client: Callable[[str], TestClient]
) -> None:
    agent.put(report(), 1)
    services.liveness.forget("h1")
    assert agent.beat(report(), 2).json()["send_report"] is False


def test_an_older_message_never_overwrites_a_newer_one(site: TestClient, agent: HostAgent) -> None:
    agent.put(report(disk_mib=1), 1)
    agent.put(report(disk_mib=2), 3)
    agent.put(report(disk_mib=3), 2)
    agent.put(report(disk_mib=4), 9, started=STARTED - 1)
    assert site.get("/v1/hosts/h1").json()["disk_mib"] == 2
    agent.put(report(disk_mib=5), 1, started=STARTED + 1)
    assert site.get("/v1/hosts/h1").json()["disk_mib"] == 5


def test_a_delayed_report_loses_against_a_later_unchanged_one(site: TestClient, agent: HostAgent) -> None:
    agent.put(report(disk_mib=1), 1)
    agent.beat(report(disk_mib=1), 3)
    agent.put(report(disk_mib=2), 2)
    assert site.get("/v1/hosts/h1").json()["disk_mib"] == 1


def test_a_host_whose_clock_was_set_back_is_believed_again_after_a_silence(
    site: TestClient, agent: HostAgent, clock: Callable[[], datetime]
) -> None:
    agent.put(report(disk_mib=1), 7)
    clock.forward(31)  # type: ignore[attr-defined]
    agent.put(report(disk_mib=2), 1, started=STARTED - 500_000)
    assert site.get("/v1/hosts/h1").json()["disk_mib"] == 2
    agent.put(report(disk_mib=3), 2, started=STARTED - 500_000)
    assert site.get("/v1/hosts/h1").json()["disk_mib"] == 3


def test_silence_is_unknown_and_never_stopped(
    site: TestClient, agent: HostAgent, clock: Callable[[], datetime]
) -> None:
    assert site.get("/v1/hosts/h1").json()["liveness"] == "enrolled"
    agent.put(report(), 1)
    clock.forward(30)  # type: ignore[attr-defined]
    assert site.get("/v1/hosts/h1").json()["liveness"] == "up"
    clock.forward(1)  # type: ignore[attr-defined]
    assert site.get("/v1/hosts/h1").json()["liveness"] == "unknown"
    agent.beat(report(), 2)
    assert site.get("/v1/hosts/h1").json()["liveness"] == "up"


def test_what_a_host_observes_of_its_vms(agent: HostAgent, services: Services, vm_on_h1: UUID) -> None:
    pins = [{"vcpu": 0, "pcpu": 1}]
    agent.put(report(vms=[vm_info(vm_on_h1)]), 1)
    assert _observed(services, vm_on_h1) == ("running", True, pins)
    agent.put(report(vms=[vm_info(vm_on_h1, state="stopped", pins=[])]), 2)
    assert _observed(services, vm_on_h1) == ("stopped", True, [])
    agent.put(report(vms=[]), 3)
    assert _observed(services, vm_on_h1) == ("unknown", False, None)


def test_a_host_is_shown_with_its_pools_and_drives(site: TestClient, agent: HostAgent, services: Services) -> None:
    """What is free of them is by the record, whatever the report says."""
    pools = [{"name": "ssd", "size_mib": 500, "free_mib": 1}, {"name": "nfs", "size_mib": 900, "free_mib": 900}]
    agent.put(report(cells=[cell(0, nvme_drives=4, nvme_drives_free=1), cell(1)], pools=pools), 1)
    with services.database.write() as conn:
        conn.execute(update(tables.host_pool).where(tables.host_pool.c.name == "ssd").values(used_mib=120))
        conn.execute(update(tables.host_cell).where(tables.host_cell.c.cell == 0).values(nvme_used=1))
    view = site.get("/v1/hosts/h1").json()
    assert view["pools"] == [
        {"name": "nfs", "size_mib": 900, "free_mib": 900}, {"name": "ssd", "size_mib": 500, "free_mib": 380},
    ]  # fmt: skip
    assert [(each["nvme_drives"], each["nvme_drives_free"]) for each in view["cells"]] == [(4, 3), (0, 0)]
    (listed,) = site.get("/v1/hosts").json()["items"]
    assert (listed["pools"], listed["cells"]) == ([], view["cells"])


def test_a_pool_that_is_gone_stays_without_a_size_while_disks_are_in_it(
    site: TestClient, agent: HostAgent, services: Services
) -> None:
    def told(sequence: int, **sizes_mib: int) -> dict[str, tuple[int, int]]:
        pools = [{"name": name, "size_mib": mib, "free_mib": mib} for name, mib in sizes_mib.items()]
        assert agent.put(report(pools=pools), sequence).status_code == 200
        with services.database.read() as conn:
            rows = conn.execute(select(tables.host_pool)).all()
        return {row.name: (row.size_mib, row.used_mib) for row in rows}

    assert told(1, ssd=500, nfs=900) == {"ssd": (500, 0), "nfs": (900, 0)}
    with services.database.write() as conn:
        conn.execute(update(tables.host_pool).where(tables.host_pool.c.name == "ssd").values(used_mib=120))
    assert told(2, nfs=800) == {"ssd": (0, 120), "nfs": (800, 0)}
    assert told(3, ssd=100) == {"ssd": (100, 120)}, "and what holds nothing goes"
    assert site.get("/v1/hosts/h1").json()["pools"] == [{"name": "ssd", "size_mib": 100, "free_mib": 0}]
    with services.database.write() as conn:
        conn.execute(update(tables.host_pool).values(used_mib=0))
    assert told(4) == {}


def test_a_vm_is_shown_with_the_drives_that_its_host_says_it_has(
    site: TestClient, agent: HostAgent, services: Services, vm_on_h1: UUID
) -> None:
    with services.database.write() as conn:
        conn.execute(update(tables.vm).values(pool="ssd", nvme_drives=2))
    told = site.get("/v1/vms/v1").json()
    assert (told["pool"], told["nvme_drives"], told["drives"]) == ("ssd", 2, [])
    drives = ["0000:01:00.0", "0000:02:00.0"]
    others = vm_info(uuid.uuid4(), name="v2", nvme_drives=["0000:03:00.0"])
    agent.put(report(vms=[others, vm_info(vm_on_h1, pool="ssd", nvme_drives=drives)]), 1)
    assert site.get("/v1/vms/v1").json()["drives"] == drives
    (listed,) = site.get("/v1/vms").json()["items"]
    assert (listed["pool"], listed["nvme_drives"], listed["drives"]) == ("ssd", 2, [])
    assert [vm["name"] for vm in site.get("/v1/vms?pool=ssd").json()["items"]] == ["v1"]
    assert site.get("/v1/vms?pool=nfs").json()["items"] == []


def test_a_host_says_nothing_of_anothers_vms(
    site: TestClient, services: Services, vm_on_h1: UUID, host_client: Callable[[str], TestClient]
) -> None:
    assert site.post("/v1/hosts", json=HOST | {"name": "h2"}).status_code == 201
    HostAgent(host_client("h2"), "h2").put(report(host="h2", vms=[vm_info(vm_on_h1, state="crashed")]), 1)
    assert _observed(services, vm_on_h1) == ("unknown", False, None)


def test_a_host_that_holds_vms_stays(site: TestClient, vm_on_h1: UUID) -> None:
    assert site.get("/v1/hosts/h1").json()["vm_count"] == 1
    refused = site.delete("/v1/hosts/h1")
    assert (refused.status_code, refused.json()["code"]) == (409, "host.in_use")


@pytest.mark.parametrize(
    ("who", "path", "status", "code"),
    [
        ("h2", "h1", 403, "auth.wrong_identity"),
        ("ppec://operator/h1", "h1", 403, "auth.wrong_identity"),
        ("ppec://orchestrator/main", "h1", 403, "auth.wrong_identity"),
        ("ppec://host/h1/x", "h1", 403, "auth.wrong_identity"),
        ("h9", "h9", 404, "host.not_found"),
    ],
)
def test_only_the_host_itself_reports(
    site: TestClient, host_client: Callable[[str], TestClient], who: str, path: str, status: int, code: str
) -> None:
    for answer in (
        HostAgent(host_client(who), path).put(report(host=path), 1),
        HostAgent(host_client(who), path).beat(report(host=path), 2),
    ):
        assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert site.get("/v1/hosts/h1").json()["last_seen_at"] is None


def test_a_report_of_another_host_is_refused(site: TestClient, agent: HostAgent) -> None:
    assert agent.put(report(host="h2"), 1).json()["code"] == "auth.wrong_identity"
    assert site.get("/v1/hosts/h1").json()["liveness"] == "enrolled"


def test_an_admins_token_does_not_report(site: TestClient) -> None:
    assert HostAgent(site).put(report(), 1).json()["code"] == "auth.required"


@pytest.mark.parametrize(
    "change",
    [
        {"cells": [cell(0, cores=-1)]},
        {"disk_mib": "x"},
        {"extra": 1},
        {"architecture": "vax"},
        {"vms": [{}]},
        # As large as the bounds of text and counts would else let a host make its record, and what no column holds.
        {"drift": [{"kind": "pins", "after": "x" * 5000}]},
        {"drift": [{"kind": "pins", "after": "a\x00b"}]},
        {"drift": [{"kind": "pins"}] * 2000},
        {"bridges": ["x" * 1000]},
        {"cells": [cell(0, cores=2**40)]},
        {"cells": [cell(2**40)]},
        {"disk_mib": 2**62},
    ],
    ids=lambda change: f"{next(iter(change))}-{str(change)[:40]}",
)
def test_a_bad_report_changes_nothing(site: TestClient, agent: HostAgent, change: dict[str, Any]) -> None:
    agent.put(report(), 1)
    before = site.get("/v1/hosts/h1").json()
    refused = agent.put(report(**change), 2)
    assert (refused.status_code, refused.json()["code"]) == (422, "request.invalid")
    assert site.get("/v1/hosts/h1").json() == before
