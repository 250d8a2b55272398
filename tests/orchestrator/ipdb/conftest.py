# SPDX-License-Identifier: Apache-2.0
"""A host of the site that IPv4 and IPv6 prefixes serve."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from ppec_orchestrator.store import tables
from ppec_orchestrator.store.database import Database

# What test modules here share.
sys.path.append(str(Path(__file__).parent))
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
