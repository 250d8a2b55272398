# SPDX-License-Identifier: Apache-2.0
"""What people and other processes do to our records in NetBox: nobody's record is written to that is not ours."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from datetime import timedelta
from ipaddress import ip_address
from typing import Any
from uuid import UUID

import pytest
from fastapi.testclient import TestClient
from ipdb_site import NOW, counts, fixed, granted, make_vm, post, released
from netbox_site import AT_NETBOX, MARK, ONE_OF_IT, PREFIX, in_step, rows
from netbox_stand_in import TOKEN, NetBoxStandIn, RefusedError
from structlog.testing import capture_logs

from ppec_contract.errors import PpecError
from ppec_orchestrator.address_supply import AddressSupply
from ppec_orchestrator.ipdb.provider import Acquired, SourcePrefix
from ppec_orchestrator.netbox import NetBox
from ppec_orchestrator.store import external_addresses
from ppec_orchestrator.store.database import Database

THEIRS = {"description": "printer of Bob", "dns_name": "printer"}


def _take_over(stand_in: NetBoxStandIn, address: str) -> dict[str, Any]:
    """Somebody rewrites our record. Returns how it has to stay."""
    (record,) = (one for one in stand_in.addresses.values() if one["address"] == address)
    record.update(THEIRS)
    return dict(record)


def _after(supply: AddressSupply, seconds: float) -> AddressSupply:
    return AddressSupply(
        supply._database, supply._source, standing=supply._standing, now=lambda: NOW + timedelta(seconds=seconds)
    )


def _granted_all(database: Database, host_id: int) -> list[str]:
    """Everything that is to be had, one VM after another."""
    got: list[str] = []
    while True:
        try:
            (addresses,) = granted(database, host_id, [make_vm(database, uuid.uuid4().hex)], ONE_OF_IT, after_s=999)
        except PpecError:
            return got
        got += addresses


def test_a_free_record_that_somebody_takes_over_is_lost(
    site: TestClient, database: Database, host_id: int, supply: AddressSupply, stand_in: NetBoxStandIn
) -> None:
    supply.settle()
    theirs = _take_over(stand_in, "10.9.0.3/28")
    assert supply.settle() == []
    assert stand_in.addresses[theirs["id"]] == theirs
    assert in_step(database, stand_in)
    assert "10.9.0.3" not in _granted_all(database, host_id)


def test_a_record_that_somebody_takes_over_is_never_written_to(
    site: TestClient, database: Database, host_id: int, supply: AddressSupply, stand_in: NetBoxStandIn
) -> None:
    """While a VM has its address, while that rests, and afterwards."""
    supply.settle()
    vm = make_vm(database, "web")
    assert granted(database, host_id, [vm], ONE_OF_IT) == [["10.9.0.3"]]
    supply.settle()
    theirs = _take_over(stand_in, "10.9.0.3/28")
    with capture_logs() as logs:
        assert supply.settle() == []
    assert "addresses.taken_by_others" in {one["event"] for one in logs}
    released(database, vm)
    with capture_logs() as logs:
        assert supply.settle() == []
    assert "addresses.lost" in {one["event"] for one in logs}
    assert stand_in.addresses[theirs["id"]] == theirs
    # Between the end of its rest and the next look it is not granted either.
    assert "10.9.0.3" not in _granted_all(database, host_id)
    assert _after(supply, 61).settle() == []
    assert stand_in.addresses[theirs["id"]] == theirs
    assert in_step(database, stand_in)
    assert "10.9.0.3" not in _granted_all(database, host_id)


@pytest.mark.parametrize("closing", [False, True])
def test_a_record_taken_over_within_a_round_is_not_written_to(
    site: TestClient, database: Database, host_id: int, supply: AddressSupply, stand_in: NetBoxStandIn, closing: bool
) -> None:
    """After the look at all that is ours, before it is told or given back."""
    supply.settle()
    if closing:
        with database.write() as conn:
            external_addresses.begin_return(conn, 3, 2, NOW)
        address = "10.9.0.5/28"
    else:
        granted(database, host_id, [make_vm(database, "web")], ONE_OF_IT)
        address = "10.9.0.3/28"
    theirs: list[dict[str, Any]] = []
    reconcile = supply._reconcile

    def look(prefix: SourcePrefix) -> None:
        reconcile(prefix)
        theirs.append(_take_over(stand_in, address))

    supply._reconcile = look  # type: ignore[method-assign]
    assert supply.settle() == []
    assert stand_in.addresses[theirs[0]["id"]] == theirs[0]


def test_a_prefix_with_a_record_that_somebody_took_over_is_deleted(
    site: TestClient, database: Database, host_id: int, supply: AddressSupply, stand_in: NetBoxStandIn
) -> None:
    supply.settle()
    vm = make_vm(database, "web")
    granted(database, host_id, [vm], ONE_OF_IT)
    theirs = _take_over(stand_in, "10.9.0.3/28")
    released(database, vm)
    supply.settle()
    assert site.delete("/v1/prefixes/3?force=true").status_code == 204
    assert stand_in.texts(MARK) == []
    assert stand_in.addresses[theirs["id"]] == theirs


def test_what_somebody_took_over_while_it_rests_counts_for_nothing(
    site: TestClient, database: Database, host_id: int, supply: AddressSupply, stand_in: NetBoxStandIn
) -> None:
    """It is in nobody's quarantine here: its last VM couldn't have it back either."""
    supply.settle()
    vms = [make_vm(database, f"v{n}") for n in range(3)]
    granted(database, host_id, vms, ONE_OF_IT)
    released(database, vms[0])
    _take_over(stand_in, "10.9.0.3/28")
    supply._reconcile(AT_NETBOX)
    assert [row.going_back for row in rows(database)] == [True, False, False]
    assert counts(site, 3) == {
        "total": 2, "used": 2, "free": 0, "quarantined": 0, "reserved": 0, "excluded": 0,
    }  # fmt: skip
    assert site.get("/v1/prefixes/3/free").json()["addresses_free"] == 0


def test_a_record_that_netbox_does_not_delete_holds_up_nobody(
    site: TestClient, database: Database, host_id: int, supply: AddressSupply, stand_in: NetBoxStandIn
) -> None:
    supply.prepare([fixed(f"10.9.0.{n}") for n in range(5, 14)], "red")
    stubborn = next(row.external_id for row in rows(database) if row.address_hex.endswith("0c"))
    stand_in.protected = {stubborn}
    granted(database, host_id, [make_vm(database, "web")], ONE_OF_IT)
    assert [fault.code for fault in supply.settle()] == ["netbox.refused"]
    assert [row.external_id for row in rows(database) if row.going_back] == [stubborn]
    assert len(rows(database)) == 8
    assert "web" in {one["dns_name"] for one in stand_in.addresses.values()}
    granted(database, host_id, [make_vm(database, f"v{n}") for n in range(5)], ONE_OF_IT)
    assert [fault.code for fault in supply.settle()] == ["netbox.refused"]
    assert site.get("/v1/prefixes/3").json()["addresses_free"] == 3
    stand_in.protected = set()
    assert supply.settle() == []
    assert in_step(database, stand_in)


def test_a_name_that_netbox_refuses_is_the_only_one_it_is_not_told(
    site: TestClient, database: Database, host_id: int, supply: AddressSupply, stand_in: NetBoxStandIn
) -> None:
    supply.settle()
    granted(database, host_id, [make_vm(database, name) for name in ("a", "bad", "c")], ONE_OF_IT)
    bulk = stand_in._bulk

    def validating(method: str, query: Any, body: Any) -> Any:
        if method == "PATCH" and any(one["dns_name"] == "bad" for one in body):
            raise RefusedError(400, {"dns_name": ["a custom validator says no"]})
        return bulk(method, query, body)

    stand_in._bulk = validating  # type: ignore[method-assign]
    assert [fault.code for fault in supply.settle()] == ["netbox.refused"]
    assert {one["dns_name"] for one in stand_in.addresses.values()} == {"a", "c", ""}
    assert len(rows(database)) == 6


def test_an_address_by_number_that_somebody_enters_meanwhile_is_theirs(stand_in: NetBoxStandIn, netbox: NetBox) -> None:
    """Where NetBox allows duplicates: between our look and our request."""
    stand_in.unique_vrfs = False
    entered = threading.Event()

    def meanwhile(method: str, path: str) -> None:
        if method == "POST" and not entered.is_set():
            entered.set()
            stand_in.add_address("10.9.0.9/32", vrf=5, description="somebody's")

    stand_in.before = meanwhile
    with pytest.raises(PpecError) as caught:
        netbox.acquire_fixed(AT_NETBOX, ip_address("10.9.0.9"))
    assert caught.value.code == "address.in_use"
    assert stand_in.texts(MARK) == []
    assert stand_in.texts("somebody's") == ["10.9.0.9/32"]


@pytest.mark.usefixtures("site")
@pytest.mark.parametrize("rests", [False, True])
def test_what_one_process_enters_again_another_does_not_undo(
    stand_in: NetBoxStandIn,
    database: Database,
    open_database: Callable[[], Database],
    host_id: int,
    supply: AddressSupply,
    rests: bool,
) -> None:
    """The other one looks after NetBox has the new record, and before our row has its number."""
    supply.settle()
    vm = make_vm(database, "web")
    granted(database, host_id, [vm], ONE_OF_IT)
    if rests:
        released(database, vm)
    supply.settle()
    (before,) = (row for row in rows(database) if row.address_hex.endswith("03"))
    del stand_in.addresses[before.external_id]
    other = AddressSupply(open_database(), NetBox(stand_in.url, TOKEN, MARK), standing=3, now=lambda: NOW)
    entered: list[int] = []

    def after(method: str, path: str) -> None:
        if method == "POST" and not entered:
            entered.append(max(stand_in.addresses))
            other.settle()

    stand_in.after = after
    assert supply.settle() == []
    (mine,) = (row for row in rows(database) if row.address_hex.endswith("03"))
    assert (mine.id, mine.external_id, mine.going_back) == (before.id, entered[0], False)
    assert in_step(database, stand_in)
    assert len(stand_in.texts(MARK)) == len(set(stand_in.texts(MARK)))


def test_a_row_gets_its_new_number_from_whoever_is_faster(
    site: TestClient, database: Database, supply: AddressSupply
) -> None:
    supply.settle()
    row, another = rows(database)[:2]
    with database.write() as conn:
        for _ in range(2):
            assert external_addresses.renumber(conn, row.id, row.external_id, 7000)
        assert not external_addresses.renumber(conn, row.id, row.external_id, 7001)
        assert not external_addresses.renumber(conn, another.id, another.external_id, 7000)
        assert external_addresses.close_lost(conn, row.id)
        assert not external_addresses.renumber(conn, row.id, 7000, 7001)


@pytest.fixture
def overlapping(site: TestClient, supply: AddressSupply, stand_in: NetBoxStandIn) -> int:
    """A prefix of VRF blue that overlaps red's in one VRF of NetBox: both were registered at once."""
    post(site, "vrfs", {"name": "blue"})
    post(site, "hosts", {"name": "h2", "rack": "r1", "vrf": "blue", "address": "192.0.2.2"})
    stand_in.add_prefix(8, "10.9.0.0/27", vrf=6)
    body = PREFIX | {"vrf": "blue", "cidr": "10.9.0.0/27", "gateway": None, "netbox_id": 8, "first": "10.9.0.4"}
    made = int(post(site, "prefixes", body)["prefix_id"])
    stand_in.add_prefix(8, "10.9.0.0/27", vrf=5)
    return made


