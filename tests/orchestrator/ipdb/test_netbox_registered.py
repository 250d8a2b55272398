# SPDX-License-Identifier: Apache-2.0
"""What of NetBox is registered as a prefix, one by one and by import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from alembic import command
from fastapi.testclient import TestClient
from ipdb_site import post
from netbox_site import PREFIX

from ppec_contract.errors import PpecError
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.migrations.upgrade import alembic_config

IN_BLUE = PREFIX | {"vrf": "blue", "bridge": "br1"}


def imported(client: TestClient, *prefixes: dict[str, Any], dry_run: bool = False) -> Any:
    body = {"document": {"prefixes": prefixes}, "dry_run": dry_run}
    return client.post("/v1/ipdb/import", json=body).json()


def test_a_prefix_of_netbox_is_registered_once(site: TestClient) -> None:
    post(site, "vrfs", {"name": "blue"})
    refused = site.post("/v1/prefixes", json=IN_BLUE)
    assert (refused.status_code, refused.json()["code"]) == (422, "prefix.invalid")
    words = "NetBox's prefix 7 is registered already, as 10.9.0.0/28 of VRF red"
    assert words in refused.json()["detail"]
    (fault,) = imported(site, IN_BLUE)["details"]["faults"]
    assert fault["place"] == "prefixes[0]"
    assert words in fault["reason"]
    assert site.delete("/v1/prefixes/3").status_code == 204
    assert site.post("/v1/prefixes", json=IN_BLUE).status_code == 201


def test_a_database_with_two_of_one_is_not_taken_over(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/ppec.db")
    columns = "vrf_id, cidr, family, bridge, region, first, last, nameservers, netbox_id"
    with database.write() as connection:
        command.upgrade(alembic_config(connection), "0011")
        for number, name in enumerate(("red", "blue"), start=1):
            connection.exec_driver_sql(f"INSERT INTO vrf (id, name, description) VALUES ({number}, '{name}', '')")
            values = f"{number}, '10.9.0.0/28', 4, 'br0', 'north', '10.9.0.1', '10.9.0.14', '[]', 7"
            connection.exec_driver_sql(f"INSERT INTO prefix ({columns}) VALUES ({values})")
    with pytest.raises(PpecError) as caught:
        database.migrate()
    assert "NetBox's prefixes 7 are each registered more than once" in caught.value.message
    database.close()
