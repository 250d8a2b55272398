# SPDX-License-Identifier: Apache-2.0
"""Reserved and excluded addresses, quarantine, and where addresses are: over the API and in the store."""

from __future__ import annotations

import uuid
from datetime import timedelta
from ipaddress import ip_network
from typing import Any

import pytest
from fastapi.testclient import TestClient
from ipdb_site import NOW, counts, fixed, granted, hold, make_vm, refused, released
from sqlalchemy import update

from ppec_contract.api_ipdb import NetworkWanted
from ppec_orchestrator.store import ipdb, tables
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.utilisation import free_counts
from ppec_orchestrator.store.vms import forget


def test_what_is_held_back_is_not_given_out(ipv4_site: TestClient, database: Database, host_id: int) -> None:
    hold(ipv4_site, kind="excluded", first="10.0.0.2", last="10.0.0.4", note="switches")
    hold(ipv4_site, kind="reserved", first="10.0.0.5")
    hold(ipv4_site, 2, kind="excluded", first="fd00::1", last="fd00::2")
    assert granted(database, host_id, [make_vm(database, "a")]) == [["10.0.0.6", "fd00::3"]]
    assert counts(ipv4_site) == {
        "total": 26, "free": 24, "used": 1, "reserved": 1, "quarantined": 0, "excluded": 3,
    }  # fmt: skip
    assert counts(ipv4_site, 2) == {
        "total": 6, "free": 5, "used": 1, "reserved": 0, "quarantined": 0, "excluded": 2,
    }  # fmt: skip
    with database.read() as conn:
        assert free_counts(conn, NOW) == {1: 24, 2: 5}
    listed = ipv4_site.get("/v1/addresses?prefix_id=1").json()["items"]
    assert [(one["address"], one["state"]) for one in listed] == [
        *((f"10.0.0.{n}", "excluded") for n in (2, 3, 4)),
        ("10.0.0.5", "reserved"),
        ("10.0.0.6", "used"),
    ]


def test_the_last_one_that_is_not_held_back_is_found(ipv4_site: TestClient, database: Database, host_id: int) -> None:
    """Of six left in the middle of the IPv6 range, wherever counting stands."""
    hold(ipv4_site, 2, kind="reserved", first="fd00::3", last="fd00::4")
    vms = [make_vm(database, f"v{n}") for n in range(6)]
    got = [granted(database, host_id, [vm])[0][1] for vm in vms]
    assert got == ["fd00::1", "fd00::2", "fd00::5", "fd00::6", "fd00::7", "fd00::8"]
    error = refused(database, host_id, make_vm(database, "late"), NetworkWanted(prefix=ip_network("fd00::/64")))
    assert error.code == "address.exhausted"
    assert error.details["prefixes"] == [
        {"prefix": "fd00::/64", "free": 0, "total": 8, "quarantined": 0, "reserved": 2}
    ]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"kind": "reserved", "first": "10.0.0.1"}, 422, "prefix.invalid"),
        ({"kind": "reserved", "first": "10.0.0.9", "last": "10.0.0.8"}, 422, "prefix.invalid"),
        ({"kind": "reserved", "first": "10.0.0.30", "last": "10.0.0.32"}, 422, "prefix.invalid"),
        ({"kind": "reserved", "first": "10.0.0.0", "last": "10.0.0.1"}, 422, "prefix.invalid"),
        ({"kind": "reserved", "first": "fd00::1"}, 422, "prefix.invalid"),
        ({"kind": "excluded", "first": "10.0.0.9", "reserved_for": "a"}, 422, "request.invalid"),
        ({"kind": "lost", "first": "10.0.0.9"}, 422, "request.invalid"),
        ({"kind": "excluded", "first": "10.0.0.20", "last": "10.0.0.25"}, 409, "hold.overlaps"),
        ({"kind": "excluded", "first": "10.0.0.2", "last": "10.0.0.9"}, 409, "address.in_use"),
    ],
)
def test_a_hold_that_can_t_be_is_refused_and_changes_nothing(
    ipv4_site: TestClient, database: Database, host_id: int, body: dict[str, Any], status: int, code: str
) -> None:
    granted(database, host_id, [make_vm(database, "a")])
    hold(ipv4_site, kind="reserved", first="10.0.0.25", last="10.0.0.26")
    before = counts(ipv4_site)
    assert hold(ipv4_site, status=status, **body)["code"] == code
    assert counts(ipv4_site) == before
    assert len(ipv4_site.get("/v1/prefixes/1/holds").json()["items"]) == 1


