# SPDX-License-Identifier: Apache-2.0
"""NetBox as a source of addresses: what it is asked, what it answers, and whoever dies in between."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any
from uuid import UUID

import pytest
from fastapi.testclient import TestClient
from ipdb_site import NOW, fixed, granted, make_vm, released
from netbox_site import AT_NETBOX, CIDR, ONE_OF_IT, PREFIX, in_step, rows
from netbox_stand_in import MAX_PAGE_SIZE, TOKEN, NetBoxStandIn

from ppec_contract.errors import PpecError
from ppec_orchestrator.address_supply import AddressSupply
from ppec_orchestrator.api.services import make_services
from ppec_orchestrator.ipdb.provider import SourcePrefix
from ppec_orchestrator.netbox import NetBox
from ppec_orchestrator.settings import Settings
from ppec_orchestrator.store import external_addresses
from ppec_orchestrator.store.database import Database


def test_the_next_free_ones_are_acquired_and_marked(stand_in: NetBoxStandIn, netbox: NetBox) -> None:
    got = netbox.acquire(AT_NETBOX, 3)
    assert [str(one.address) for one in got] == ["10.9.0.3", "10.9.0.4", "10.9.0.5"]
    assert stand_in.texts("ppec test") == ["10.9.0.3/28", "10.9.0.4/28", "10.9.0.5/28"]
    assert netbox.owned(AT_NETBOX) == got
    netbox.tell([(got[0].source_id, "web-1"), (got[1].source_id, None)])
    told = stand_in.addresses[got[0].source_id]
    assert (told["dns_name"], told["status"], told["description"]) == ("web-1", {"value": "active"}, "ppec test")
    netbox.give_back([one.source_id for one in got])
    netbox.give_back([one.source_id for one in got])
    assert netbox.owned(AT_NETBOX) == []


def test_when_there_are_fewer_it_gives_what_there_is(stand_in: NetBoxStandIn, netbox: NetBox) -> None:
    assert len(netbox.acquire(AT_NETBOX, 100)) == 12
    assert netbox.acquire(AT_NETBOX, 1) == []
    assert len(stand_in.texts()) == 14


def test_all_pages_of_what_is_ours_are_read(stand_in: NetBoxStandIn, netbox: NetBox) -> None:
    stand_in.add_prefix(8, "fd00:9::/64")
    prefix = SourcePrefix(4, 8, ip_network("fd00:9::/64"))
    wanted = 2 * MAX_PAGE_SIZE + 7
    got = netbox.acquire(prefix, wanted)
    assert str(got[0].address) == "fd00:9::1"
    assert netbox.owned(prefix) == got
    assert len(got) == wanted


@pytest.mark.parametrize("unique", [True, False])
def test_an_address_by_number_is_acquired_or_in_use(stand_in: NetBoxStandIn, netbox: NetBox, unique: bool) -> None:
    stand_in.unique_vrfs = unique
    got = netbox.acquire_fixed(AT_NETBOX, ip_address("10.9.0.9"))
    assert netbox.owned(AT_NETBOX) == [got]
    for taken in ("10.9.0.9", "10.9.0.2"):
        with pytest.raises(PpecError) as caught:
            netbox.acquire_fixed(AT_NETBOX, ip_address(taken))
        assert (caught.value.code, caught.value.details["by"]) == ("address.in_use", "netbox")


def test_a_duplicate_that_only_netbox_sees_is_in_use(stand_in: NetBoxStandIn, netbox: NetBox) -> None:
    """Somebody enters it between our look and our request."""
    entered = threading.Event()

    def meanwhile(method: str, path: str) -> None:
        if method == "POST" and not entered.is_set():
            entered.set()
            stand_in.add_address("10.9.0.9/28", vrf=5)

    stand_in.before = meanwhile
    with pytest.raises(PpecError) as caught:
        netbox.acquire_fixed(AT_NETBOX, ip_address("10.9.0.9"))
    assert caught.value.code == "address.in_use"


def test_faults_are_netbox_s_in_our_words(stand_in: NetBoxStandIn, netbox: NetBox) -> None:
    with pytest.raises(PpecError) as refused:
        NetBox(stand_in.url, "wrong", "ppec").acquire(AT_NETBOX, 1)
    assert refused.value.code == "netbox.refused"
    assert "Invalid token" in refused.value.message
    with pytest.raises(PpecError) as gone:
        netbox.acquire(SourcePrefix(3, 99, CIDR), 1)
    assert gone.value.code == "netbox.refused"

    def cut(method: str, path: str) -> None:
        raise ConnectionError

    stand_in.before = cut
    with pytest.raises(PpecError) as silent:
        netbox.owned(AT_NETBOX)
    assert (silent.value.code, silent.value.retryable) == ("netbox.unavailable", True)


def test_concurrent_requests_are_never_given_the_same(stand_in: NetBoxStandIn, netbox: NetBox) -> None:
    stand_in.add_prefix(8, "10.8.0.0/24")
    prefix = SourcePrefix(4, 8, ip_network("10.8.0.0/24"))
    clients = [NetBox(stand_in.url, TOKEN, f"client {n}") for n in range(6)]
    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(lambda client: [client.acquire(prefix, 3) for _ in range(4)], clients))
    addresses = [one.address for parts in got for part in parts for one in part]
    assert len(addresses) == len(set(addresses)) == 72


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"netbox_id": 99}, "there is no such prefix"),
        ({"cidr": "10.9.1.0/28", "gateway": None}, "it is 10.9.0.0/28"),
        ({"gateway": "10.9.0.14"}, "does not know the gateway 10.9.0.14"),
    ],
)
def test_a_prefix_must_be_netbox_s(site: TestClient, change: dict[str, Any], words: str) -> None:
    refused = site.post("/v1/prefixes", json=PREFIX | change)
    assert (refused.status_code, refused.json()["code"]) == (422, "prefix.invalid")
    assert words in refused.json()["detail"]


def test_without_netbox_configured_no_prefix_is_netbox_s(ipv4_site: TestClient) -> None:
    assert "no NetBox is configured" in ipv4_site.post("/v1/prefixes", json=PREFIX).json()["detail"]


def test_addresses_stand_ready_are_told_and_go_back(
    site: TestClient, database: Database, host_id: int, supply: AddressSupply, stand_in: NetBoxStandIn
) -> None:
    supply.settle()
    view = site.get("/v1/prefixes/3").json()
    assert (view["addresses_total"], view["addresses_free"]) == (3, 3)
    assert site.get("/v1/prefixes/3/free").json()["runs"] == [{"first": "10.9.0.3", "last": "10.9.0.5", "count": 3}]
    vms = [make_vm(database, name) for name in ("a", "b")]
    assert granted(database, host_id, vms, ONE_OF_IT) == [["10.9.0.3"], ["10.9.0.4"]]
    supply.settle()
    names = {one["address"]: one["dns_name"] for one in stand_in.addresses.values()}
    assert (names["10.9.0.3/28"], names["10.9.0.4/28"], names["10.9.0.5/28"]) == ("a", "b", "")
    assert site.get("/v1/prefixes/3").json()["addresses_free"] == 3
    supply.supply({ONE_OF_IT: 9}, "red")
    assert in_step(database, stand_in)
    released(database, *vms)
    # Those in quarantine don't go back, of the others what exceeds twice what stands ready.
    later = AddressSupply(database, supply._source, standing=3, now=lambda: NOW + timedelta(seconds=59))
    later.settle()
    assert [row.vm_id for row in rows(database)] == [None] * 8
    names = {one["address"]: one["dns_name"] for one in stand_in.addresses.values()}
    assert names["10.9.0.3/28"] == ""
    AddressSupply(database, supply._source, standing=3, now=lambda: NOW + timedelta(seconds=60)).settle()
    assert len(rows(database)) == 6
    assert in_step(database, stand_in)


def test_a_prefix_is_deleted_once_all_is_given_back(
    site: TestClient, database: Database, host_id: int, supply: AddressSupply, stand_in: NetBoxStandIn
) -> None:
    supply.settle()
    vm = make_vm(database, "a")
    granted(database, host_id, [vm], ONE_OF_IT)
    assert site.delete("/v1/prefixes/3").json()["code"] == "resource.in_use"
    released(database, vm, after_s=-60)
    assert site.delete("/v1/prefixes/3").status_code == 204
    assert stand_in.texts("ppec test") == []
    assert site.post("/v1/prefixes/3/holds", json={"kind": "reserved", "first": "10.9.0.9"}).status_code == 404


def test_holds_are_netbox_s_matter(site: TestClient) -> None:
    refused = site.post("/v1/prefixes/3/holds", json={"kind": "reserved", "first": "10.9.0.9"})
    assert "reserve them there" in refused.json()["detail"]


def _lost(stand_in: NetBoxStandIn, method: str, when: str) -> None:
    """The next request of this kind is cut, before it is carried out or after."""
    done = threading.Event()

    def cut(asked: str, path: str) -> None:
        if asked == method and not done.is_set():
            done.set()
            raise ConnectionError

    setattr(stand_in, when, cut)


@pytest.mark.parametrize("cut", list(itertools.product(("POST", "DELETE", "PATCH"), ("before", "after"))))
def test_a_request_that_is_lost_loses_no_address(
    site: TestClient,
    database: Database,
    host_id: int,
    supply: AddressSupply,
    stand_in: NetBoxStandIn,
    cut: tuple[str, str],
) -> None:
    """The orchestrator dies there, or NetBox does: the next one brings both into step."""
    supply.supply({ONE_OF_IT: 9}, "red")
    vm = make_vm(database, "a")
    granted(database, host_id, [vm], ONE_OF_IT)
    if cut[0] == "POST":
        granted(database, host_id, [make_vm(database, f"v{n}") for n in range(7)], ONE_OF_IT)
    _lost(stand_in, *cut)
    assert [fault.code for fault in supply.settle()] == ["netbox.unavailable"]
    assert supply.settle() == []
    assert in_step(database, stand_in)
    (mine,) = [row for row in rows(database) if row.vm_id == vm]
    assert stand_in.addresses[mine.external_id]["dns_name"] == "a"
    assert not any(row.going_back for row in rows(database))


def test_what_others_delete_there_is_entered_again_if_a_vm_has_it(
    site: TestClient, database: Database, host_id: int, supply: AddressSupply, stand_in: NetBoxStandIn
) -> None:
    supply.settle()
    vm = make_vm(database, "a")
    granted(database, host_id, [vm], ONE_OF_IT)
    for row in rows(database)[:2]:
        del stand_in.addresses[row.external_id]
    supply.settle()
    assert in_step(database, stand_in)
    (mine,) = [row for row in rows(database) if row.vm_id == vm]
    there = stand_in.addresses[mine.external_id]
    assert (ip_interface(there["address"]).ip, there["dns_name"]) == (ip_address("10.9.0.3"), "a")


def test_what_is_of_no_use_goes_back(
    site: TestClient, database: Database, supply: AddressSupply, stand_in: NetBoxStandIn
) -> None:
    """The gateway's entry was removed over there: NetBox would give it away."""
    (gateway,) = [one["id"] for one in stand_in.addresses.values() if one["description"] == "router"]
    del stand_in.addresses[gateway]
    supply.settle()
    assert "10.9.0.1/28" not in stand_in.texts()
    assert {row.address_hex[-2:] for row in rows(database)} == {"03", "04", "05"}
    stand_in.requests.clear()
    supply.settle()
    assert {method for method, _ in stand_in.requests} == {"GET"}


