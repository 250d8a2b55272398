# SPDX-License-Identifier: Apache-2.0
"""Requests that leave the VRF open: what is acquired for them from NetBox, and where."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient
from ipdb_site import NOW, fixed, granted, hold, make_vm, post, released
from netbox_site import MARK, ONE_OF_IT, PREFIX, rows
from netbox_stand_in import NetBoxStandIn

from ppec_contract.api_ipdb import NetworkWanted
from ppec_contract.errors import PpecError
from ppec_orchestrator.address_supply import AddressSupply
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.places import Place
from ppec_orchestrator.store.wanted_networks import Requester, candidates

WANTED = fixed("10.9.0.5")


@pytest.fixture
def blue(site: TestClient, stand_in: NetBoxStandIn) -> int:
    """VRF `blue` with a host, and with the same network as red's, which is number 17 in NetBox and of another VRF."""
    stand_in.add_prefix(17, "10.9.0.0/28", vrf=6)
    stand_in.add_address("10.9.0.1/28", vrf=6, description="router")
    return _in_blue(site, {"netbox_id": 17})


def _in_blue(site: TestClient, more: dict[str, Any]) -> int:
    post(site, "vrfs", {"name": "blue"})
    post(site, "hosts", {"name": "h2", "rack": "r1", "vrf": "blue", "address": "192.0.2.2"})
    return int(post(site, "prefixes", PREFIX | {"vrf": "blue", "bridge": "br1"} | more)["prefix_id"])


def _where(database: Database) -> list[int]:
    return [row.prefix_id for row in rows(database)]


def _candidates(database: Database) -> Any:
    with database.read() as conn:
        return candidates(conn, [WANTED], Requester(Place(), None, NOW))


def test_an_address_that_one_vrf_can_not_give_is_acquired_in_another(
    site: TestClient, blue: int, database: Database, supply: AddressSupply, stand_in: NetBoxStandIn
) -> None:
    stand_in.add_address("10.9.0.5/28", vrf=5, description="somebody's in red")
    supply.prepare([WANTED], None)
    assert _where(database) == [blue]
    # The VM goes where it was acquired, although nothing here speaks against the other.
    assert _candidates(database) == ((blue,),)
    with pytest.raises(PpecError) as caught:
        supply.prepare([WANTED], "red")
    assert caught.value.code == "address.in_use"


def test_an_address_is_acquired_in_one_vrf_only(
    site: TestClient, blue: int, database: Database, supply: AddressSupply, stand_in: NetBoxStandIn
) -> None:
    assert _candidates(database) == ((3, blue),)
    supply.prepare([WANTED], None)
    supply.prepare([WANTED], None)
    assert _where(database) == [3]
    assert stand_in.texts(MARK) == ["10.9.0.5/28"]
    assert _candidates(database) == ((3,),)


def test_an_address_that_is_ready_in_one_vrf_is_not_acquired_in_another(
    site: TestClient, blue: int, database: Database, supply: AddressSupply
) -> None:
    supply.prepare([WANTED], "blue")
    supply.prepare([WANTED], None)
    assert _where(database) == [blue]


def test_an_address_that_a_vm_has_in_one_vrf_or_that_rests_is_acquired_in_another(
    site: TestClient, blue: int, database: Database, host_id: int, supply: AddressSupply
) -> None:
    supply.prepare([WANTED], None)
    vm = make_vm(database, "a")
    granted(database, host_id, [vm], WANTED)
    supply.prepare([WANTED], None)
    assert _where(database) == [3, blue]
    released(database, vm)
    assert _candidates(database) == ((blue,),)


def test_an_address_is_refused_when_no_vrf_can_give_it(
    site: TestClient, blue: int, database: Database, supply: AddressSupply, stand_in: NetBoxStandIn
) -> None:
    """Also where one of the prefixes is gone over there."""
    del stand_in.prefixes[7]
    stand_in.add_address("10.9.0.5/28", vrf=6)
    with pytest.raises(PpecError) as caught:
        supply.prepare([WANTED], None)
    assert caught.value.code == "address.in_use"
    supply.prepare([fixed("10.9.0.6")], None)
    assert _where(database) == [blue]


@pytest.mark.parametrize("held", [None, "db"])
def test_an_address_of_a_built_in_prefix_needs_no_netbox(
    site: TestClient, database: Database, supply: AddressSupply, stand_in: NetBoxStandIn, held: str | None
) -> None:
    """Or, reserved for a VM that may be this one, can do without."""
    built_in = _in_blue(site, {"netbox_id": None})
    if held:
        hold(site, built_in, kind="reserved", first="10.9.0.5", reserved_for=held)
        stand_in.add_address("10.9.0.5/28", vrf=5)
    supply.prepare([WANTED], None)
    assert rows(database) == []


def test_no_more_is_acquired_in_all_than_is_missing(
    site: TestClient, blue: int, database: Database, supply: AddressSupply, stand_in: NetBoxStandIn
) -> None:
    supply.settle()
    assert len(rows(database)) == 6
    assert supply.supply({ONE_OF_IT: 5}, None)
    assert [_where(database).count(one) for one in (3, blue)] == [5, 3]
    assert supply.supply({NetworkWanted(): 4, ONE_OF_IT: 4}, None)
    assert [_where(database).count(one) for one in (3, blue)] == [8, 5]
    # What one has no more of, the next one gives.
    assert supply.supply({NetworkWanted(): 20}, None)
    assert [_where(database).count(one) for one in (3, blue)] == [12, 13]
    assert not supply.supply({NetworkWanted(): 20}, None)


def test_what_is_scarce_is_acquired_first(
    site: TestClient, database: Database, supply: AddressSupply, stand_in: NetBoxStandIn
) -> None:
    stand_in.add_prefix(8, "10.10.0.0/28", vrf=5)
    later = post(site, "prefixes", PREFIX | {"cidr": "10.10.0.0/28", "gateway": None, "netbox_id": 8})["prefix_id"]
    assert supply.supply({NetworkWanted(): 4}, "red", scarce=["10.10.0.0/28"])
    assert _where(database) == [later] * 4


def test_a_netbox_that_is_away_is_not_asked_about_every_prefix(
    site: TestClient, database: Database, supply: AddressSupply, stand_in: NetBoxStandIn
) -> None:
    for n in range(11, 16):
        stand_in.add_prefix(n, f"10.{n}.0.0/28", vrf=5)
        post(site, "prefixes", PREFIX | {"cidr": f"10.{n}.0.0/28", "gateway": None, "netbox_id": n})

    def cut(method: str, path: str) -> None:
        raise ConnectionError

    stand_in.before = cut
    stand_in.requests.clear()
    assert not supply.supply({NetworkWanted(): 5}, None)
    assert len({path for _, path in stand_in.requests}) == 2
