# SPDX-License-Identifier: Apache-2.0
"""Prefixes of an import that no VM could use an address of, as earlier versions made them: an export may have some,
and a fresh database takes none. No I/O."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from ppec_contract.api_ipdb import HoldKind, PrefixCreate
from ppec_contract.errors import PpecError
from ppec_orchestrator.ipdb.exchange import Fault, PlacedHold, Row
from ppec_orchestrator.ipdb.ranges import Network, check_purpose

# A VRF's name, and the network.
_Key = tuple[str, Network]


@dataclass(frozen=True, slots=True)
class Sifted:
    """The `rows` left to import, what is wrong with others, and what is left out because that was asked for."""

    rows: Sequence[Row]
    faults: Sequence[Fault] = ()
    skipped: Sequence[Fault] = ()


def sifted(rows: Sequence[Row], new: Sequence[tuple[str, PrefixCreate]], *, skip: bool) -> Sifted:
    """Of the `new` prefixes, those refused for their purpose are taken out with all that is held back of them: each row
    as a fault, or to `skip`. One with a reserved address is never skipped: somebody says that it is in use."""
    refused = {(one.vrf, one.cidr): why for _, one in new if (why := _refused(one.cidr)) is not None}
    if not refused:
        return Sifted(rows)
    theirs: dict[_Key, list[Row]] = defaultdict(list)
    for row in rows:
        key = _key(row)
        if key in refused:
            theirs[key].append(row)
    faults: list[Fault] = []
    skipped: list[Fault] = []
    for key, mine in theirs.items():
        reserved = [row.place for row in mine if _is_reserved(row)]
        (skipped if skip and not reserved else faults).extend(_told(mine, refused[key], reserved, skip=skip))
    return Sifted([row for row in rows if _key(row) not in refused], faults, skipped)


def _told(rows: Sequence[Row], why: str, reserved: Sequence[str], *, skip: bool) -> list[Fault]:
    if reserved:
        todo = f". Addresses of it are reserved ({', '.join(reserved[:3])}): take these rows out if nothing uses them"
    else:
        todo = "" if skip else ". Take the row out, or skip what is refused"
    return [
        Fault(row.place, why + todo if isinstance(row.item, PrefixCreate) else f"it is held back of a refused {why}")
        for row in rows
    ]


def _refused(network: Network) -> str | None:
    try:
        check_purpose(network)
    except PpecError as error:
        return error.message
    return None


def _key(row: Row) -> _Key | None:
    return (row.item.vrf, row.item.cidr) if isinstance(row.item, PrefixCreate | PlacedHold) else None


def _is_reserved(row: Row) -> bool:
    return isinstance(row.item, PlacedHold) and row.item.hold.kind is HoldKind.RESERVED