def test_an_address_of_two_overlapping_prefixes_is_that_of_one_vm(
    site: TestClient, overlapping: int, database: Database, host_id: int, supply: AddressSupply, stand_in: NetBoxStandIn
) -> None:
    for _ in range(2):
        with capture_logs() as logs:
            assert supply.settle() == []
    events = {one["event"] for one in logs}
    assert "addresses.of_another_prefix" in events
    # Not even those that the other one does not give out.
    assert "addresses.useless" not in events
    assert [len(rows(database, one)) for one in (3, overlapping)] == [3, 3]
    assert in_step(database, stand_in)
    red = granted(database, host_id, [make_vm(database, f"r{n}") for n in range(3)], ONE_OF_IT)
    blue = granted(database, _host(database, "h2"), [make_vm(database, f"b{n}") for n in range(3)])
    assert len({address for got in (*red, *blue) for address in got}) == 6


def _host(database: Database, name: str) -> int:
    with database.read() as conn:
        return int(conn.exec_driver_sql(f"SELECT id FROM host WHERE name = '{name}'").scalar_one())


def test_an_address_of_netbox_has_one_row_whoever_is_faster(
    site: TestClient, overlapping: int, database: Database
) -> None:
    same = [Acquired(5000 + n, ip_address(f"10.9.0.{n}")) for n in (6, 7)]
    with database.write() as conn:
        assert external_addresses.adopt(conn, AT_NETBOX, same[:1]).count == 1
        # What another transaction has inserted can't be seen before.
        there = {f"{int(one.address):032x}": one for one in same}
        assert len(external_addresses._insert_rows(conn, overlapping, there)) == 1
        found = external_addresses.adopt(conn, SourcePrefix(overlapping, 8, AT_NETBOX.network), same)
    assert (found.count, list(found.elsewhere)) == (0, same[:1])


