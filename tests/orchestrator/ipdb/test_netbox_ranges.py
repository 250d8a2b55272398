# SPDX-License-Identifier: Apache-2.0
"""Prefixes of NetBox of which only `first` to `last` are given out."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from fastapi.testclient import TestClient
from ipdb_site import post
from netbox_site import MARK, PREFIX, in_step, rows
from netbox_stand_in import MAX_PAGE_SIZE, TOKEN, NetBoxStandIn

from ppec_orchestrator.address_supply import AddressSupply
from ppec_orchestrator.ipdb.provider import SourcePrefix
from ppec_orchestrator.ipdb.ranges import Network, to_hex, usable_range
from ppec_orchestrator.netbox import NetBox
from ppec_orchestrator.store.database import Database


def _part(cidr: str, first: str, last: str | None = None, source_id: int = 8) -> SourcePrefix:
    network: Network = ip_network(cidr)
    end = ip_address(last) if last else None
    return SourcePrefix(4, source_id, network, usable_range(network, first=ip_address(first), last=end))


_RANGES = (
    # Below it more is free than NetBox lists at once.
    ("10.8.0.0/16", "10.8.200.7", "10.8.200.8", ["10.8.200.7", "10.8.200.8"]),
    ("10.8.0.0/24", "10.8.0.100", "10.8.0.199", ["10.8.0.100", "10.8.0.101", "10.8.0.102"]),
    ("10.8.0.0/22", "10.8.1.255", "10.8.3.1", ["10.8.1.255", "10.8.2.0", "10.8.2.1"]),
    ("fd00:8::/64", "fd00:8::7:0:0:0", "fd00:8::7:ffff:ffff:ffff", ["fd00:8::7:0:0:0", "fd00:8::7:0:0:1"]),
    ("fd00:8::/64", "fd00:8::2", None, ["fd00:8::2", "fd00:8::3"]),
)


@pytest.mark.parametrize("part", _RANGES)
def test_a_range_is_supplied_wherever_it_lies_and_then_left_in_peace(
    site: TestClient,
    database: Database,
    supply: AddressSupply,
    stand_in: NetBoxStandIn,
    part: tuple[str, str, str | None, list[str]],
) -> None:
    cidr, first, last, wanted = part
    stand_in.add_prefix(8, cidr, vrf=5)
    body = PREFIX | {"cidr": cidr, "gateway": None, "netbox_id": 8, "first": first}
    made = post(site, "prefixes", body | ({"last": last} if last else {}))["prefix_id"]
    assert supply.settle() == []
    mine = [row.address_hex for row in rows(database, made)]
    assert mine[: len(wanted)] == [to_hex(int(ip_address(text))) for text in wanted]
    assert len(mine) == (2 if last == "10.8.200.8" else 3)
    assert in_step(database, stand_in)
    stand_in.requests.clear()
    assert supply.settle() == []
    assert {method for method, _ in stand_in.requests} == {"GET"}
    assert len(stand_in.requests) < 15


def test_what_others_have_in_a_range_is_left_out(stand_in: NetBoxStandIn, netbox: NetBox) -> None:
    """Also IP ranges that are in use as a whole, and those that lie there for information only are not."""
    stand_in.add_prefix(8, "10.8.0.0/24", vrf=5)
    stand_in.add_address("10.8.0.100/32", vrf=5, description="entered with a length of its own")
    stand_in.add_address("10.8.0.101/24", vrf=6, description="of another VRF")
    stand_in.add_range("10.8.0.102/24", "10.8.0.104/24", 5, populated=True)
    stand_in.add_range("10.8.0.105/24", "10.8.0.110/24", 5, populated=False)
    got = netbox.acquire(_part("10.8.0.0/24", "10.8.0.100", "10.8.0.106"), 9)
    assert [str(one.address) for one in got] == ["10.8.0.101", "10.8.0.105", "10.8.0.106"]
    assert netbox.acquire(_part("10.8.0.0/24", "10.8.0.100", "10.8.0.106"), 1) == []


def test_a_range_gives_more_than_a_page_and_more_than_a_block(stand_in: NetBoxStandIn, netbox: NetBox) -> None:
    stand_in.add_prefix(8, "10.8.0.0/16", vrf=5)
    prefix = _part("10.8.0.0/16", "10.8.3.200", "10.8.9.255")
    got = netbox.acquire(prefix, 3 * MAX_PAGE_SIZE)
    assert [int(one.address) for one in got] == list(range(int(got[0].address), int(got[0].address) + len(got)))
    assert (str(got[0].address), len(got)) == ("10.8.3.200", 3 * MAX_PAGE_SIZE)
    assert [one.address for one in netbox.acquire(prefix, 1)] == [got[-1].address + 1]


@pytest.mark.parametrize("unique", [True, False])
def test_a_race_in_a_range_that_is_lost_takes_the_next(stand_in: NetBoxStandIn, netbox: NetBox, unique: bool) -> None:
    """Where NetBox refuses duplicates and where it doesn't."""
    stand_in.unique_vrfs = unique
    stand_in.add_prefix(8, "10.8.0.0/24", vrf=5)
    numbers = iter(range(100, 103))

    def meanwhile(method: str, path: str) -> None:
        if method == "POST" and (number := next(numbers, None)) is not None:
            stand_in.add_address(f"10.8.0.{number}/24", vrf=5, description="somebody's")

    stand_in.before = meanwhile
    got = netbox.acquire(_part("10.8.0.0/24", "10.8.0.100", "10.8.0.199"), 1)
    assert [str(one.address) for one in got] == ["10.8.0.103"]
    assert stand_in.texts("somebody's") == [f"10.8.0.{n}/24" for n in (100, 101, 102)]
    assert stand_in.texts(MARK) == ["10.8.0.103/24"]


@pytest.mark.parametrize("unique", [True, False])
def test_concurrent_requests_are_never_given_the_same_of_a_range(stand_in: NetBoxStandIn, unique: bool) -> None:
    stand_in.unique_vrfs = unique
    stand_in.add_prefix(8, "10.8.0.0/24", vrf=5)
    prefix = _part("10.8.0.0/24", "10.8.0.100", "10.8.0.199")
    clients = [NetBox(stand_in.url, TOKEN, f"client {n}") for n in range(4)]
    start = threading.Barrier(4)

    def acquire(client: NetBox) -> list[Any]:
        start.wait()
        return [client.acquire(prefix, 3) for _ in range(3)]

    with ThreadPoolExecutor(4) as pool:
        got = list(itertools.chain.from_iterable(itertools.chain.from_iterable(pool.map(acquire, clients))))
    addresses = [one.address for one in got]
    assert len(addresses) == len(set(addresses))
    assert all(prefix.gives_out(one) for one in addresses)
    # What was not given is not kept either.
    assert len(stand_in.texts()) - 2 == len(addresses)