@pytest.mark.parametrize(
    ("prefix_id", "address", "role"),
    [
        (1, "10.0.0.1", "its gateway"),
        (1, "10.0.0.0", "its network address"),
        (1, "10.0.0.31", "its broadcast address"),
        (2, "fd00::", "its subnet-router anycast address"),
        (2, "fd00::9", "not one of the addresses fd00::1 to fd00::8 that it gives out"),
        (1, "192.0.2.1", "not one of the addresses 10.0.0.1 to 10.0.0.30 that it gives out"),
    ],
)
def test_what_is_never_given_out_says_what_it_is(
    ipv4_site: TestClient, host_id: int, prefix_id: int, address: str, role: str
) -> None:
    problem = hold(ipv4_site, prefix_id, status=422, kind="reserved", first=address)
    assert problem["detail"].endswith(f": {address} is {role}")


@pytest.mark.parametrize(
    ("prefix_id", "wanted", "held"),
    [
        (1, ("10.0.0.0", "10.0.0.5"), ("10.0.0.2", "10.0.0.5")),
        (1, ("10.0.0.1", "10.0.0.2"), ("10.0.0.2", "10.0.0.2")),
        (1, ("10.0.0.29", "10.0.0.31"), ("10.0.0.29", "10.0.0.30")),
        (2, ("fd00::", "fd00::ffff"), ("fd00::1", "fd00::8")),
    ],
)
def test_of_a_hold_s_ends_what_is_given_out_is_held_back(
    ipv4_site: TestClient, host_id: int, prefix_id: int, wanted: tuple[str, str], held: tuple[str, str]
) -> None:
    """It may span the gateway, so it may begin or end there; and an import of it can be repeated."""
    first, last = wanted
    made = hold(ipv4_site, prefix_id, kind="excluded", first=first, last=last)
    assert (made["first"], made["last"]) == held
    document = ipv4_site.get("/v1/ipdb/export").json()
    document["prefixes"][prefix_id - 1]["holds"] = [{"kind": "excluded", "first": first, "last": last}]
    imported = ipv4_site.post("/v1/ipdb/import", json={"document": document})
    assert imported.json()["unchanged"]["holds"] == 1, imported.text


def test_reserving_what_a_vm_has_leaves_it_and_keeps_it_afterwards(
    ipv4_site: TestClient, database: Database, host_id: int
) -> None:
    vm = make_vm(database, "a")
    granted(database, host_id, [vm])
    made = hold(ipv4_site, kind="reserved", first="10.0.0.2", last="10.0.0.3", reserved_for="db")
    assert (counts(ipv4_site)["used"], counts(ipv4_site)["reserved"]) == (1, 1)
    released(database, vm)
    assert (counts(ipv4_site)["used"], counts(ipv4_site)["reserved"], counts(ipv4_site)["quarantined"]) == (0, 2, 0)
    assert granted(database, host_id, [make_vm(database, "b")], after_s=9999)[0][0] == "10.0.0.4"
    assert ipv4_site.delete(f"/v1/prefixes/1/holds/{made['hold_id']}").status_code == 204
    assert ipv4_site.delete(f"/v1/prefixes/1/holds/{made['hold_id']}").json()["code"] == "hold.not_found"
    assert granted(database, host_id, [make_vm(database, "c")], after_s=9999)[0][0] == "10.0.0.2"


@pytest.mark.parametrize(("address", "prefix_id"), [("10.0.0.9", 1), ("fd00::5", 2)])
def test_a_reserved_address_goes_to_the_vm_of_that_name_alone(
    ipv4_site: TestClient, database: Database, host_id: int, address: str, prefix_id: int
) -> None:
    hold(ipv4_site, prefix_id, kind="reserved", first=address, reserved_for="db", note="the old database")
    error = refused(database, host_id, make_vm(database, "a"), fixed(address))
    assert (error.code, error.details["reserved_for"], error.details["by"]) == ("address.reserved", "db", "test-admin")
    assert "the old database" in error.message
    vm = make_vm(database, "db")
    assert granted(database, host_id, [vm], fixed(address)) == [[address]]
    assert counts(ipv4_site, prefix_id)["reserved"] == 0
    released(database, vm)
    assert counts(ipv4_site, prefix_id)["reserved"] == 1
    error = refused(database, host_id, make_vm(database, "b"), fixed(address), after_s=9999)
    assert error.code == "address.reserved"


