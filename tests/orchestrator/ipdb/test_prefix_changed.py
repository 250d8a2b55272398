# SPDX-License-Identifier: Apache-2.0
"""A prefix's gateway, first and last are changed: its addresses follow, and nobody's is taken away."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from typing import Any

import pytest
from fastapi.testclient import TestClient
from ipdb_site import NOW, counts, fixed, granted, hold, make_vm, refused, released
from sqlalchemy import select

from ppec_contract.api_ipdb import PrefixUpdate
from ppec_contract.errors import PpecError
from ppec_orchestrator.ipdb.ranges import to_hex
from ppec_orchestrator.store import ipdb, tables
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.faults import TransactionLostError
from ppec_orchestrator.store.fixed_addresses import take_fixed
from ppec_orchestrator.store.prefix_changes import change_prefix
from ppec_orchestrator.store.serving import prefixes_serving


def changed(client: TestClient, prefix_id: int = 1, status: int = 200, **body: Any) -> Any:
    response = client.patch(f"/v1/prefixes/{prefix_id}", json=body)
    assert response.status_code == status, response.text
    return response.json()


def free(client: TestClient, prefix_id: int = 1) -> list[tuple[str, str]]:
    return [(run["first"], run["last"]) for run in client.get(f"/v1/prefixes/{prefix_id}/free").json()["runs"]]


def rows(database: Database, prefix_id: int = 1) -> list[str]:
    mine = select(tables.address.c.address_hex).where(tables.address.c.prefix_id == prefix_id)
    with database.read() as conn:
        return list(conn.execute(mine.order_by(tables.address.c.address_hex)).scalars())


def test_addresses_are_removed_and_added(ipv4_site: TestClient, database: Database, host_id: int) -> None:
    view = changed(ipv4_site, first="10.0.0.10", last="10.0.0.12")
    assert (view["first"], view["last"], view["addresses_total"]) == ("10.0.0.10", "10.0.0.12", 3)
    assert len(rows(database)) == 3
    assert granted(database, host_id, [make_vm(database, "a")])[0][0] == "10.0.0.10"
    # As it was made: from the network's first to its last, without the gateway.
    view = changed(ipv4_site, first=None, last=None)
    assert (view["first"], view["last"]) == ("10.0.0.1", "10.0.0.30")
    assert counts(ipv4_site)["free"] == 28
    assert free(ipv4_site) == [("10.0.0.2", "10.0.0.9"), ("10.0.0.11", "10.0.0.30")]
    assert len(rows(database)) == 29


def test_the_gateway_changes_places_with_an_address(ipv4_site: TestClient, database: Database, host_id: int) -> None:
    """A hold that spans the old one has it from then on."""
    hold(ipv4_site, kind="excluded", first="10.0.0.1", last="10.0.0.3")
    assert changed(ipv4_site, gateway="10.0.0.30")["gateway"] == "10.0.0.30"
    assert free(ipv4_site) == [("10.0.0.1", "10.0.0.1"), ("10.0.0.4", "10.0.0.29")]
    changed(ipv4_site, gateway="10.0.0.1")
    spanning = hold(ipv4_site, kind="excluded", first="10.0.0.5", last="10.0.0.7")["hold_id"]
    changed(ipv4_site, gateway="10.0.0.30")
    assert ipv4_site.delete(f"/v1/prefixes/1/holds/{spanning}").status_code == 204
    changed(ipv4_site, gateway="10.0.0.6")
    hold(ipv4_site, kind="reserved", first="10.0.0.5", last="10.0.0.7")
    assert changed(ipv4_site, gateway=None)["gateway"] is None
    error = refused(database, host_id, make_vm(database, "a"), fixed("10.0.0.6"))
    assert error.code == "address.reserved"
    assert counts(ipv4_site)["reserved"] == 3
    assert free(ipv4_site) == [("10.0.0.1", "10.0.0.1"), ("10.0.0.4", "10.0.0.4"), ("10.0.0.8", "10.0.0.30")]


@pytest.mark.parametrize(("prefix_id", "base"), [(1, "10.0.0."), (2, "fd00::")])
def test_nobody_s_address_is_taken_away(
    ipv4_site: TestClient, database: Database, host_id: int, prefix_id: int, base: str
) -> None:
    using, gone = make_vm(database, "a"), make_vm(database, "b")
    granted(database, host_id, [using], fixed(f"{base}4"))
    granted(database, host_id, [gone], fixed(f"{base}6"))
    released(database, gone)
    hold(ipv4_site, prefix_id, kind="reserved", first=f"{base}8")
    before = ipv4_site.get(f"/v1/prefixes/{prefix_id}").json()
    has_it = "VMs have 1 of these addresses (a)"
    rests = "1 address rests until 2026-11-20 12:05:00Z"
    held = f"1 hold keeps back some of these addresses (reserved {base}8)"
    for body, words in (
        ({"first": f"{base}5"}, has_it),
        ({"gateway": f"{base}4"}, f"would no longer give out {base}4: {has_it}"),
        ({"gateway": f"{base}6"}, rests),
        ({"gateway": f"{base}8"}, held),
        ({"last": f"{base}7"}, held),
        ({"last": f"{base}3"}, f"{has_it}, and {rests}, and {held}"),
    ):
        problem = changed(ipv4_site, prefix_id, 409, **body)
        assert problem["code"] == "resource.in_use"
        assert words in problem["detail"]
    assert ipv4_site.get(f"/v1/prefixes/{prefix_id}").json() == before
    assert changed(ipv4_site, prefix_id, first=f"{base}4", last=f"{base}8")["addresses_total"] == 5


def test_ipv6_goes_on_counting_within_what_is_left(ipv4_site: TestClient, database: Database, host_id: int) -> None:
    granted(database, host_id, [make_vm(database, name) for name in ("a", "b", "c")])
    changed(ipv4_site, 2, last="fd00::5")
    assert granted(database, host_id, [make_vm(database, "d")])[0][1] == "fd00::4"
    changed(ipv4_site, 2, last="fd00::4", gateway="fd00::ff")
    error = refused(database, host_id, make_vm(database, "e"), fixed("fd00::5"))
    assert error.code == "address.not_usable"
    changed(ipv4_site, 2, last=None)
    assert granted(database, host_id, [make_vm(database, "f")])[0][1] == "fd00::5"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"gateway": "10.0.1.1"}, "gateway 10.0.1.1 is not in it"),
        ({"gateway": "10.0.0.31"}, "gateway 10.0.0.31 is its broadcast address"),
        ({"gateway": "10.0.0.0"}, "gateway 10.0.0.0 is its network address"),
        ({"first": "10.0.0.9", "last": "10.0.0.8"}, "no address lies between first and last"),
        ({"first": "10.0.0.1", "last": "10.0.0.1"}, "its only address is the gateway"),
        ({"last": "fd00::1"}, "last fd00::1 is not in it"),
        ({"nameservers": ["0.0.0.0"]}, "name server 0.0.0.0 is unspecified"),
    ],
)
def test_what_can_t_be_is_refused(ipv4_site: TestClient, body: dict[str, Any], words: str) -> None:
    problem = changed(ipv4_site, status=422, **body)
    assert (problem["code"], words in problem["detail"]) == ("prefix.invalid", True), problem
    assert len(free(ipv4_site)) == 1


def test_netbox_would_have_to_be_asked(site: TestClient) -> None:
    problem = changed(site, 3, 422, gateway="10.9.0.5")
    assert "NetBox keeps its addresses" in problem["detail"]
    assert changed(site, 3, gateway="10.9.0.1", vlan=9)["vlan"] == 9


def test_a_grant_by_number_that_read_the_prefix_before_is_refused(
    ipv4_site: TestClient, database: Database, host_id: int
) -> None:
    vm = make_vm(database, "a")
    with database.read() as conn:
        serving = prefixes_serving(conn, [host_id])[host_id]
    for prefix_id, address in ((1, "10.0.0.8"), (2, "fd00::8")):
        changed(ipv4_site, prefix_id, last=str(ip_address(address) - 1))
        with pytest.raises(PpecError) as caught, database.write() as conn:
            take_fixed(conn, serving, vm, fixed(address), 0, now=NOW)
        assert caught.value.code == "address.not_usable"


def test_grants_and_changes_at_once_leave_no_address_outside(
    ipv4_site: TestClient, database: Database, host_id: int, open_database: Callable[[], Database]
) -> None:
    """One makes both prefixes smaller and larger again, others take and give back addresses meanwhile."""
    for prefix_id in (1, 2):
        changed(ipv4_site, prefix_id, quarantine_s=0, last="10.0.0.8" if prefix_id == 1 else "fd00::8")
    databases = [database, open_database()]

    def take(number: int) -> None:
        vm = uuid.uuid4()
        for leave in (False, True) * 4:
            try:
                with databases[number % 2].write() as conn:
                    ipdb.release(conn, [vm]) if leave else ipdb.grant(conn, {vm: host_id})
            except (PpecError, TransactionLostError):
                continue
        with database.write() as conn:
            ipdb.release(conn, [vm])

    def resize(number: int) -> None:
        for prefix_id, base in ((1, "10.0.0."), (2, "fd00::")) * 4:
            for last in ("3", "8"):
                try:
                    with databases[number % 2].write() as conn:
                        change_prefix(conn, prefix_id, PrefixUpdate(last=ip_address(base + last)), NOW)
                except (PpecError, TransactionLostError):
                    continue
                assert outside() == []

    def outside() -> list[str]:
        query = select(tables.address.c.address_hex, tables.prefix.c.first, tables.prefix.c.last)
        with database.read() as conn:
            found = conn.execute(query.join(tables.prefix)).all()
        edges = {row: tuple(to_hex(int(ip_address(text))) for text in (row.first, row.last)) for row in found}
        return [row.address_hex for row, (low, high) in edges.items() if not low <= row.address_hex <= high]

    with ThreadPoolExecutor(6) as pool:
        done = [pool.submit(resize, 1), *(pool.submit(take, number) for number in range(5))]
        for one in done:
            one.result()
    for prefix_id, base in ((1, "10.0.0."), (2, "fd00::")):
        changed(ipv4_site, prefix_id, last=f"{base}8")
        assert counts(ipv4_site, prefix_id)["used"] == 0
    assert len(rows(database)) == 7