@pytest.mark.parametrize("locking", [True, False])
def test_several_orchestrators_and_others_acquire_at_once(
    site: TestClient,
    database: Database,
    open_database: Callable[[], Database],
    stand_in: NetBoxStandIn,
    host_id: int,
    locking: bool,
) -> None:
    """Even of a NetBox that gives an address twice no two VMs of ours get the same."""
    stand_in.locking, stand_in.unique_vrfs = locking, locking
    if not locking:
        barrier = threading.Barrier(2)

        def together() -> None:
            try:
                barrier.wait(0.2)
            except threading.BrokenBarrierError:
                barrier.reset()

        stand_in.between = together
    supplies = [
        AddressSupply(open_database(), NetBox(stand_in.url, TOKEN, "ppec test"), standing=2, now=lambda: NOW)
        for _ in range(3)
    ]
    others = NetBox(stand_in.url, TOKEN, "others")
    with ThreadPoolExecutor(4) as pool:
        work = [pool.submit(one.supply, {ONE_OF_IT: 8}, "red") for one in supplies]
        work.append(pool.submit(others.acquire, AT_NETBOX, 3))
        for each in work:
            each.result()
    for one in supplies:
        one.settle()
    assert in_step(database, stand_in)
    mine = [row.address_hex for row in rows(database)]
    assert len(mine) == len(set(mine))
    if locking:
        texts = stand_in.texts()
        assert len(texts) == len(set(texts))
    vms: list[UUID] = [make_vm(database, f"v{n}") for n in range(len(mine))]
    got = [address for addresses in granted(database, host_id, vms, ONE_OF_IT) for address in addresses]
    assert len(set(got)) == len(vms)


