# SPDX-License-Identifier: Apache-2.0
"""Parts of JSON that lists write by themselves: the same as pydantic's."""

from __future__ import annotations

import json
from ipaddress import IPv4Address, IPv6Address

from hypothesis import given
from hypothesis import strategies as st

from ppec_orchestrator.ipdb.ranges import to_hex
from ppec_orchestrator.store.json_text import address_text, quoted

# Each group of 16 bits by itself: what addresses are called depends on runs of zeros.
_GROUPS = st.lists(st.sampled_from((0, 0, 0, 1, 0xFFFF, 0x2001)) | st.integers(0, 2**16 - 1), min_size=8, max_size=8)


@given(_GROUPS)
def test_addresses_are_called_as_ipaddress_calls_them(groups: list[int]) -> None:
    """Those that hold an IPv4 address within as well, which the C library writes in another way."""
    number = int.from_bytes(b"".join(group.to_bytes(2, "big") for group in groups), "big")
    assert address_text(to_hex(number), 6) == str(IPv6Address(number))
    assert address_text(to_hex(number % 2**32), 4) == str(IPv4Address(number % 2**32))
    for embedded in (number % 2**32, 0xFFFF << 32 | number % 2**32):
        assert address_text(to_hex(embedded), 6) == str(IPv6Address(embedded))


@given(st.text(st.characters(codec="utf-8")))
def test_any_text_comes_back_from_its_json(text: str) -> None:
    assert json.loads(quoted(text).encode()) == text
