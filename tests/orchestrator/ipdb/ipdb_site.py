# SPDX-License-Identifier: Apache-2.0
"""What the IPDB's tests share: VMs' rows, grants and releases at a time of the test's choice, and the counts."""

from __future__ import annotations

import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address, ip_network
from typing import Any
from uuid import UUID

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import insert, select

from ppec_contract.api_ipdb import NetworkWanted
from ppec_contract.errors import PpecError
from ppec_orchestrator.api.app import create_app
from ppec_orchestrator.api.services import Services
from ppec_orchestrator.settings import Settings
from ppec_orchestrator.store import ipdb, tables
from ppec_orchestrator.store.database import Database

# When the API's clock of the tests starts.
NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
IPV6 = {"vrf": "red", "cidr": "fd00::/64", "bridge": "br0", "cluster": "c1", "first": "fd00::1", "last": "fd00::8"}
COUNTS = ("total", "free", "used", "reserved", "quarantined", "excluded")


def post(client: TestClient, path: str, body: dict[str, Any]) -> Any:
    response = client.post(f"/v1/{path}", json=body)
    assert response.status_code == 201, response.text
    return response.json()


def with_large_bodies(client: TestClient, services: Services) -> TestClient:
    """The same API, which takes bodies as large as it does unless it is set otherwise."""
    settings = services.settings.model_copy(update={"max_body_bytes": Settings.model_fields["max_body_bytes"].default})
    return TestClient(create_app(replace(services, settings=settings)), headers=client.headers)


def make_vm(database: Database, name: str) -> UUID:
    """Its row, as the accepting transaction writes it."""
    vm_id = uuid.uuid4()
    image = {
        "id": 1, "name": "i", "format": "raw", "architecture": "x86_64", "sha256": "0" * 64, "size_bytes": 1,
        "virtual_size_mib": 1,
    }  # fmt: skip
    with database.write() as conn:
        if conn.execute(select(tables.image.c.id)).first() is None:
            conn.execute(insert(tables.image).values(image))
        conn.execute(
            insert(tables.vm).values(
                id=vm_id, name=name, record="creating", flavor="f", image_id=1, vcpus=2, memory_mib=1, disk_mib=1,
                labels={}, created_at=NOW, operation_id=f"op-{name}",
            )
        )  # fmt: skip
    return vm_id


def counts(client: TestClient, prefix_id: int = 1) -> dict[str, int]:
    view = client.get(f"/v1/prefixes/{prefix_id}").json()
    found = {name: view[f"addresses_{name}"] for name in COUNTS}
    assert found["total"] == sum(found[name] for name in ("free", "used", "reserved", "quarantined"))
    return found


def hold(client: TestClient, prefix_id: int = 1, status: int = 201, **body: Any) -> Any:
    response = client.post(f"/v1/prefixes/{prefix_id}/holds", json=body)
    assert response.status_code == status, response.text
    return response.json()


def granted(
    database: Database, host: int, vms: list[UUID], *wanted: NetworkWanted, after_s: float = 0
) -> list[list[str]]:
    now = NOW + timedelta(seconds=after_s)
    with database.write() as conn:
        ipdb.grant(conn, dict.fromkeys(vms, host), dict.fromkeys(vms, wanted or ipdb.ANY_NETWORK), now=lambda: now)
        got = ipdb.addresses_of(conn, vms)
    return [[str(one.address.ip) for one in got.get(vm, ())] for vm in vms]


def released(database: Database, *vms: UUID, after_s: float = 0) -> int:
    with database.write() as conn:
        return ipdb.release(conn, vms, now=lambda: NOW + timedelta(seconds=after_s))


def fixed(text: str, prefix: str | None = None) -> NetworkWanted:
    return NetworkWanted(address=ip_address(text), prefix=ip_network(prefix) if prefix else None)


def refused(database: Database, host: int, vm: UUID, wanted: NetworkWanted, after_s: float = 0) -> PpecError:
    with pytest.raises(PpecError) as caught:
        granted(database, host, [vm], wanted, after_s=after_s)
    return caught.value