def test_what_another_look_has_found_first_is_enough_all_the_same(
    site: TestClient,
    database: Database,
    open_database: Callable[[], Database],
    supply: AddressSupply,
    stand_in: NetBoxStandIn,
) -> None:
    """Another process gives it rows before whoever acquired it does."""
    other = AddressSupply(open_database(), NetBox(stand_in.url, TOKEN, "ppec test"), standing=3, now=lambda: NOW)

    def after(method: str, path: str) -> None:
        if method == "POST":
            other._reconcile(AT_NETBOX)

    stand_in.after = after
    assert supply.supply({ONE_OF_IT: 5}, "red")
    stand_in.requests.clear()
    # There is enough now, and NetBox need not be asked.
    assert supply.supply({ONE_OF_IT: 5}, "red")
    assert stand_in.requests == []
    assert len(rows(database)) == 5


def test_an_address_by_number_is_acquired_on_the_way(
    site: TestClient, database: Database, host_id: int, supply: AddressSupply, stand_in: NetBoxStandIn
) -> None:
    supply.prepare([fixed("10.9.0.9")], "red")
    supply.prepare([fixed("10.9.0.9")], "red")
    assert stand_in.texts("ppec test") == ["10.9.0.9/28"]
    vm = make_vm(database, "a")
    assert granted(database, host_id, [vm], fixed("10.9.0.9")) == [["10.9.0.9"]]
    with pytest.raises(PpecError) as caught:
        supply.prepare([fixed("10.9.0.2")], "red")
    assert "in use, as NetBox says" in caught.value.message


