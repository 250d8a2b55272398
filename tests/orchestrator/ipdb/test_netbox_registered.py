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
from netbox_stand_in import NetBoxStandIn

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


def test_a_prefix_within_another_one_of_netbox_is_not_registered(site: TestClient, stand_in: NetBoxStandIn) -> None:
    """Unless it is of another VRF over there."""
    post(site, "vrfs", {"name": "blue"})
    stand_in.add_prefix(9, "10.9.0.0/29", vrf=5)
    within = IN_BLUE | {"cidr": "10.9.0.0/29", "netbox_id": 9}
    words = "NetBox's prefix 7 (10.9.0.0/28) overlaps it and is registered"
    assert words in site.post("/v1/prefixes", json=within).json()["detail"]
    assert words in imported(site, within)["detail"]
    stand_in.add_prefix(9, "10.9.0.0/29", vrf=6)
    post(site, "prefixes", within | {"gateway": None})


def test_two_new_ones_of_an_import_that_overlap_are_not_both_registered(
    site: TestClient, stand_in: NetBoxStandIn
) -> None:
    """In two VRFs here, which would be none of each other's business; in one over there."""
    post(site, "vrfs", {"name": "blue"})
    stand_in.add_prefix(8, "10.8.0.0/28", vrf=5)
    stand_in.add_prefix(9, "10.8.0.0/29", vrf=5)
    whole = PREFIX | {"cidr": "10.8.0.0/28", "gateway": None, "netbox_id": 8}
    within = IN_BLUE | {"cidr": "10.8.0.0/29", "gateway": None, "netbox_id": 9}
    (fault,) = imported(site, whole, within)["details"]["faults"]
    assert fault["place"] == "prefixes[1]"
    assert "NetBox's prefix 8 (10.8.0.0/28) overlaps it and is to be registered with it" in fault["reason"]
    stand_in.add_prefix(9, "10.8.0.0/29", vrf=6)
    assert imported(site, whole, within)["created"]["prefixes"] == 2


def test_an_imported_prefix_must_be_netbox_s(site: TestClient, stand_in: NetBoxStandIn) -> None:
    """As one that is created; what is there already isn't asked for again."""
    stand_in.add_prefix(8, "10.8.0.0/28", vrf=5)
    good = PREFIX | {"cidr": "10.8.0.0/28", "gateway": None, "netbox_id": 8}
    other = good | {"cidr": "10.8.1.0/28", "netbox_id": 7}
    none = good | {"cidr": "10.8.2.0/28", "netbox_id": 99}
    problem = imported(site, good, other, none, PREFIX)
    told = {fault["place"]: fault["reason"] for fault in problem["details"]["faults"]}
    assert set(told) == {"prefixes[1]", "prefixes[2]"}
    assert "it is 10.9.0.0/28" in told["prefixes[1]"]
    assert "there is no such prefix" in told["prefixes[2]"]
    assert problem["detail"].startswith("2 of 4 rows")
    del stand_in.prefixes[7]
    assert imported(site, good, PREFIX)["created"]["prefixes"] == 1
    assert imported(site, good, PREFIX)["unchanged"]["prefixes"] == 2


def test_addresses_that_netbox_keeps_are_not_too_many(site: TestClient, stand_in: NetBoxStandIn) -> None:
    for n in range(11, 16):
        stand_in.add_prefix(n, f"10.{n}.0.0/16", vrf=5)
    wide = [PREFIX | {"cidr": f"10.{n}.0.0/16", "gateway": None, "netbox_id": n} for n in range(11, 16)]
    assert imported(site, *wide)["created"]["prefixes"] == 5


def test_a_row_is_told_once_whatever_is_wrong_with_it(site: TestClient) -> None:
    problem = imported(site, PREFIX | {"cidr": "10.0.0.0/28", "gateway": None, "netbox_id": 99})
    assert [fault["place"] for fault in problem["details"]["faults"]] == ["prefixes[0]"]
    assert problem["detail"].startswith("1 of 1 rows")


def test_nothing_is_imported_while_netbox_does_not_answer(site: TestClient, stand_in: NetBoxStandIn) -> None:
    def cut(method: str, path: str) -> None:
        raise ConnectionError

    stand_in.before = cut
    wanted = PREFIX | {"cidr": "10.8.0.0/28", "gateway": None, "netbox_id": 8}
    assert imported(site, wanted)["code"] == "netbox.unavailable"


def test_without_netbox_configured_no_imported_prefix_is_netbox_s(site: TestClient, ipv4_site: TestClient) -> None:
    """`ipv4_site` is the same site without."""
    new = PREFIX | {"cidr": "10.8.0.0/28", "gateway": None, "netbox_id": 8}
    (fault,) = imported(ipv4_site, new, dry_run=True)["details"]["faults"]
    assert "no NetBox is configured" in fault["reason"]
    assert imported(ipv4_site, PREFIX)["unchanged"]["prefixes"] == 1


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
