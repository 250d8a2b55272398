# SPDX-License-Identifier: Apache-2.0
"""Which VMs a list shows, in its order: by name, then id.

A page must cost the same on a fleet of a hundred thousand VMs, whatever is asked for. So only keys are looked for here
(`vm_views` reads the rows of those that are shown), and in one of two ways. Where one of the filters has few VMs, they
are gathered by that filter's own index, tried against the others, and sorted. Where each has many, VMs are tried in the
order of the list until a page is full, which is soon because many fit. The choice is made here and not left to the
databases' planners: SQLite's has no idea of the numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    CompoundSelect,
    Connection,
    FromClause,
    Integer,
    Select,
    and_,
    bindparam,
    func,
    literal,
    or_,
    select,
    true,
    tuple_,
    union,
    union_all,
)

from ppec_contract.api import VmRecord
from ppec_contract.vm import VmState
from ppec_orchestrator.ipdb.typed import typed_ranges
from ppec_orchestrator.store.labels import WantedLabel
from ppec_orchestrator.store.paging import Slice, bad_cursor
from ppec_orchestrator.store.places import Place
from ppec_orchestrator.store.search import contains
from ppec_orchestrator.store.tables import (
    address,
    allocation,
    host,
    image,
    vm,
    vm_label,
    vm_search,
)

# So many VMs are gathered and sorted in less time than it may take to find a page of them in the order of the list.
FEW = 8000


@dataclass(frozen=True, slots=True)
class VmFilter:
    """Which VMs to list; None means any. `silent_before`: a host last seen earlier is silent, its VMs unknown.

    `text` is looked for in names, images, flavors, labels and hosts' names, and as the beginning of an address.
    """

    silent_before: datetime
    place: Place = field(default_factory=Place)
    name: str | None = None
    record: VmRecord | None = None
    observed: VmState | None = None
    image: str | None = None
    flavor: str | None = None
    labels: tuple[WantedLabel, ...] = ()
    text: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Source:
    """VMs that one filter chooses: `ids` selects them all, `has` says it of the one at hand.

    `in_order` is the table that has them in the order of the list, by `name` and `vm_id`, if there is one; `rows` says
    which of its rows these are.
    """

    ids: Select[Any] | CompoundSelect[Any]
    has: ColumnElement[bool]
    in_order: FromClause | None = None
    rows: ColumnElement[bool] = field(default_factory=true)


@dataclass(frozen=True, slots=True)
class _Way:
    """To be on the list: chosen by all of the sources, fitting all of the conditions, and having `text` in its own."""

    sources: tuple[_Source, ...] = ()
    conditions: tuple[ColumnElement[bool], ...] = ()
    text: str | None = None

    def __and__(self, other: _Way) -> _Way:
        return _Way(self.sources + other.sources, self.conditions + other.conditions, self.text or other.text)


@dataclass(frozen=True, slots=True)
class Keys:
    """`query` selects (name, id), in the order of the list. With `in_order` it goes through `vm` in that order, so
    other columns may be selected with it; else it is better asked for keys alone, because it sorts."""

    query: Select[Any]
    in_order: bool = False


def keys(conn: Connection, wanted: Slice, chosen: VmFilter, few: int = FEW) -> Keys:
    """Of the wanted VMs and, if there are more, of one besides. One statement may count first."""
    always = _always(chosen)
    ways = [text & observed & always for text in _by_text(conn, chosen) for observed in _by_observed(chosen)]
    counted = _counted(conn, ways, few)
    # A way that nothing of is there for need not be gone; of none at all the first says so.
    ways = [way for way in ways if all(counted.get(source) != 0 for source in way.sources)] or ways[:1]
    # Each finds the first of its own: together they have the first of all.
    found = [_in_order(conn, way, counted, wanted) for way in ways]
    if len(found) == 1:
        return Keys(found[0], in_order=not counted and ways[0].text is None and _leading(ways[0]) is None)
    every = union(*(select(one.subquery()) for one in found)).subquery()
    return Keys(select(every).order_by(every.c.name, every.c.id).limit(wanted.limit + 1))


def _in_order(conn: Connection, way: _Way, counted: dict[_Source, int], wanted: Slice) -> Select[Any]:
    fewest = min((source for source in way.sources if source in counted), key=counted.__getitem__, default=None)
    lead = vm_search if way.text is not None else _leading(way) if fewest is None else None
    name, vm_id = (vm.c.name, vm.c.id) if lead is None else (lead.c.name, lead.c.vm_id)
    query = select(name.label("name"), vm_id.label("id")).where(*way.conditions)
    if lead is not None:
        query = query.select_from(lead).join(vm, vm.c.id == lead.c.vm_id)
    if way.text is not None:
        query = query.where(contains(conn, vm_search.c.text, way.text))
    if fewest is not None:
        # The number is no bound here but a hint: PostgreSQL's planner thinks of far too many, and tries every VM.
        number = bindparam(None, counted[fewest], type_=Integer(), literal_execute=True)
        query = query.where(vm.c.id.in_(select(fewest.ids.limit(number).subquery())))
    if wanted.after is not None:
        after = _position(str(wanted.after))
        query = query.where(tuple_(name, vm_id) > tuple_(literal(after[0], name.type), literal(after[1], vm_id.type)))
    for source in way.sources:
        if source is not fewest:
            query = query.where(source.rows if lead is not None and source.in_order is lead else source.has)
    return query.order_by(name, vm_id).limit(wanted.limit + 1)


def _leading(way: _Way) -> FromClause | None:
    return next((source.in_order for source in way.sources if source.in_order is not None), None)


def _counted(conn: Connection, ways: list[_Way], few: int) -> dict[_Source, int]:
    """The sources with few VMs, and how many; one statement, which counts no further than it must."""
    sources = list(dict.fromkeys(source for way in ways for source in way.sources))
    if not sources:
        return {}
    counts = [
        select(func.count()).select_from(source.ids.limit(few + 1).subquery()).scalar_subquery() for source in sources
    ]
    found = conn.execute(select(*counts)).one()
    return {source: count for source, count in zip(sources, found, strict=True) if count <= few}


def _always(chosen: VmFilter) -> _Way:
    sources = [_by_label(label) for label in chosen.labels]
    if (hosts := chosen.place.hosts()) is not None:
        sources.append(_on(hosts))
    conditions: list[ColumnElement[bool]] = []
    if chosen.name is not None:
        conditions.append(vm.c.name == chosen.name)
    if chosen.record is not None:
        conditions.append(vm.c.record == chosen.record.value)
    if chosen.flavor is not None:
        conditions.append(vm.c.flavor == chosen.flavor)
    if chosen.image is not None:
        conditions.append(vm.c.image_id == select(image.c.id).where(image.c.name == chosen.image).scalar_subquery())
    return _Way(tuple(sources), tuple(conditions))


def _by_text(conn: Connection, chosen: VmFilter) -> list[_Way]:
    """A VM's own text, its host's name, or one of its addresses."""
    if chosen.text is None:
        return [_Way()]
    named = select(host.c.id).where(contains(conn, host.c.name, chosen.text))
    ways = [_Way(text=chosen.text), _Way((_on(named),))]
    if ranges := typed_ranges(chosen.text):
        # Of which family they are, the numbers say: no network of IPv6 begins with 96 zeros.
        within = [address.c.address_hex.between(one.first, one.last) for one in ranges]
        taken = select(address.c.vm_id).where(address.c.vm_id.is_not(None))
        has = taken.where(or_(*within), address.c.vm_id == vm.c.id).exists()
        ways.append(_Way((_Source(union_all(*(taken.where(one) for one in within)), has),)))
    return ways


def _by_observed(chosen: VmFilter) -> list[_Way]:
    """As `vm_views` shows it: of a silent host's VMs nothing is known, nor of one that has no host."""
    if chosen.observed is None:
        return [_Way()]
    said = vm.c.observed == chosen.observed.value
    if chosen.observed is not VmState.UNKNOWN:
        heard = _on(select(host.c.id).where(host.c.last_seen_at >= chosen.silent_before))
        return [_Way((), (said, heard.has))]
    silent = or_(host.c.last_seen_at.is_(None), host.c.last_seen_at < chosen.silent_before)
    # Only a VM that is being made or has failed may be without a host: no need to look for the others'.
    nowhere = ~select(allocation.c.vm_id).where(allocation.c.vm_id == vm.c.id).exists()
    return [
        _Way((_on(select(host.c.id).where(silent)),)),
        _Way((), (or_(said, and_(vm.c.record != VmRecord.ACTIVE.value, nowhere)),)),
    ]


def _on(hosts: Select[Any]) -> _Source:
    held = select(allocation.c.vm_id).where(allocation.c.host_id.in_(hosts))
    return _Source(held, held.where(allocation.c.vm_id == vm.c.id).exists())


def _by_label(wanted: WantedLabel) -> _Source:
    # By a name of its own, because several may be wanted.
    labels = vm_label.alias()
    having = select(labels.c.vm_id).where(wanted.of(labels))
    has = having.where(labels.c.vm_id == vm.c.id).exists()
    # With any value, they lie by value first.
    return _Source(having, has, labels, wanted.of(labels)) if wanted.value is not None else _Source(having, has)


def _position(after: str) -> tuple[str, UUID]:
    name, _, vm_id = after.partition("/")
    try:
        return name, UUID(vm_id)
    except ValueError as error:
        raise bad_cursor() from error
