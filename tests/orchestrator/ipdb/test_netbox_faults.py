# SPDX-License-Identifier: Apache-2.0
"""One prefix of NetBox that something is wrong with leaves the others alone, and can be deleted."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from fastapi.testclient import TestClient
from ipdb_site import NOW, fixed, granted, make_vm, post, released
from netbox_site import MARK, ONE_OF_IT, PREFIX, in_step, rows
from netbox_stand_in import NetBoxStandIn, RefusedError

from ppec_contract.api_ipdb import NetworkWanted
from ppec_contract.errors import PpecError
from ppec_orchestrator.address_supply import AddressSupply
from ppec_orchestrator.store.database import Database

LATER = PREFIX | {"cidr": "10.10.0.0/28", "gateway": None, "netbox_id": 8}


@pytest.fixture
def later(site: TestClient, stand_in: NetBoxStandIn) -> int:
    """A second prefix of NetBox's, which comes after the first."""
    stand_in.add_prefix(8, "10.10.0.0/28", vrf=5)
    return int(post(site, "prefixes", LATER)["prefix_id"])


def _free(site: TestClient, prefix_id: int) -> int:
    return int(site.get(f"/v1/prefixes/{prefix_id}").json()["addresses_free"])


def test_a_prefix_that_is_gone_there_does_not_stop_those_after_it(
    site: TestClient, later: int, supply: AddressSupply, stand_in: NetBoxStandIn
) -> None:
    del stand_in.prefixes[7]
    assert [fault.code for fault in supply.settle()] == ["netbox.refused"]
    assert _free(site, later) == 3


@pytest.mark.parametrize(
    ("answer", "codes"),
    [
        ((500, {"detail": "a bug"}), ["netbox.unavailable"]),
        # What nobody thought of is no `PpecError`.
        ((200, {"id": 7, "prefix": "10.9.0.0/28", "vrf": {"no": "id"}}), []),
    ],
)
def test_a_prefix_that_netbox_stumbles_over_does_not_stop_those_after_it(
    site: TestClient,
    later: int,
    supply: AddressSupply,
    stand_in: NetBoxStandIn,
    answer: tuple[int, dict[str, Any]],
    codes: list[str],
) -> None:
    def stumble(method: str, path: str) -> None:
        if "/7/" in path:
            raise RefusedError(*answer)

    stand_in.before = stumble
    assert [fault.code for fault in supply.settle()] == codes
    assert (_free(site, 3), _free(site, later)) == (0, 3)


def test_of_a_prefix_that_is_gone_there_no_more_are_wanted(
    site: TestClient, later: int, supply: AddressSupply, stand_in: NetBoxStandIn
) -> None:
    """The refusal stands that says what is lacking."""
    del stand_in.prefixes[7]
    assert not supply.supply({ONE_OF_IT: 5}, None)
    assert supply.supply({NetworkWanted(): 5}, None)
    assert _free(site, later) == 5


def test_a_prefix_that_is_gone_there_is_deleted_and_its_addresses_go_back(
    site: TestClient, database: Database, supply: AddressSupply, stand_in: NetBoxStandIn
) -> None:
    supply.settle()
    assert len(stand_in.texts(MARK)) == 3
    del stand_in.prefixes[7]
    assert site.delete("/v1/prefixes/3").status_code == 204
    assert rows(database) == []
    assert stand_in.texts(MARK) == []


def test_a_prefix_is_deleted_when_there_is_no_netbox_any_more(
    site: TestClient, ipv4_site: TestClient, database: Database, host_id: int, supply: AddressSupply
) -> None:
    """Its settings were removed: `ipv4_site` is the same site without."""
    supply.settle()
    vm = make_vm(database, "a")
    granted(database, host_id, [vm], ONE_OF_IT)
    refused = ipv4_site.delete("/v1/prefixes/3").json()
    assert refused["code"] == "resource.in_use"
    assert "VMs have 1 of its addresses (a)" in refused["detail"]
    assert len(rows(database)) == 3
    released(database, vm, after_s=-60)
    assert ipv4_site.delete("/v1/prefixes/3").status_code == 204
    assert rows(database) == []