@pytest.mark.parametrize("vms", [0, 1, 2])
def test_a_database_in_which_two_have_one_is_only_taken_over_if_no_two_vms_do(database: Database, vms: int) -> None:
    with database.write() as connection:
        run = connection.exec_driver_sql
        for index in ("ix_address_external", "ix_address_event_name", "ix_address_event_prefix"):
            run(f"DROP INDEX {index}")
        run("ALTER TABLE cluster DROP COLUMN n_plus_one")
        run("UPDATE alembic_version SET version_num = '0015'")
        for number in (1, 2):
            run(f"INSERT INTO vrf (id, name, description) VALUES ({number}, 'v{number}', '')")
            columns = "id, vrf_id, cidr, family, bridge, region, first, last, nameservers, netbox_id"
            values = f"{number}, {number}, '10.9.0.0/28', 4, 'br0', 'north', '10.9.0.1', '10.9.0.14', '[]', {number}"
            run(f"INSERT INTO prefix ({columns}) VALUES ({values})")
            # The second row is the first that a VM has.
            vm = f"'{UUID(int=number).hex}'" if number > 2 - vms else "NULL"
            columns = "id, prefix_id, address_hex, external_id, vm_id"
            run(f"INSERT INTO address ({columns}) VALUES ({number}, {number}, '{5:032x}', 7, {vm})")
    if vms == 2:
        with pytest.raises(PpecError) as caught:
            database.migrate()
        assert "NetBox's addresses 7 are each those of more than one VM" in caught.value.message
        return
    database.migrate()
    with database.read() as conn:
        assert list(conn.exec_driver_sql("SELECT id FROM address").scalars()) == [2 if vms else 1]