def test_it_goes_on_by_itself_when_netbox_was_away(
    site: TestClient, database: Database, supply: AddressSupply, stand_in: NetBoxStandIn
) -> None:
    _lost(stand_in, "GET", "before")
    stopping = threading.Event()
    thread = threading.Thread(target=supply.run, args=(stopping, 0.05))
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while len(rows(database)) < 3:
            assert time.monotonic() < deadline, "nothing was acquired"
            time.sleep(0.05)
    finally:
        stopping.set()
        thread.join()


def test_settings_that_name_netbox_make_a_supply(
    settings: Settings, database: Database, stand_in: NetBoxStandIn, tmp_path: Any
) -> None:
    token = tmp_path / "netbox.token"
    token.write_text(f"{TOKEN}\n")
    named = settings.model_copy(update={"netbox_url": stand_in.url, "netbox_token_path": token})
    made = make_services(named, database).supply
    assert made is not None
    made.check(AT_NETBOX, ip_address("10.9.0.1"))
    assert make_services(settings, database).supply is None
    with pytest.raises(PpecError) as caught:
        make_services(named.model_copy(update={"netbox_token_path": tmp_path / "none"}), database)
    assert "netbox_token_path" in caught.value.message


def test_what_is_on_its_way_back_is_not_listed(site: TestClient, database: Database, supply: AddressSupply) -> None:
    supply.settle()
    with database.write() as conn:
        external_addresses.begin_return(conn, 3, 1, NOW)
    for free, there in (("true", ["10.9.0.3"]), ("false", [])):
        listed = site.get(f"/v1/addresses?prefix_id=3&free={free}").json()["items"]
        assert [one["address"] for one in listed] == there
    assert site.get("/v1/prefixes/3").json()["addresses_free"] == 1
