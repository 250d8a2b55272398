# SPDX-License-Identifier: Apache-2.0
"""The addresses that begin as somebody typed, as ranges of numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import ip_address

from ppec_orchestrator.ipdb.ranges import to_hex

# At least one dot or colon: "10" is rather the end of a name.
_IPV4 = re.compile(r"(?:[0-9]{1,3}\.){1,3}[0-9]{0,3}")
_IPV6 = re.compile(r"(?:[0-9a-f]{1,4}:){1,7}[0-9a-f]{0,4}")
_IPV6_ZEROS = re.compile(r"(?:[0-9a-f]{1,4}:){1,7}:")


@dataclass(frozen=True, slots=True)
class TypedRange:
    """From `first` to `last`, both included, as the database spells addresses."""

    family: int
    first: str
    last: str


def typed_ranges(text: str) -> tuple[TypedRange, ...]:
    """The addresses whose text begins with this; none where it is not the beginning of an address.

    `10.0.1` begins 10.0.1.0 and 10.0.17.0. Of IPv6, groups are as they are written without leading zeros, and zeros
    may be left out (`::`) at the end or in a whole address: `2001:db8::` begins all of 2001:db8::/32.
    """
    text = text.strip().lower()
    *parts, last = text.split("." if "." in text else ":")
    if _IPV4.fullmatch(text):
        return _ranges(4, [int(part) for part in parts], last, 8, 10)
    if _IPV6_ZEROS.fullmatch(text):
        return _ranges(6, [int(part, 16) for part in parts[:-1]], "", 16, 16)
    if _IPV6.fullmatch(text):
        return _ranges(6, [int(part, 16) for part in parts], last, 16, 16)
    return _whole(text)


def _whole(text: str) -> tuple[TypedRange, ...]:
    try:
        found = ip_address(text)
    except ValueError:
        return ()
    number = to_hex(int(found))
    return (TypedRange(found.version, number, number),) if "%" not in text else ()


def _ranges(family: int, parts: list[int], last: str, bits: int, base: int) -> tuple[TypedRange, ...]:
    """`parts` are whole; the next one begins with the digits of `last`, which may be none."""
    total = 32 if family == 4 else 128
    most = (1 << bits) - 1
    if any(part > most for part in parts) or len(parts) + bool(last) > total // bits:
        return ()
    prefix = 0
    for part in parts:
        prefix = prefix << bits | part
    if not last:
        return (_range(family, prefix, prefix, total - bits * len(parts)),)
    left = total - bits * (len(parts) + 1)
    return tuple(
        _range(family, prefix << bits | low, prefix << bits | high, left)
        for low, high in _beginning(int(last, base), most, base, padded=last.startswith("0") and last != "0")
    )


def _beginning(digits: int, most: int, base: int, *, padded: bool) -> list[tuple[int, int]]:
    """The numbers up to `most` whose text begins with these digits."""
    if padded:
        return []
    found, low, high = [], digits, digits
    while low <= most:
        found.append((low, min(high, most)))
        if low == 0:
            break
        low, high = low * base, high * base + base - 1
    return found


def _range(family: int, low: int, high: int, left: int) -> TypedRange:
    return TypedRange(family, to_hex(low << left), to_hex((high + 1 << left) - 1))
