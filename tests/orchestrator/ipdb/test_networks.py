# SPDX-License-Identifier: Apache-2.0
"""Several addresses per VM, addresses by number, and which prefixes serve whom."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from fastapi.testclient import TestClient
from ipdb_site import NOW, fixed, granted, hold, make_vm, post, refused, released
from pydantic import ValidationError
from sqlalchemy import event, select

from ppec_contract.api_ipdb import NetworkWanted
from ppec_contract.api_vms import VmsCreate
from ppec_contract.errors import PpecError
from ppec_orchestrator.operations.addresses_meant import addresses_meant
from ppec_orchestrator.store import ipdb, tables
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.places import Place
from ppec_orchestrator.store.serving import prefixes_serving
from ppec_orchestrator.store.wanted_networks import Requester, candidates

SECOND = {"vrf": "red", "cidr": "10.2.0.0/29", "gateway": "10.2.0.1", "bridge": "br1", "cluster": "c1"}


def test_a_vm_may_have_several_addresses(
    ipv4_site: TestClient,
    database: Database,
    host_id: int,
) -> None:
    post(ipv4_site, "prefixes", SECOND)
    vm = make_vm(database, "a")
    wanted = (NetworkWanted(prefix=ip_network("10.2.0.0/29")), NetworkWanted(), fixed("10.0.0.2"))
    assert granted(database, host_id, [vm], *wanted) == [["10.2.0.2", "10.0.0.3", "10.0.0.2", "fd00::1"]]
    with database.read() as conn:
        found = ipdb.addresses_of(conn, [vm])[vm]
    assert [(str(one.address.ip), one.position, one.bridge) for one in found] == [
        ("10.2.0.2", 0, "br1"),
        ("10.0.0.3", 1, "br0"),
        ("10.0.0.2", 2, "br0"),
        ("fd00::1", 1, "br0"),
    ]


def test_each_vm_of_a_grant_gets_what_it_asks_for_itself(
    ipv4_site: TestClient, database: Database, host_id: int
) -> None:
    """By number first, then of a named prefix, whatever the order they come in; one that says nothing gets any."""
    post(ipv4_site, "prefixes", SECOND)
    vms = {name: make_vm(database, name) for name in "abcd"}
    wanted = {
        vms["a"]: [NetworkWanted(prefix=ip_network("10.2.0.0/29"))],
        vms["b"]: [fixed("10.2.0.2"), fixed("fd00::7")],
        vms["d"]: [fixed("10.0.0.2")],
    }
    with database.write() as conn:
        ipdb.grant(conn, dict.fromkeys(vms.values(), host_id), wanted, now=lambda: NOW)
        got = ipdb.addresses_of(conn, list(vms.values()))
    assert {name: [str(one.address.ip) for one in got[vm]] for name, vm in vms.items()} == {
        "a": ["10.2.0.3"],
        "b": ["10.2.0.2", "fd00::7"],
        "c": ["10.0.0.3", "fd00::1"],
        "d": ["10.0.0.2"],
    }


def test_of_several_vms_the_refusal_names_whose_address_it_is(
    ipv4_site: TestClient, database: Database, host_id: int
) -> None:
    other, *vms = [make_vm(database, name) for name in ("other", "a", "b")]
    granted(database, host_id, [other], fixed("10.0.0.9"))
    wanted = dict(zip(vms, [[fixed("10.0.0.8")], [fixed("10.0.0.9")]], strict=True))
    with pytest.raises(PpecError) as caught, database.write() as conn:
        ipdb.grant(conn, dict.fromkeys(vms, host_id), wanted, now=lambda: NOW)
    assert caught.value.message == "vm b: address 10.0.0.9 of prefix 10.0.0.0/27 is in use by VM other"
    assert (caught.value.subject, caught.value.details["wanted_for"]) == ("address 10.0.0.9", "b")
    assert granted(database, host_id, vms[:1], fixed("10.0.0.8")) == [["10.0.0.8"]]


def test_a_thousand_addresses_by_number_cost_a_few_statements(
    ipv4_site: TestClient, database: Database, host_id: int
) -> None:
    """What they mean, and to grant them; one that is reserved for its VM among them."""
    prefix_id = post(ipv4_site, "prefixes", SECOND | {"cidr": "10.16.0.0/21", "gateway": None})["prefix_id"]
    numbers = [f"10.16.{number // 250}.{number % 250 + 1}" for number in range(1000)]
    hold(ipv4_site, prefix_id, kind="reserved", first=numbers[500], reserved_for="v500")
    items = [{"name": f"v{n}", "networks": [{"address": number}]} for n, number in enumerate(numbers)]
    asked = VmsCreate.model_validate({"image": "debian", "flavor": "small", "items": items})
    vms = [make_vm(database, item["name"]) for item in items]
    statements: list[str] = []
    with database.write() as conn:
        listens = event.listens_for(conn, "before_cursor_execute")
        listens(lambda _conn, _cursor, statement, *_: statements.append(statement))
        meant = addresses_meant(conn, asked, "x86_64", NOW, {})
        assert len(meant.counted) == 999
        wanted = {vm_id: asked.items[n].networks for n, vm_id in enumerate(vms)}
        ipdb.grant(conn, dict.fromkeys(vms, host_id), wanted, now=lambda: NOW)
        assert len(statements) < 25
        granted = ipdb.addresses_of(conn, vms)
    assert [[str(one.address.ip) for one in granted[vm_id]] for vm_id in vms] == [[number] for number in numbers]


def test_a_batch_with_several_addresses_each_gets_them_whole_or_not_at_all(
    ipv4_site: TestClient,
    database: Database,
    host_id: int,
) -> None:
    only = NetworkWanted(prefix=ip_network("10.0.0.0/27"))
    vms = [make_vm(database, f"v{n}") for n in range(15)]
    with pytest.raises(PpecError) as caught:
        granted(database, host_id, vms, only, only)
    assert caught.value.details["prefixes"][0]["free"] == 14
    got = granted(database, host_id, vms[:14], only, only)
    assert len({address for addresses in got for address in addresses}) == 28


@pytest.mark.parametrize(
    ("wanted", "code", "words"),
    [
        (fixed("10.0.0.2"), "address.in_use", "in use by VM a"),
        (fixed("fd00::1"), "address.in_use", "in use by VM a"),
        (fixed("10.0.0.1"), "address.not_usable", "the gateway of prefix 10.0.0.0/27"),
        (fixed("10.0.0.31"), "address.not_usable", "the broadcast address of prefix 10.0.0.0/27"),
        (fixed("fd00::9"), "address.not_usable", "gives out fd00::1 to fd00::8"),
        (fixed("192.0.2.7"), "address.not_usable", "in none of the prefixes"),
        (fixed("10.0.0.9", "10.0.0.0/28"), "address.not_usable", "in none of the prefixes"),
    ],
)
def test_an_address_that_can_t_be_had_is_refused_with_the_reason(
    ipv4_site: TestClient,
    database: Database,
    host_id: int,
    wanted: NetworkWanted,
    code: str,
    words: str,
) -> None:
    granted(database, host_id, [make_vm(database, "a")])
    late = make_vm(database, "late")
    error = refused(database, host_id, late, wanted)
    assert error.code == code
    assert words in error.message
    # Before a host is chosen it is refused in the same words.
    with pytest.raises(PpecError) as before, database.read() as conn:
        candidates(conn, [wanted], Requester(Place(), "late", NOW))
    assert (before.value.code, words in before.value.message) == (code, True)
    with database.read() as conn:
        assert ipdb.addresses_of(conn, [late]) == {}


def test_a_prefix_that_does_not_serve_the_host_gives_it_nothing(
    ipv4_site: TestClient,
    database: Database,
    host_id: int,
) -> None:
    post(ipv4_site, "clusters", {"name": "c2", "datacentre": "dc1"})
    post(ipv4_site, "prefixes", SECOND | {"cluster": "c2"})
    vm = make_vm(database, "a")
    assert refused(database, host_id, vm, fixed("10.2.0.2")).code == "address.not_usable"
    error = refused(database, host_id, vm, NetworkWanted(prefix=ip_network("10.2.0.0/29")))
    assert error.code == "prefix.not_serving"
    wanted = NetworkWanted(prefix=ip_network("10.3.0.0/29"))
    with pytest.raises(PpecError) as unknown, database.read() as conn:
        candidates(conn, [wanted], Requester(Place(vrf="red"), None, NOW))
    assert unknown.value.code == "prefix.not_found"


def test_the_same_address_of_two_vrfs_is_two_addresses(
    ipv4_site: TestClient,
    database: Database,
    host_id: int,
) -> None:
    post(ipv4_site, "vrfs", {"name": "blue"})
    blue = post(ipv4_site, "prefixes", SECOND | {"vrf": "blue", "cidr": "10.0.0.0/27", "gateway": "10.0.0.1"})
    post(ipv4_site, "hosts", {"name": "h2", "rack": "r1", "vrf": "blue", "address": "192.0.2.2"})
    with database.read() as conn:
        other = conn.execute(select(tables.host.c.id).where(tables.host.c.name == "h2")).scalar_one()
    first, second = make_vm(database, "a"), make_vm(database, "b")

    def givers(vrf: str | None) -> Any:
        with database.read() as conn:
            return candidates(conn, [fixed("10.0.0.7")], Requester(Place(vrf=vrf), "c", NOW))

    assert givers(None) == ((1, blue["prefix_id"]),)
    assert granted(database, host_id, [first], fixed("10.0.0.7")) == [["10.0.0.7"]]
    assert givers(None) == ((blue["prefix_id"],),)
    assert granted(database, other, [second], fixed("10.0.0.7")) == [["10.0.0.7"]]
    with pytest.raises(PpecError):
        givers(None)


@pytest.fixture
def shadowed(ipv4_site: TestClient, database: Database, host_id: int) -> TestClient:
    """The host's addresses once more as prefix 3, in a VRF that no host is in, all of them free. In the host's own, VM
    `a` has 10.0.0.2, `gone` had 10.0.0.3, 10.0.0.4 is reserved and 10.0.0.5 excluded."""
    granted(database, host_id, [make_vm(database, "a")], fixed("10.0.0.2"))
    gone = make_vm(database, "gone")
    granted(database, host_id, [gone], fixed("10.0.0.3"))
    released(database, gone)
    hold(ipv4_site, kind="reserved", first="10.0.0.4", reserved_for="db")
    hold(ipv4_site, kind="excluded", first="10.0.0.5")
    post(ipv4_site, "vrfs", {"name": "shadow"})
    shadow = {"vrf": "shadow", "cidr": "10.0.0.0/27", "gateway": "10.0.0.30", "bridge": "br0", "cluster": "c1"}
    assert post(ipv4_site, "prefixes", shadow)["prefix_id"] == 3
    return ipv4_site


def could_give(database: Database, address: str, place: Place) -> Any:
    """Which prefixes could, or the refusal's code and words."""
    with database.read() as conn:
        try:
            return candidates(conn, [fixed(address)], Requester(place, "late", NOW))[0]
        except PpecError as error:
            return error.code, error.message


