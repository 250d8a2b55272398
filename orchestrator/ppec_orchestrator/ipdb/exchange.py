# SPDX-License-Identifier: Apache-2.0
"""The IPDB as a document and as a CSV table, and both as rows that say where they came from. No I/O.

kind,vrf,description,cidr,gateway,vlan,bridge,region,cluster,rack,first,last,nameservers,quarantine_s,…
vrf,red,production,,,,,,,,,,,,,
prefix,red,,10.0.0.0/24,10.0.0.1,,br0,,c1,,10.0.0.1,10.0.0.254,10.0.0.2 10.0.0.3,300,,
reserved,red,,10.0.0.0/24,,,,,,,10.0.0.9,10.0.0.9,,,db,the old database
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import islice
from typing import Any, Final

from ppec_contract.api_ipdb import (
    MAX_IMPORT_ROWS,
    HoldCreate,
    HoldKind,
    IpdbDocument,
    IpNetwork,
    PrefixCreate,
    VrfCreate,
)
from ppec_contract.errors import PpecError
from ppec_contract.model import Model, ResourceName
from ppec_contract.validation import parse
from ppec_orchestrator.ipdb.ranges import Network

_OF_VRF = ("vrf", "description")
_OF_PREFIX = (
    "vrf", "cidr", "gateway", "vlan", "bridge", "region", "cluster", "rack", "first", "last", "nameservers",
    "quarantine_s",
    "netbox_id",
)  # fmt: skip
_OF_HOLD = ("vrf", "cidr", "first", "last", "reserved_for", "note")
_HOLDS = tuple(kind.value for kind in HoldKind)
_USED: Mapping[str, tuple[str, ...]] = {"vrf": _OF_VRF, "prefix": _OF_PREFIX} | dict.fromkeys(_HOLDS, _OF_HOLD)
COLUMNS: Final = tuple(dict.fromkeys(("kind", *_OF_VRF, *_OF_PREFIX, *_OF_HOLD)))
_NUMBERS = ("vlan", "quarantine_s", "netbox_id")
# Of 2**63 - 1, the largest of them.
_MOST_DIGITS = 19
_MOST_EMPTY = 100_000
# A table that begins a cell with one of these is a program to spreadsheets; such text is written with a ' before it.
_FORMULAS = ("=", "+", "-", "@", "\t", "\r", "'")


class _PlaceOfHold(Model):
    """What a hold's row says of its prefix."""

    vrf: ResourceName
    cidr: IpNetwork


@dataclass(frozen=True, slots=True)
class PlacedHold:
    """A hold, and the prefix it is of."""

    vrf: str
    cidr: Network
    hold: HoldCreate


@dataclass(frozen=True, slots=True)
class Row:
    """Something to import. `place` says where it stands: `line 7`, or `prefixes[3]`."""

    place: str
    item: VrfCreate | PrefixCreate | PlacedHold


@dataclass(frozen=True, slots=True)
class Fault:
    """Why what stands there can't be imported."""

    place: str
    reason: str


def rows_of_document(document: IpdbDocument) -> list[Row]:
    rows = [Row(f"vrfs[{number}]", one) for number, one in enumerate(document.vrfs)]
    for number, one in enumerate(document.prefixes):
        place = f"prefixes[{number}]"
        rows.append(Row(place, PrefixCreate(**{name: getattr(one, name) for name in PrefixCreate.model_fields})))
        for place_of_hold, hold in enumerate(one.holds):
            rows.append(Row(f"{place}.holds[{place_of_hold}]", PlacedHold(one.vrf, one.cidr, hold)))
    return rows


def rows_of_csv(text: str) -> tuple[list[Row], list[Fault]]:
    """What the table says, and what in it can't be understood, of `MAX_IMPORT_ROWS` and one more row at most. Columns
    may come in any order; unused ones be left out."""
    # Spreadsheets begin a table with a byte order mark.
    text = text.removeprefix("\N{BYTE ORDER MARK}")
    reader = csv.DictReader(StringIO(text, newline=""), strict=True)
    read = 0
    rows: list[Row] = []
    faults: list[Fault] = []
    try:
        if wrong := _wrong_columns(reader.fieldnames or ()):
            return [], [Fault("line 1", f"{wrong}; columns are {', '.join(COLUMNS)}")]
        # One more than may be imported is enough to refuse it, and each fault takes its time.
        for cells in islice(_filled(reader), MAX_IMPORT_ROWS + 1):
            read = reader.line_num
            place = f"line {reader.line_num}"
            try:
                rows.append(Row(place, _item(cells)))
            except PpecError as error:
                faults.append(Fault(place, error.message))
    except csv.Error as error:
        faults.append(_not_csv(text, read, reader.reader.line_num, error))
    return rows, faults


