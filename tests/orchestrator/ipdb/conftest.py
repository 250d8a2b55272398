# SPDX-License-Identifier: Apache-2.0
"""A host of the site that IPv4 and IPv6 prefixes serve, and the site with a prefix that NetBox keeps."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from ppec_orchestrator.address_supply import AddressSupply
from ppec_orchestrator.api.app import create_app
from ppec_orchestrator.api.services import Services
from ppec_orchestrator.netbox import NetBox
from ppec_orchestrator.store import tables
from ppec_orchestrator.store.database import Database

# What test modules here share.
sys.path.append(str(Path(__file__).parent))
from ipdb_site import NOW
from netbox_site import CIDR, MARK, PREFIX
from netbox_stand_in import TOKEN, NetBoxStandIn, serving

IPV6 = {"vrf": "red", "cidr": "fd00::/64", "bridge": "br0", "cluster": "c1", "first": "fd00::1", "last": "fd00::8"}


@pytest.fixture
def host_id(ipv4_site: TestClient, database: Database) -> int:
    """Host `h1`, served by 10.0.0.2 to 10.0.0.30 and by fd00::1 to fd00::8."""
    for path, body in (
        ("prefixes", IPV6),
        ("hosts", {"name": "h1", "rack": "r1", "vrf": "red", "address": "192.0.2.1"}),
    ):
        assert ipv4_site.post(f"/v1/{path}", json=body).status_code == 201
    with database.read() as conn:
        return conn.execute(select(tables.host.c.id)).scalar_one()


@pytest.fixture
def stand_in() -> Iterator[NetBoxStandIn]:
    """Knows the prefix as number 7, its gateway, and one address of somebody else's: 10.9.0.2."""
    with serving() as started:
        started.add_prefix(7, str(CIDR), vrf=5)
        started.add_address("10.9.0.1/28", vrf=5, description="router")
        started.add_address("10.9.0.2/28", vrf=5, description="a switch")
        yield started


@pytest.fixture
def netbox(stand_in: NetBoxStandIn) -> NetBox:
    return NetBox(stand_in.url, TOKEN, MARK)


@pytest.fixture
def supply(database: Database, netbox: NetBox) -> AddressSupply:
    return AddressSupply(database, netbox, standing=3, now=lambda: NOW)


@pytest.fixture
def site(ipv4_site: TestClient, services: Services, supply: AddressSupply, host_id: int) -> TestClient:
    """The site's API with NetBox configured, and its prefix registered as 3."""
    client = TestClient(create_app(dataclasses.replace(services, supply=supply)), headers=ipv4_site.headers)
    made = client.post("/v1/prefixes", json=PREFIX)
    assert (made.status_code, made.json()["prefix_id"]) == (201, 3), made.text
    return client
