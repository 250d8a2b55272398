# SPDX-License-Identifier: Apache-2.0
"""Prefixes over the API; granting and releasing addresses, alone and in a race, on both databases."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address, ip_network
from typing import Any
from urllib.parse import quote
from uuid import UUID

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Connection, event, func, insert, select, update

from ppec_contract.api_ipdb import NetworkWanted
from ppec_contract.errors import PpecError
from ppec_orchestrator.ipdb.ranges import to_hex
from ppec_orchestrator.store import ipdb, tables
from ppec_orchestrator.store.clock import utc_now
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.faults import TransactionLostError
from ppec_orchestrator.store.serving import GrantedAddress, prefixes_serving
from ppec_orchestrator.store.utilisation import free_counts

PREFIX = {
    "vrf": "red", "cidr": "10.9.0.0/29", "gateway": "10.9.0.1", "bridge": "br0", "cluster": "c1", "quarantine_s": 0,
}  # fmt: skip
IPV6 = PREFIX | {"cidr": "fd00::/64", "gateway": "fe80::1", "vlan": 7, "nameservers": ["fd00::53"]}


def _post(client: TestClient, path: str, body: dict[str, Any]) -> Any:
    response = client.post(f"/v1/{path}", json=body)
    assert response.status_code == 201, response.text
    return response.json()


@pytest.fixture
def host_id(ipv4_site: TestClient, database: Database) -> int:
    """Host `h1` in rack `r1` of the site, served by 29 IPv4 addresses."""
    _post(ipv4_site, "hosts", {"name": "h1", "rack": "r1", "vrf": "red", "address": "192.0.2.1"})
    with database.read() as conn:
        return conn.execute(select(tables.host.c.id)).scalar_one()


def _ids(count: int) -> list[UUID]:
    return [uuid.uuid4() for _ in range(count)]


def _free(database: Database) -> list[int]:
    with database.read() as conn:
        return list(free_counts(conn, utc_now()).values())


def test_a_prefix_tells_what_it_has(ipv4_site: TestClient) -> None:
    view = _post(ipv4_site, "prefixes", PREFIX)
    assert (view["addresses_total"], view["addresses_free"]) == (5, 5)
    assert (view["first"], view["last"]) == ("10.9.0.1", "10.9.0.6")
    six = _post(ipv4_site, "prefixes", IPV6)
    assert (six["addresses_total"], six["vlan"], six["nameservers"]) == (2**53, 7, ["fd00::53"])
    assert ipv4_site.get(f"/v1/prefixes/{six['prefix_id']}").json() == six
    assert [p["cidr"] for p in ipv4_site.get("/v1/prefixes").json()["items"]] == [
        "10.0.0.0/27",
        "10.9.0.0/29",
        "fd00::/64",
    ]
    for path in ("prefixes", "addresses"):
        assert ipv4_site.get(f"/v1/{path}?vrf=blue").json()["code"] == "vrf.not_found"
    _post(ipv4_site, "vrfs", {"name": "blue"})
    for path in ("prefixes", "addresses"):
        assert ipv4_site.get(f"/v1/{path}?vrf=blue").json()["items"] == []
    free = ipv4_site.get(f"/v1/addresses?free=true&prefix_id={view['prefix_id']}&limit=2").json()
    assert [item["address"] for item in free["items"]] == ["10.9.0.2", "10.9.0.3"]
    assert ipv4_site.delete(f"/v1/prefixes/{view['prefix_id']}").status_code == 204
    assert ipv4_site.get(f"/v1/prefixes/{view['prefix_id']}").status_code == 404


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"cidr": "10.0.0.16/28", "gateway": None}, 409, "prefix.overlaps"),
        ({"cidr": "10.0.0.0/16"}, 422, "prefix.invalid"),
        ({"cidr": "10.0.0.0/16", "gateway": None}, 409, "prefix.overlaps"),
        ({"cidr": "10.0.0.1/24"}, 422, "request.invalid"),
        ({"vrf": "blue"}, 404, "vrf.not_found"),
        ({"cluster": "c9"}, 404, "cluster.not_found"),
        ({"rack": "r9"}, 404, "rack.not_found"),
        ({"rack": "r2"}, 422, "prefix.invalid"),
        ({"gateway": "10.8.0.1"}, 422, "prefix.invalid"),
        ({"cidr": "127.0.0.0/24", "gateway": None}, 422, "prefix.invalid"),
        ({"cidr": "fe80::/64", "gateway": None}, 422, "prefix.invalid"),
        ({"vlan": 4095}, 422, "request.invalid"),
        ({"bridge": "br0; reboot"}, 422, "request.invalid"),
        ({"nameservers": ["fe80::1%eth0"]}, 422, "request.invalid"),
        ({"cidr": "10.9.0.0"}, 422, "request.invalid"),
        ({"gateway": "10.9.0.0"}, 422, "prefix.invalid"),
        ({"gateway": "10.9.0.7"}, 422, "prefix.invalid"),
        ({"nameservers": ["0.0.0.0"]}, 422, "prefix.invalid"),
        ({"nameservers": ["10.0.0.1", "224.0.0.1"]}, 422, "prefix.invalid"),
        ({"nameservers": ["ff02::1"]}, 422, "prefix.invalid"),
        ({"nameservers": ["::"]}, 422, "prefix.invalid"),
        ({"nameservers": ["255.255.255.255"]}, 422, "prefix.invalid"),
        ({"nameservers": ["10.9.0.7"]}, 422, "prefix.invalid"),
    ],
)
def test_a_bad_prefix_is_refused(ipv4_site: TestClient, change: dict[str, Any], status: int, code: str) -> None:
    _post(ipv4_site, "clusters", {"name": "c2", "datacentre": "dc1"})
    _post(ipv4_site, "racks", {"name": "r2", "cluster": "c2"})
    refused = ipv4_site.post("/v1/prefixes", json=PREFIX | change)
    assert (refused.status_code, refused.json()["code"]) == (status, code), refused.text
    assert len(ipv4_site.get("/v1/prefixes").json()["items"]) == 1


@pytest.mark.parametrize("zone", ["eth0", "a\nb<script>", "\x00", "x" * 300, ""])
def test_an_ipv6_zone_is_refused_by_its_field(ipv4_site: TestClient, zone: str) -> None:
    """Python takes any text for one."""
    for change in (
        {"cidr": f"fd01::%{zone}/64", "gateway": None},
        {"gateway": f"fe80::1%{zone}"},
        {"first": f"fd00::2%{zone}"},
        {"last": f"fd00::2%{zone}"},
        {"nameservers": [f"fd00::53%{zone}"]},
    ):
        refused = ipv4_site.post("/v1/prefixes", json=IPV6 | change)
        assert (refused.status_code, refused.json()["code"]) == (422, "request.invalid")
        field = next(iter(change))
        assert refused.json()["detail"].startswith(f"request: {field}")
        assert "it names a zone (%), which only means something on one machine" in refused.json()["detail"]
    for path in (
        f"vrfs/red/free?within={quote(f'fd01::%{zone}/64')}",
        f"addresses/events?address={quote('fd01::%' + zone)}",
    ):
        assert "names a zone" in ipv4_site.get(f"/v1/{path}").json()["detail"]


@pytest.mark.parametrize(
    ("cidr", "free"),
    [
        ("10.9.0.0/28", True), ("10.9.0.16/28", False), ("10.9.0.24/29", False), ("10.9.0.0/24", False),
        ("10.9.0.32/27", True), ("10.9.0.64/26", False), ("10.9.0.0/17", False), ("10.9.1.0/24", True),
        ("fd00::/64", False), ("fd00:0:0:1::/64", True), ("fc00::/7", False), ("1.0.0.0/31", True),
    ],
)  # fmt: skip
def test_what_overlaps_is_found_wherever_it_lies(ipv4_site: TestClient, cidr: str, free: bool) -> None:
    for there in ("10.9.0.96/27", "10.9.0.16/28", "fd00::/64"):
        _post(ipv4_site, "prefixes", PREFIX | {"cidr": there, "gateway": None})
    made = ipv4_site.post("/v1/prefixes", json=PREFIX | {"cidr": cidr, "gateway": None})
    assert made.status_code == (201 if free else 409), made.text


def test_another_vrf_may_have_the_same_addresses(ipv4_site: TestClient) -> None:
    _post(ipv4_site, "vrfs", {"name": "blue"})
    _post(ipv4_site, "prefixes", PREFIX | {"vrf": "blue", "cidr": "10.0.0.0/27", "gateway": "10.0.0.1"})
    assert len(ipv4_site.get("/v1/addresses?free=true&vrf=blue").json()["items"]) == 29


def _grant(conn: Connection, host_id: int, vm_ids: Sequence[UUID]) -> dict[UUID, tuple[GrantedAddress, ...]]:
    ipdb.grant(conn, dict.fromkeys(vm_ids, host_id))
    return ipdb.addresses_of(conn, vm_ids)


def test_each_vm_gets_one_address_of_each_family(ipv4_site: TestClient, database: Database, host_id: int) -> None:
    _post(ipv4_site, "prefixes", IPV6)
    one, two = _ids(2)
    with database.write() as conn:
        granted = _grant(conn, host_id, [one, two])
    assert [[str(a.address) for a in granted[vm]] for vm in (one, two)] == [
        ["10.0.0.2/27", "fd00::1/64"],
        ["10.0.0.3/27", "fd00::2/64"],
    ]
    six = granted[one][1]
    assert (six.gateway, six.bridge, six.vlan) == (ip_address("fe80::1"), "br0", 7)
    assert six.nameservers == (ip_address("fd00::53"),)
    with database.read() as conn:
        assert ipdb.addresses_of(conn, [one, two]) == granted
    assert _free(database) == [27, 2**53]
    in_use = ipv4_site.delete("/v1/prefixes/1")
    assert (in_use.status_code, in_use.json()["code"]) == (409, "resource.in_use")
    assert "VMs have 2 of its addresses" in in_use.json()["detail"]
    assert _free(database)[0] == 27
    with database.write() as conn:
        assert ipdb.release(conn, [one, two]) == 4
        assert ipdb.release(conn, [one, two]) == 0
    assert _free(database) == [27, 2**53]


def test_a_host_no_prefix_serves_grants_nothing(ipv4_site: TestClient, database: Database) -> None:
    _post(ipv4_site, "vrfs", {"name": "blue"})
    _post(ipv4_site, "hosts", {"name": "h2", "rack": "r1", "vrf": "blue", "address": "192.0.2.2"})
    (vm,) = _ids(1)
    with database.write() as conn:
        host = conn.execute(select(tables.host.c.id).where(tables.host.c.name == "h2")).scalar_one()
        assert _grant(conn, host, [vm]) == {}
        assert prefixes_serving(conn, [host]) == {host: ()}


def test_the_racks_own_prefix_goes_first_and_the_next_takes_over(
    ipv4_site: TestClient, database: Database, host_id: int
) -> None:
    _post(ipv4_site, "racks", {"name": "r2", "cluster": "c1"})
    _post(ipv4_site, "prefixes", PREFIX | {"rack": "r2", "cidr": "10.8.0.0/29", "gateway": "10.8.0.1"})
    _post(ipv4_site, "prefixes", PREFIX | {"rack": "r1"})
    with database.write() as conn:
        granted = _grant(conn, host_id, ids := _ids(7))
    assert [str(granted[vm][0].address.ip) for vm in ids] == [
        *(f"10.9.0.{n}" for n in range(2, 7)),
        "10.0.0.2",
        "10.0.0.3",
    ]


def test_too_many_is_refused_whole(database: Database, host_id: int) -> None:
    with pytest.raises(PpecError) as refused, database.write() as conn:
        _grant(conn, host_id, _ids(30))
    assert refused.value.code == "address.exhausted"
    counts = {"prefix": "10.0.0.0/27", "free": 29, "total": 29, "quarantined": 0, "reserved": 0}
    assert refused.value.details == {"wanted": 30, "missing": 1, "family": 4, "prefixes": [counts]}
    assert "30 IPv4 addresses wanted, 29 free: 10.0.0.0/27 has 29 of 29 free" in refused.value.message
    assert _free(database) == [29]


def test_a_small_ipv6_range_is_used_again_from_the_start(
    ipv4_site: TestClient, database: Database, host_id: int
) -> None:
    _post(ipv4_site, "prefixes", IPV6 | {"gateway": "fd00::2", "first": "fd00::1", "last": "fd00::5"})
    vms = _ids(6)

    def grant(*wanted: UUID) -> list[str]:
        with database.write() as conn:
            granted = _grant(conn, host_id, wanted)
        return [str(granted[vm][1].address.ip) for vm in wanted]

    assert grant(*vms[:3]) == ["fd00::1", "fd00::3", "fd00::4"]
    with database.write() as conn:
        ipdb.release(conn, vms[:2])
    assert grant(*vms[3:6]) == ["fd00::5", "fd00::1", "fd00::3"]
    with pytest.raises(PpecError):
        grant(*_ids(1))


def test_the_last_free_ones_of_a_full_ipv6_range_are_found_in_a_few_statements(
    ipv4_site: TestClient, database: Database, host_id: int
) -> None:
    """From where it counts on, and round once; what is held back is passed over."""
    body = IPV6 | {"gateway": "fd00::7", "first": "fd00::1", "last": "fd00::bb8"}
    which = _post(ipv4_site, "prefixes", body)["prefix_id"]
    _post(ipv4_site, f"prefixes/{which}/holds", {"kind": "reserved", "first": "fd00::400", "last": "fd00::4ff"})
    free, base = {0x5, 0x7, 0x450, 0x7D0, 0xBB8}, int(ip_address("fd00::"))
    taken = [{"prefix_id": which, "address_hex": to_hex(base + n), "vm_id": uuid.uuid4()} for n in range(1, 0xBB9)]
    with database.write() as conn:
        conn.execute(insert(tables.address), [row for number, row in enumerate(taken, 1) if number not in free])
        conn.execute(update(tables.prefix).where(tables.prefix.c.id == which).values(next_hex=to_hex(base + 0x300)))
    vms = _ids(3)
    statements: list[str] = []
    for number, vm_id in enumerate(vms):
        with database.write() as conn:
            listens = event.listens_for(conn, "before_cursor_execute")
            listens(lambda _conn, _cursor, statement, *_: statements.append(statement))
            found = _grant(conn, host_id, [vm_id])[vm_id][1].address.ip
        assert str(found) == ["fd00::7d0", "fd00::bb8", "fd00::5"][number]
    assert len(statements) < 75
    with pytest.raises(PpecError), database.write() as conn:
        _grant(conn, host_id, _ids(1))


def test_a_thousand_addresses_cost_a_few_statements(ipv4_site: TestClient, database: Database, host_id: int) -> None:
    """However many hosts and VMs: of a named prefix, and of each family."""
    _post(ipv4_site, "prefixes", PREFIX | {"cidr": "10.16.0.0/21", "gateway": None, "rack": "r1"})
    _post(ipv4_site, "prefixes", IPV6)
    _post(ipv4_site, "hosts", {"name": "h2", "rack": "r1", "vrf": "red", "address": "192.0.2.2"})
    with database.read() as conn:
        hosts = conn.execute(select(tables.host.c.id)).scalars().all()
    wanted = {vm_id: hosts[number % 2] for number, vm_id in enumerate(_ids(1000))}
    networks = [NetworkWanted(), NetworkWanted(prefix=ip_network("10.16.0.0/21"))]
    statements: list[str] = []
    with database.write() as conn:
        listens = event.listens_for(conn, "before_cursor_execute")
        listens(lambda _conn, _cursor, statement, *_: statements.append(statement))
        ipdb.grant(conn, wanted, dict.fromkeys(wanted, networks))
        assert len(statements) < 15
        granted = ipdb.addresses_of(conn, list(wanted))
    assert len({a.address for addresses in granted.values() for a in addresses}) == 3000


@pytest.mark.parametrize("family", [4, 6])
def test_a_race_for_the_last_addresses_grants_none_twice_and_refuses_none_that_is_free(
    ipv4_site: TestClient, database: Database, host_id: int, open_database: Callable[[], Database], family: int
) -> None:
    """29 (IPv4) or 20 (IPv6) addresses, 48 clients on two orchestrators' connections; some roll back."""
    if family == 6:
        _post(ipv4_site, "prefixes", IPV6 | {"first": "fd00::1", "last": "fd00::14"})
    slots = 29 if family == 4 else 20
    databases = [database, open_database()]
    rng = random.Random(7)
    failing = {index for index in range(48) if rng.random() < 0.3}

    def one(index: int) -> str:
        (vm,) = _ids(1)
        while True:
            try:
                with databases[index % 2].write() as conn:
                    granted = _grant(conn, host_id, [vm])
                    if index in failing:
                        raise KeyError
                return str(granted[vm][-1].address)
            except TransactionLostError:
                continue
            except KeyError:
                return "rolled back"
            except PpecError as error:
                return error.code

    with ThreadPoolExecutor(12) as pool:
        ends = list(pool.map(one, range(48)))
    won = [end for end in ends if "/" in end]
    assert len(won) == len(set(won)) == min(slots, 48 - len(failing))
    assert set(ends) - set(won) <= {"address.exhausted", "rolled back"}
    with database.read() as conn:
        held = select(func.count()).select_from(tables.address).where(tables.address.c.vm_id.is_not(None))
        assert conn.execute(held).scalar_one() == len(won) * (1 if family == 4 else 2)