def _filled(reader: Iterable[dict[str | Any, str | Any]]) -> Iterator[dict[str | Any, str | Any]]:
    """Without rows of commas alone, which spreadsheets write below the others. Where there are very many they are rows
    like any other, which end it soon: to read on would take its time."""
    empty = 0
    for cells in reader:
        # Of cells beyond the columns the reader makes a list.
        filled = any(any(value) if isinstance(value, list) else value for value in cells.values())
        empty += not filled
        if filled or empty > _MOST_EMPTY:
            yield cells


def _not_csv(text: str, read: int, line: int, error: csv.Error) -> Fault:
    """It was noticed at `line`, of a row that follows the `read` lines; if a quote is not closed, long after it."""
    opened = _left_open(islice(StringIO(text, newline=""), read, line))
    if opened is None:
        return Fault(f"line {line}", f"it is not CSV: {error}")
    return Fault(f"line {read + opened}", f"it is not CSV: a quote that is opened here is not closed ({error})")


def _left_open(lines: Iterable[str]) -> int | None:
    """In which of these lines, counted from 1, a quote is opened that none of them closes."""
    opened: int | None = None
    for number, line in enumerate(lines, 1):
        # A quote within quotes is written twice.
        for _ in range(line.replace('""', "").count('"')):
            opened = number if opened is None else None
    return opened


def _wrong_columns(names: Sequence[str]) -> str:
    """What is wrong with the first line; empty: nothing."""
    for name, count in Counter(names).items():
        if name not in COLUMNS:
            return f"there is no column {name[:40]!r}"
        if count > 1:
            return f"the column {name} is there {count} times"
    return "" if "kind" in names else "the column kind is missing"


def _item(cells: Mapping[str | Any, str | Any]) -> VrfCreate | PrefixCreate | PlacedHold:
    if None in cells:
        raise _wrong("it has more cells than the first line has columns")
    given = {name: _read(value) for name, value in cells.items() if value}
    kind = given.pop("kind", "")
    if kind not in _USED:
        raise _wrong(f"its kind is {kind[:40]!r}, wanted {', '.join(_USED)}")
    unused = [name for name in given if name not in _USED[kind]]
    if unused:
        raise _wrong(f"{unused[0]} means nothing of kind {kind}")
    if kind == "vrf":
        named = {"name" if name == "vrf" else name: value for name, value in given.items()}
        return parse(VrfCreate, named, subject=f"vrf {given.get('vrf', '')}")
    if kind == "prefix":
        return parse(PrefixCreate, _values(given), subject=f"prefix {given.get('cidr', '')}")
    named = {name: given.pop(name) for name in ("vrf", "cidr") if name in given}
    place = parse(_PlaceOfHold, named, subject="hold")
    return PlacedHold(place.vrf, place.cidr, parse(HoldCreate, given | {"kind": kind}, subject="hold"))


def _values(given: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = dict(given)
    for name in _NUMBERS:
        if values.get(name, "").isdecimal() and len(values[name]) <= _MOST_DIGITS:
            values[name] = int(values[name])
    if "nameservers" in values:
        values["nameservers"] = values["nameservers"].split()
    return values


def _wrong(why: str) -> PpecError:
    return PpecError("request.invalid", why, subject="table")


def as_csv(document: IpdbDocument) -> str:
    """The table of a document; `rows_of_csv` reads the same document from it."""
    written = StringIO(newline="")
    writer = csv.DictWriter(written, COLUMNS, lineterminator="\r\n")
    writer.writeheader()
    for cells in _cells(document):
        writer.writerow({name: _written(value) for name, value in cells.items() if value is not None})
    return written.getvalue()


def _cells(document: IpdbDocument) -> Iterator[dict[str, Any]]:
    for vrf in document.vrfs:
        yield {"kind": "vrf", "vrf": vrf.name, "description": vrf.description}
    for prefix in document.prefixes:
        yield {"kind": "prefix"} | {name: getattr(prefix, name) for name in _OF_PREFIX}
        for hold in prefix.holds:
            told = {name: getattr(hold, name) for name in _OF_HOLD if name not in ("vrf", "cidr")}
            yield {"kind": hold.kind.value, "vrf": prefix.vrf, "cidr": prefix.cidr} | told


def _written(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f"'{text}" if text.startswith(_FORMULAS) else text


def _read(text: str) -> str:
    return text[1:] if text.startswith("'") and text[1:].startswith(_FORMULAS) else text


def told(faults: Iterable[Fault], most: int) -> str:
    """The first of them, in words."""
    shown = list(faults)
    more = f"; and {len(shown) - most} more" if len(shown) > most else ""
    return "; ".join(f"{fault.place}: {fault.reason}" for fault in shown[:most]) + more
