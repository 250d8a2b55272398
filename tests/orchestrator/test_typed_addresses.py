# SPDX-License-Identifier: Apache-2.0
"""The beginnings of addresses, as people type them."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppec_orchestrator.ipdb.ranges import to_hex
from ppec_orchestrator.ipdb.typed import typed_ranges

IPV6 = st.tuples(*[st.integers(1, 2**16 - 1)] * 8).map(lambda parts: ":".join(f"{part:x}" for part in parts))


def _within(text: str, address: str) -> bool:
    number = to_hex(int(IPv4Address(address) if "." in address else IPv6Address(address)))
    return any(one.first <= number <= one.last for one in typed_ranges(text))


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.data())
def test_ipv4_addresses_begin_with_what_their_text_begins_with(own: int, other: int, data: st.DataObject) -> None:
    address = str(IPv4Address(own))
    text = address[: data.draw(st.integers(address.index(".") + 1, len(address)))]
    assert _within(text, address)
    assert _within(text, str(IPv4Address(other))) == str(IPv4Address(other)).startswith(text)


@given(IPV6, IPV6, st.data())
def test_ipv6_addresses_begin_with_what_their_text_begins_with(own: str, other: str, data: st.DataObject) -> None:
    """Those without a group of zeros, whose texts are written out."""
    text = own[: data.draw(st.integers(own.index(":") + 1, len(own)))]
    assert _within(text, own)
    assert _within(text, other) == other.startswith(text)


@pytest.mark.parametrize(("text", "address"), [("2001:db8::", "2001:db8::7"), ("2001:DB8::7", "2001:db8::7")])
def test_zeros_may_be_left_out(text: str, address: str) -> None:
    assert _within(text, address)
    assert not _within(text, "2001:db9::7")


@pytest.mark.parametrize(
    "text",
    ["", "10", "web.1", "10.256.", "10.0.0.0.", "1.2.3.4.5", "10..", "10.01", "a:b:g", "::1%eth0", "1:2:3:4:5:6:7:8:"],
)
def test_what_begins_no_address_has_no_ranges(text: str) -> None:
    assert typed_ranges(text) == ()
