# SPDX-License-Identifier: Apache-2.0
"""Which addresses of a prefix may be given out."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppec_contract.errors import PpecError
from ppec_orchestrator.ipdb.ranges import AddressRange, check_purpose, from_hex, usable_range


def _range(cidr: str, **edges: str) -> AddressRange:
    return usable_range(ip_network(cidr), **{name: ip_address(text) for name, text in edges.items()})


def _given(found: AddressRange) -> list[str]:
    return [str(from_hex(text, 4)) for text in found.hexes()]


@pytest.mark.parametrize(
    ("cidr", "edges", "addresses"),
    [
        ("10.0.0.0/30", {}, ["10.0.0.1", "10.0.0.2"]),
        ("10.0.0.0/30", {"gateway": "10.0.0.1"}, ["10.0.0.2"]),
        ("10.0.0.0/29", {"first": "10.0.0.3", "last": "10.0.0.5"}, ["10.0.0.3", "10.0.0.4", "10.0.0.5"]),
        ("10.0.0.0/29", {"first": "10.0.0.0", "last": "10.0.0.1"}, ["10.0.0.1"]),
        ("10.0.0.0/29", {"first": "10.0.0.6", "last": "10.0.0.7"}, ["10.0.0.6"]),
        ("10.0.0.0/31", {}, ["10.0.0.0", "10.0.0.1"]),
        ("10.0.0.4/32", {}, ["10.0.0.4"]),
    ],
)
def test_usable_ipv4(cidr: str, edges: dict[str, str], addresses: list[str]) -> None:
    found = _range(cidr, **edges)
    assert _given(found) == addresses
    assert found.size == len(addresses)


@pytest.mark.parametrize(
    ("cidr", "edges", "why"),
    [
        ("10.0.0.0/24", {"gateway": "10.0.1.1"}, "gateway 10.0.1.1 is not in it"),
        ("10.0.0.0/24", {"gateway": "fd00::1"}, "gateway fd00::1 is not in it"),
        ("10.0.0.0/24", {"first": "10.0.0.9", "last": "10.0.0.3"}, "no address lies between"),
        ("10.0.0.0/24", {"last": "10.0.0.0"}, "no address lies between"),
        ("10.0.0.0/8", {}, "are more than 65536"),
        ("10.0.0.4/32", {"gateway": "10.0.0.4"}, "only address is the gateway"),
        ("fd00::/64", {"gateway": "fe80::1%eth0"}, "names a zone"),
        ("fd00::/64", {"first": "fe80::1"}, "first fe80::1 is not in it"),
    ],
)
def test_unusable(cidr: str, edges: dict[str, str], why: str) -> None:
    with pytest.raises(PpecError, match=why) as refused:
        _range(cidr, **edges)
    assert refused.value.code == "prefix.invalid"


@pytest.mark.parametrize(
    ("cidr", "purpose"),
    [
        ("0.0.0.0/24", "0.0.0.0/8 is unspecified"),
        ("0.0.0.0/0", "0.0.0.0/8 is unspecified"),
        ("127.0.0.0/24", "127.0.0.0/8 is loopback"),
        ("126.0.0.0/7", "127.0.0.0/8 is loopback"),
        ("169.254.7.0/24", "169.254.0.0/16 is link-local"),
        ("224.0.0.0/24", "224.0.0.0/4 is multicast"),
        ("240.0.0.0/24", "240.0.0.0/4 is reserved"),
        ("255.255.255.255/32", "240.0.0.0/4 is reserved"),
        ("::/128", "::/128 is unspecified"),
        ("::1/128", "::1/128 is loopback"),
        ("::ffff:10.0.0.0/120", "::ffff:0:0/96 is IPv4-mapped"),
        ("::10.0.0.0/120", "::/8 is reserved"),
        ("fe80::/64", "fe80::/10 is link-local"),
        ("ff00::/8", "ff00::/8 is multicast"),
    ],
)
def test_a_network_of_special_purpose_is_no_prefix(cidr: str, purpose: str) -> None:
    with pytest.raises(PpecError, match=purpose) as refused:
        check_purpose(ip_network(cidr))
    assert refused.value.code == "prefix.invalid"


@pytest.mark.parametrize(
    "cidr",
    ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "192.0.2.0/24", "198.51.100.0/24",
     "198.18.0.0/15", "203.0.113.0/24", "192.0.0.0/24", "192.88.99.0/24", "8.8.8.0/24", "fd00::/8", "fc00::/7",
     "2001:db8::/32", "2000::/3"],
)  # fmt: skip
def test_private_shared_documentation_and_benchmarking_addresses_are_like_any_other(cidr: str) -> None:
    check_purpose(ip_network(cidr))


def test_a_slash_16_is_the_largest_ipv4_prefix_but_a_slice_of_a_larger_one_will_do() -> None:
    assert _range("10.0.0.0/16").size == 65534
    assert _range("10.0.0.0/8", first="10.1.0.0", last="10.1.0.9").size == 10


def test_ipv6_leaves_out_the_anycast_address_and_takes_a_link_local_gateway() -> None:
    found = _range("fd00::/64", gateway="fe80::1")
    assert (str(found.first), found.size) == ("fd00::1", 2**64 - 1)


def test_a_window_wraps_around_and_never_names_an_address_twice() -> None:
    found = _range("fd00::/64", first="fd00::1", last="fd00::4", gateway="fd00::2")
    base = int(found.network.network_address)
    assert [number - base for number in found.window(base + 3, 2)] == [3, 4]
    assert [number - base for number in found.window(base + 4, 9)] == [4, 1, 3]
    assert [number - base for number in found.window(base + 9, 1)] == [1]


@given(st.integers(22, 30), st.integers(0, 2**20), st.data())
def test_what_is_given_out_is_inside_and_never_an_edge(length: int, number: int, data: st.DataObject) -> None:
    network = IPv4Network((number << (32 - length) & 0xFFFFFFFF, length))
    gateway = IPv4Address(data.draw(st.integers(int(network[1]), int(network[-2]))))
    found = usable_range(network, gateway=gateway)
    addresses = [from_hex(text, 4) for text in found.hexes()]
    assert len(set(addresses)) == len(addresses) == found.size == network.num_addresses - 3
    assert not {network[0], network[-1], gateway} & set(addresses)
    assert all(address in network for address in addresses)


@given(st.integers(0, 2**64 - 1), st.integers(1, 50))
def test_ipv6_windows_are_distinct_and_usable(start: int, count: int) -> None:
    network = IPv6Network("fd00::/64")
    found = usable_range(network, gateway=network[1])
    window = found.window(int(network.network_address) + start, count)
    assert len(set(window)) == len(window) == count
    assert all(int(found.first) <= number <= int(found.last) and number != int(network[1]) for number in window)