def test_a_prefix_is_not_deleted_while_netbox_does_not_answer(
    site: TestClient, database: Database, supply: AddressSupply, stand_in: NetBoxStandIn
) -> None:
    supply.settle()

    def cut(method: str, path: str) -> None:
        raise ConnectionError

    stand_in.before = cut
    assert site.delete("/v1/prefixes/3").json()["code"] == "netbox.unavailable"
    assert len(rows(database)) == 3


def test_a_prefix_whose_addresses_only_rest_is_deleted_by_force(
    site: TestClient, database: Database, host_id: int, supply: AddressSupply, stand_in: NetBoxStandIn
) -> None:
    """As a built-in one is."""
    supply.settle()
    vm = make_vm(database, "a")
    granted(database, host_id, [vm], ONE_OF_IT)
    released(database, vm)
    assert site.get("/v1/prefixes/3").json()["addresses_quarantined"] == 1
    assert site.delete("/v1/prefixes/3").json()["code"] == "resource.in_use"
    assert site.delete("/v1/prefixes/3?force=true").status_code == 204
    assert stand_in.texts(MARK) == []


def test_addresses_go_on_resting_when_their_prefix_can_not_be_deleted(
    site: TestClient, database: Database, host_id: int, supply: AddressSupply, stand_in: NetBoxStandIn
) -> None:
    supply.settle()
    resting, using = make_vm(database, "a"), make_vm(database, "b")
    granted(database, host_id, [resting, using], ONE_OF_IT)
    released(database, resting)
    assert site.delete("/v1/prefixes/3").json()["code"] == "resource.in_use"
    assert site.get("/v1/prefixes/3").json()["addresses_quarantined"] == 1
    assert not any(row.going_back for row in rows(database))
    assert in_step(database, stand_in)


def resting_and_deleted(database: Database, host_id: int, stand_in: NetBoxStandIn) -> Any:
    """The row of 10.9.0.3, which a VM has given back and somebody has deleted in NetBox."""
    vm = make_vm(database, "a")
    assert granted(database, host_id, [vm], ONE_OF_IT) == [["10.9.0.3"]]
    released(database, vm)
    (row,) = (row for row in rows(database) if row.free_from is not None)
    del stand_in.addresses[row.external_id]
    return row


def test_what_others_delete_there_rests_all_the_same(
    site: TestClient, database: Database, host_id: int, supply: AddressSupply, stand_in: NetBoxStandIn
) -> None:
    supply.settle()
    resting_and_deleted(database, host_id, stand_in)
    supply.settle()
    supply.supply({ONE_OF_IT: 4}, "red")
    others = [make_vm(database, f"v{n}") for n in range(4)]
    assert ["10.9.0.3"] not in granted(database, host_id, others, ONE_OF_IT)
    assert site.get("/v1/prefixes/3").json()["addresses_quarantined"] == 1
    # Meanwhile nobody else is given it either.
    assert "10.9.0.3/28" in stand_in.texts(MARK)
    assert in_step(database, stand_in)


def test_what_others_take_over_while_it_rests_is_let_go_afterwards(
    site: TestClient, database: Database, host_id: int, supply: AddressSupply, stand_in: NetBoxStandIn
) -> None:
    supply.settle()
    row = resting_and_deleted(database, host_id, stand_in)
    stand_in.add_address("10.9.0.3/28", vrf=5, description="somebody's now")
    assert supply.settle() == []
    assert row.address_hex in {one.address_hex for one in rows(database)}
    AddressSupply(database, supply._source, standing=3, now=lambda: NOW + timedelta(seconds=60)).settle()
    assert row.address_hex not in {one.address_hex for one in rows(database)}
    with pytest.raises(PpecError):
        supply.prepare([fixed("10.9.0.3")], "red")