@pytest.mark.parametrize(("address", "prefix_id"), [("10.0.0.9", 1), ("fd00::5", 2)])
def test_a_vm_that_is_built_anew_gets_its_reserved_address_at_once(
    ipv4_site: TestClient, database: Database, host_id: int, address: str, prefix_id: int
) -> None:
    """Unless another one had it meanwhile: the packets that still come would be that one's."""
    other, first, second, third = (make_vm(database, name) for name in ("web", "db", "db-2", "db-3"))
    granted(database, host_id, [other], fixed(address))
    hold(ipv4_site, prefix_id, kind="reserved", first=address, reserved_for="db")
    released(database, other)
    listed = ipv4_site.get(f"/v1/addresses?prefix_id={prefix_id}").json()["items"]
    assert [(one["state"], one["until"]) for one in listed] == [("reserved", "2026-11-20T12:05:00Z")]
    error = refused(database, host_id, first, fixed(address), after_s=299)
    assert (error.code, error.details["vm"]) == ("address.quarantined", "web")
    assert granted(database, host_id, [first], fixed(address), after_s=300) == [[address]]
    released(database, first, after_s=310)
    with database.write() as conn:
        forget(conn, [first])
        conn.execute(update(tables.vm).where(tables.vm.c.id == second).values(name="db"))
    assert refused(database, host_id, third, fixed(address), after_s=320).code == "address.reserved"
    assert granted(database, host_id, [second], fixed(address), after_s=320) == [[address]]


@pytest.mark.parametrize("address", ["10.0.0.2", "fd00::1"])
def test_a_released_address_rests_before_others_get_it(
    ipv4_site: TestClient, database: Database, host_id: int, address: str
) -> None:
    first, second, third, again = (make_vm(database, name) for name in ("a", "b", "c", "d"))
    assert granted(database, host_id, [first], fixed(address)) == [[address]]
    released(database, first)
    family = 0 if "." in address else 1
    assert counts(ipv4_site, family + 1)["quarantined"] == 1
    assert granted(database, host_id, [second], after_s=299)[0][family] != address
    error = refused(database, host_id, third, fixed(address), after_s=299)
    assert (error.code, error.details["vm"]) == ("address.quarantined", "a")
    assert error.details["until"] == (NOW + timedelta(seconds=300)).isoformat()
    # Nobody else had it meanwhile: it is still that VM's, which may be planned anew.
    assert granted(database, host_id, [first], fixed(address), after_s=10) == [[address]]
    released(database, first, after_s=20)
    assert granted(database, host_id, [again], fixed(address), after_s=320) == [[address]]


def test_running_out_for_a_while_says_until_when(ipv4_site: TestClient, database: Database, host_id: int) -> None:
    vms = [make_vm(database, f"v{n}") for n in range(29)]
    only = NetworkWanted(prefix=ip_network("10.0.0.0/27"))
    granted(database, host_id, vms, only)
    released(database, *vms[:4])
    error = refused(database, host_id, make_vm(database, "late"), only, after_s=60)
    assert error.code == "address.exhausted"
    counted = {"prefix": "10.0.0.0/27", "free": 0, "total": 29, "quarantined": 4, "reserved": 0}
    assert error.details == {"wanted": 1, "missing": 1, "family": 4, "prefixes": [counted]}
    assert error.hint == "The next one leaves quarantine at 12:05:00Z."
    late = [make_vm(database, f"w{n}") for n in range(4)]
    assert granted(database, host_id, late, only, after_s=300) == [[f"10.0.0.{n}"] for n in (2, 3, 4, 5)]


def test_quarantine_is_a_prefix_s_own_and_may_change(ipv4_site: TestClient, database: Database, host_id: int) -> None:
    changed = ipv4_site.patch("/v1/prefixes/1", json={"quarantine_s": 0, "vlan": 9, "nameservers": ["10.0.0.1"]})
    assert (changed.json()["quarantine_s"], changed.json()["vlan"]) == (0, 9)
    assert ipv4_site.patch("/v1/prefixes/1", json={"vlan": None}).json()["vlan"] is None
    assert ipv4_site.patch("/v1/prefixes/1", json={"quarantine_s": -1}).status_code == 422
    assert ipv4_site.patch("/v1/prefixes/9", json={"vlan": 1}).json()["code"] == "prefix.not_found"
    vm = make_vm(database, "a")
    granted(database, host_id, [vm])
    assert released(database, vm) == 2
    assert (counts(ipv4_site)["quarantined"], counts(ipv4_site, 2)["quarantined"]) == (0, 1)
    listed = ipv4_site.get("/v1/addresses?prefix_id=2").json()["items"]
    assert [(one["state"], one["until"]) for one in listed] == [("quarantined", "2026-11-20T12:05:00Z")]
    assert granted(database, host_id, [make_vm(database, "b")]) == [["10.0.0.2", "fd00::2"]]


def test_what_may_be_left_of_a_vm_keeps_its_addresses(ipv4_site: TestClient, database: Database, host_id: int) -> None:
    vm, holder = make_vm(database, "a"), uuid.uuid4()
    granted(database, host_id, [vm], fixed("10.0.0.9"))
    with database.write() as conn:
        ipdb.keep(conn, vm, holder, now=NOW)
    assert released(database, vm) == 0
    assert [one["state"] for one in ipv4_site.get("/v1/addresses").json()["items"]] == ["kept"]
    error = refused(database, host_id, vm, fixed("10.0.0.9"))
    assert (error.code, error.details["by"]) == ("address.in_use", "what may be left of VM a on a host")
    assert released(database, holder) == 1
    events = ipv4_site.get("/v1/addresses/events").json()["items"]
    assert [(one["action"], one["vm"]) for one in events] == [("released", "a"), ("kept", "a"), ("granted", "a")]