REFUSALS = [
    ("10.0.0.1", "address.not_usable", "the gateway of prefix 10.0.0.0/27"),
    ("10.0.0.2", "address.in_use", "in use by VM a"),
    ("10.0.0.3", "address.quarantined", "was VM gone's and is in quarantine until 2026-11-20 12:05:00Z"),
    ("10.0.0.4", "address.reserved", "is reserved for VM db"),
    ("10.0.0.5", "address.reserved", "is excluded"),
]


@pytest.mark.parametrize(("address", "code", "words"), REFUSALS)
def test_a_prefix_that_serves_no_host_hides_no_refusal(
    shadowed: TestClient, database: Database, address: str, code: str, words: str
) -> None:
    for place in (Place(), Place(vrf="red"), Place(cluster="c1"), Place(host="h1")):
        told = could_give(database, address, place)
        assert told[0] == code
        assert words in told[1]
    # Where a host is served by it, it can be had there; who asks for the other one is told why.
    post(shadowed, "hosts", {"name": "h2", "rack": "r1", "vrf": "shadow", "address": "192.0.2.2"})
    assert could_give(database, address, Place()) == (3,)
    assert could_give(database, address, Place(host="h2")) == (3,)
    assert could_give(database, address, Place(host="h1"))[0] == code


def test_what_would_be_free_where_no_host_is_is_for_the_plan_to_count(shadowed: TestClient, database: Database) -> None:
    """Nothing refuses it: no host is served by it."""
    assert could_give(database, "10.0.0.2", Place(vrf="shadow")) == (3,)
    assert could_give(database, "10.0.0.9", Place()) == (1, 3)
    post(shadowed, "clusters", {"name": "c2", "datacentre": "dc1"})
    # In that cluster there is no host at all.
    assert could_give(database, "10.0.0.2", Place(cluster="c2")) == (3,)