def test_free_space_is_shown_as_runs_and_as_networks(ipv4_site: TestClient, database: Database, host_id: int) -> None:
    hold(ipv4_site, kind="reserved", first="10.0.0.8", last="10.0.0.9")
    vms = [make_vm(database, name) for name in ("a", "b")]
    granted(database, host_id, vms)
    released(database, vms[0])
    free = ipv4_site.get("/v1/prefixes/1/free").json()
    assert free["runs"] == [
        {"first": "10.0.0.4", "last": "10.0.0.7", "count": 4},
        {"first": "10.0.0.10", "last": "10.0.0.30", "count": 21},
    ]
    assert free["networks"] == [
        "10.0.0.16/29", "10.0.0.4/30", "10.0.0.12/30", "10.0.0.24/30", "10.0.0.10/31", "10.0.0.28/31", "10.0.0.30/32",
    ]  # fmt: skip
    assert (free["addresses_free"], free["more"]) == (25, False)
    six = ipv4_site.get("/v1/prefixes/2/free").json()
    assert six["runs"] == [{"first": "fd00::3", "last": "fd00::8", "count": 6}]
    assert ipv4_site.get("/v1/prefixes/9/free").json()["code"] == "prefix.not_found"


def test_where_another_prefix_would_fit(ipv4_site: TestClient) -> None:
    found = ipv4_site.get("/v1/vrfs/red/free?within=10.0.0.0/25").json()
    assert found["networks"] == ["10.0.0.32/27", "10.0.0.64/26"]
    assert ipv4_site.get("/v1/vrfs/red/free?within=10.0.0.0/27").json()["networks"] == []
    assert ipv4_site.get("/v1/vrfs/red/free?within=fd00::/16").json()["networks"] == ["fd00::/16"]
    assert ipv4_site.get("/v1/vrfs/blue/free?within=10.0.0.0/8").json()["code"] == "vrf.not_found"
    assert ipv4_site.get("/v1/vrfs/red/free?within=10").status_code == 422


def test_the_history_says_who_had_an_address_and_who_held_it_back(
    ipv4_site: TestClient, database: Database, host_id: int
) -> None:
    vms = [make_vm(database, name) for name in ("a", "b")]
    granted(database, host_id, [vms[0]])
    released(database, vms[0], after_s=5)
    made = hold(ipv4_site, kind="reserved", first="10.0.0.2", last="10.0.0.8", note="soon")
    granted(database, host_id, [vms[1]], after_s=9)
    ipv4_site.delete(f"/v1/prefixes/1/holds/{made['hold_id']}")
    of_one = ipv4_site.get("/v1/addresses/events?address=10.0.0.2").json()["items"]
    assert [(one["action"], one["vm"], one["operation_id"], one["caller"]) for one in of_one] == [
        ("opened", None, None, "test-admin"),
        ("reserved", None, None, "test-admin"),
        ("released", "a", "op-a", None),
        ("granted", "a", "op-a", None),
    ]
    between = ipv4_site.get("/v1/addresses/events?address=10.0.0.5").json()["items"]
    assert [(one["action"], one["last"], one["note"]) for one in between] == [
        ("opened", "10.0.0.8", "soon"), ("reserved", "10.0.0.8", "soon"),
    ]  # fmt: skip
    first = ipv4_site.get("/v1/addresses/events?limit=5").json()
    rest = ipv4_site.get(f"/v1/addresses/events?limit=5&cursor={first['next_cursor']}").json()
    ids = [one["event_id"] for one in (*first["items"], *rest["items"])]
    assert ids == sorted(ids, reverse=True)
    assert len(ids) == 8
    assert {one["vm"] for one in ipv4_site.get("/v1/addresses/events?vm=b").json()["items"]} == {"b"}
    assert len(ipv4_site.get("/v1/addresses/events?action=granted&vrf=red").json()["items"]) == 4
    assert ipv4_site.get("/v1/addresses/events?address=x").status_code == 422


def test_what_a_prefix_was_is_told_after_it_is_gone(ipv4_site: TestClient, database: Database, host_id: int) -> None:
    vm = make_vm(database, "a")
    granted(database, host_id, [vm])
    released(database, vm)
    assert ipv4_site.delete("/v1/prefixes/1?force=true").status_code == 204
    events = ipv4_site.get("/v1/addresses/events?address=10.0.0.2").json()["items"]
    assert [one["prefix"] for one in events] == ["10.0.0.0/27", "10.0.0.0/27"]