def test_a_prefix_serves_a_region_a_cluster_or_a_rack(ipv4_site: TestClient, database: Database) -> None:
    for path, body in (
        ("datacentres", {"name": "dc2", "region": "north"}),
        ("datacentres", {"name": "dc3", "region": "south"}),
        ("clusters", {"name": "c2", "datacentre": "dc2"}),
        ("clusters", {"name": "c3", "datacentre": "dc3"}),
        ("racks", {"name": "r2", "cluster": "c2"}),
        ("racks", {"name": "r3", "cluster": "c3"}),
        ("hosts", {"name": "h1", "rack": "r1", "vrf": "red", "address": "192.0.2.1"}),
        ("hosts", {"name": "h2", "rack": "r2", "vrf": "red", "address": "192.0.2.2"}),
        ("hosts", {"name": "h3", "rack": "r3", "vrf": "red", "address": "192.0.2.3"}),
    ):
        post(ipv4_site, path, body)
    region = post(ipv4_site, "prefixes", SECOND | {"cluster": None, "region": "north"})
    rack = post(ipv4_site, "prefixes", SECOND | {"cidr": "10.3.0.0/29", "gateway": "10.3.0.1", "rack": "r1"})
    assert (region["region"], region["cluster"]) == ("north", None)
    with database.read() as conn:
        hosts = dict(conn.execute(select(tables.host.c.name, tables.host.c.id)).all())
        serving = prefixes_serving(conn, hosts.values())
    assert [one.prefix_id for one in serving[hosts["h1"]]] == [rack["prefix_id"], 1, region["prefix_id"]]
    assert [one.prefix_id for one in serving[hosts["h2"]]] == [region["prefix_id"]]
    assert serving[hosts["h3"]] == ()
    for change, code in (
        ({"cluster": None}, "request.invalid"),
        ({"region": "north"}, "request.invalid"),
        ({"cluster": None, "region": "north", "rack": "r1"}, "request.invalid"),
        ({"cluster": None, "region": "west"}, "prefix.invalid"),
    ):
        refusal = ipv4_site.post("/v1/prefixes", json=SECOND | {"cidr": "10.4.0.0/29", "gateway": None} | change)
        assert (refusal.status_code, refusal.json()["code"]) == (422, code)


@pytest.mark.parametrize(
    "more",
    [
        {"count": 2, "networks": [{"address": "10.0.0.5"}]},
        {"names": ["a", "b"], "networks": [{"address": "10.0.0.5"}]},
        {"networks": [{"address": "10.0.0.5"}, {"address": "10.0.0.5"}]},
        {"networks": [{"address": "10.0.0.5", "prefix": "10.1.0.0/24"}]},
        {"networks": [{"address": 5}]},
        {"networks": [{}] * 5},
    ],
)
def test_networks_that_contradict_themselves_are_no_request(more: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        VmsCreate.model_validate({"flavor": "f", "image": "i"} | more)
    fine = {"networks": [{"address": "10.0.0.5", "prefix": "10.0.0.0/24"}, {}]}
    assert VmsCreate.model_validate({"flavor": "f", "image": "i"} | fine).networks[0].address == ip_address("10.0.0.5")
