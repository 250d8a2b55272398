# SPDX-License-Identifier: Apache-2.0
"""Which VMs a list shows, in its order: by name, then id.

A page must cost the same on a fleet of a hundred thousand VMs, whatever is asked for. So only keys are looked for here
(`vm_views` reads the rows of those that are shown), and in one of two ways. Where one of the filters has few VMs, they
are gathered by that filter's own index, tried against the others, and sorted. Where each has many, VMs are tried in the
order of the list until a page is full, which is soon because many fit. Between few and many, a set of those that the
filter has is made first, so that to try one costs next to nothing. The choice is made here and not left to the
databases' planners: SQLite's has no idea of the numbers, and PostgreSQL's guesses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple
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

from ppec_contract.api_vms import VmRecord
from ppec_contract.vm import VmState
from ppec_orchestrator.ipdb.typed import typed_ranges
from ppec_orchestrator.store.labels import WantedLabel
from ppec_orchestrator.store.paging import Slice, bad_cursor
from ppec_orchestrator.store.places import Place
from ppec_orchestrator.store.search import contains
from ppec_orchestrator.store.tables import (
    VM_IS_ODD,
    address,
    allocation,
    host,
    image,
    vm,
    vm_label,
    vm_search,
)


@dataclass(frozen=True, slots=True)
class Bounds:
    """How many VMs are `few` enough to be gathered and sorted sooner than a page of them is found in the order of the
    list, and how many are `some`: few enough to be made a set of that is looked into on the way. `silent` hosts, up to
    so many, are looked for once, and their ids given to the statements that follow."""

    few: int = 2500
    some: int = 12_000
    silent: int = 2000


BOUNDS = Bounds()


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
    pool: str | None = None
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
    """`query` selects (name, id), in the order of the list. With `in_order` it takes VMs of `vm` as they come, so other
    columns may be selected with it; else it is better asked for keys alone, because it sorts or leaves many out."""

    query: Select[Any]
    in_order: bool = False


def keys(conn: Connection, wanted: Slice, chosen: VmFilter, bounds: Bounds = BOUNDS) -> Keys:
    """Of the wanted VMs and, if there are more, of one besides. Two statements may look first how many there are."""
    always = _always(chosen)
    by_observed = _by_observed(conn, chosen, bounds.silent)
    ways = [text & observed & always for text in _by_text(chosen) for observed in by_observed]
    counted = _counted(conn, ways, bounds.some)
    # A way that nothing of is there for need not be gone; of none at all the first says so.
    ways = [way for way in ways if all(counted.get(source) != 0 for source in way.sources)] or ways[:1]
    # Each finds the first of its own: together they have the first of all.
    found = [_found(way, counted, wanted, bounds.few) for way in ways]
    if len(found) == 1:
        return Keys(found[0], in_order=ways[0] == _Way())
    every = union(*(select(one.subquery()) for one in found)).subquery()
    return Keys(select(every).order_by(every.c.name, every.c.id).limit(wanted.limit + 1))


def _found(way: _Way, counted: dict[_Source, int], wanted: Slice, few: int) -> Select[Any]:
    """The first VMs on this way, in the order of the list."""
    fewest = min((source for source in way.sources if source in counted), key=counted.__getitem__, default=None)
    if fewest is not None and counted[fewest] <= few:
        query, name, vm_id = _gathered(way, fewest, counted[fewest])
    else:
        query, name, vm_id = _tried(way, counted)
    if wanted.after is not None:
        after = _position(str(wanted.after))
        query = query.where(tuple_(name, vm_id) > tuple_(literal(after[0], name.type), literal(after[1], vm_id.type)))
    return query.order_by(name, vm_id).limit(wanted.limit + 1)


class _Chosen(NamedTuple):
    """Selects VMs; what they are sorted by is in its rows."""

    query: Select[Any]
    name: ColumnElement[str]
    vm_id: ColumnElement[UUID]


def _gathered(way: _Way, fewest: _Source, number: int) -> _Chosen:
    """Of each VM of the one source its name, if it fits; the name is what a list is sorted by.

    That it is a column of its own, and that their number is said, which is no bound here, is for PostgreSQL's planner:
    of a join it thinks that it has far more rows, and reads every VM.
    """
    ids = fewest.ids.subquery("chosen")
    fitting = select(vm.c.name).where(vm.c.id == ids.c.vm_id, *way.conditions)
    if way.text is not None:
        fitting = fitting.join(vm_search, vm_search.c.vm_id == vm.c.id).where(contains(vm_search.c.text, way.text))
    fitting = fitting.where(*(source.has for source in way.sources if source is not fewest))
    said = bindparam(None, number, type_=Integer(), literal_execute=True)
    found = select(fitting.scalar_subquery().label("name"), ids.c.vm_id.label("id")).limit(said).subquery()
    return _Chosen(select(found.c.name, found.c.id).where(found.c.name.is_not(None)), found.c.name, found.c.id)


def _tried(way: _Way, counted: dict[_Source, int]) -> _Chosen:
    """VMs in the order of the list, those that fit."""
    lead = vm_search if way.text is not None else _leading(way)
    name, vm_id = (vm.c.name, vm.c.id) if lead is None else (lead.c.name, lead.c.vm_id)
    query = select(name.label("name"), vm_id.label("id"))
    if way.text is not None:
        query = query.where(contains(vm_search.c.text, way.text))
    conditions = list(way.conditions)
    for source in way.sources:
        if lead is not None and source.in_order is lead:
            query = query.where(source.rows)
        elif source in counted:
            # "IS TRUE" keeps both planners from anything else than to make the set once and to look into it.
            query = query.where(vm_id.in_(source.ids).is_(true()))
        else:
            conditions.append(source.has)
    if lead is not None and conditions:
        conditions = [_looked_up(select(vm.c.id).where(vm.c.id == vm_id, *conditions))]
    return _Chosen(query.where(*conditions), name, vm_id)


def _looked_up(one: Select[Any]) -> ColumnElement[bool]:
    """Whether there is one, of the VM at hand. What `EXISTS` says, said so that PostgreSQL's planner can only look:
    it would sooner read whole tables, having no idea how few VMs are tried until a page is full."""
    return one.limit(1).scalar_subquery().is_not(None)


def _leading(way: _Way) -> FromClause | None:
    return next((source.in_order for source in way.sources if source.in_order is not None), None)


def _counted(conn: Connection, ways: list[_Way], some: int) -> dict[_Source, int]:
    """The sources with no more VMs than that, and how many; one statement, which counts no further than it must."""
    sources = list(dict.fromkeys(source for way in ways for source in way.sources))
    if not sources:
        return {}
    counts = [
        select(func.count()).select_from(source.ids.limit(some + 1).subquery()).scalar_subquery() for source in sources
    ]
    found = conn.execute(select(*counts)).one()
    return {source: count for source, count in zip(sources, found, strict=True) if count <= some}


def _always(chosen: VmFilter) -> _Way:
    sources = [_by_label(label) for label in chosen.labels]
    if (hosts := chosen.place.hosts()) is not None:
        sources.append(_on(hosts))
    if chosen.pool is not None:
        sources.append(_in_pool(chosen.pool))
    conditions: list[ColumnElement[bool]] = []
    if chosen.name is not None:
        conditions.append(vm.c.name == chosen.name)
    if chosen.record is not None:
        conditions += (vm.c.record == chosen.record.value, *_odd(chosen.record is not VmRecord.ACTIVE))
    if chosen.flavor is not None:
        conditions.append(vm.c.flavor == chosen.flavor)
    if chosen.image is not None:
        conditions.append(vm.c.image_id == select(image.c.id).where(image.c.name == chosen.image).scalar_subquery())
    return _Way(tuple(sources), tuple(conditions))


def _by_text(chosen: VmFilter) -> list[_Way]:
    """A VM's own text, its host's name, or one of its addresses."""
    if chosen.text is None:
        return [_Way()]
    named = select(host.c.id).where(contains(host.c.name, chosen.text))
    ways = [_Way(text=chosen.text), _Way((_on(named),))]
    if ranges := typed_ranges(chosen.text):
        # Of which family they are, the numbers say: no network of IPv6 begins with 96 zeros.
        within = [address.c.address_hex.between(one.first, one.last) for one in ranges]
        taken = select(address.c.vm_id).where(address.c.vm_id.is_not(None))
        has = _looked_up(taken.where(or_(*within), address.c.vm_id == vm.c.id))
        each = union_all(*(taken.where(one) for one in within)).subquery()
        ways.append(_Way((_Source(select(each.c.vm_id).distinct(), has),)))
    return ways


def _by_observed(conn: Connection, chosen: VmFilter, most: int) -> list[_Way]:
    """As `vm_views` shows it: of a silent host's VMs nothing is known, nor of one that has no host."""
    if chosen.observed is None:
        return [_Way()]
    said = vm.c.observed == chosen.observed.value
    placed = select(allocation.c.vm_id).where(allocation.c.vm_id == vm.c.id)
    if chosen.observed is not VmState.UNKNOWN:
        heard = placed.join(host, host.c.id == allocation.c.host_id).where(host.c.last_seen_at >= chosen.silent_before)
        return [_Way((), (said, *_odd(chosen.observed is not VmState.RUNNING), _looked_up(heard)))]
    # Only a VM that is being made or has failed may be without a host: no need to look for the others'.
    nowhere = and_(vm.c.record != VmRecord.ACTIVE.value, ~_looked_up(placed))
    silent = _Way((_on(_silent(conn, chosen.silent_before, most)),))
    return [silent, _Way((), (*_odd(), or_(said, nowhere)))]


def _odd(odd: bool = True) -> tuple[ColumnElement[bool], ...]:
    """What VMs are that `ix_vm_odd` has; SQLite takes it only for a query that says the very same."""
    return (VM_IS_ODD,) if odd else ()


def _silent(conn: Connection, before: datetime, most: int) -> Select[Any] | Sequence[int]:
    """Silent hosts; up to `most`, their ids. No index tells them, because every heartbeat would be written to it; so
    all hosts are looked through, and that once."""
    silent = select(host.c.id).where(or_(host.c.last_seen_at.is_(None), host.c.last_seen_at < before))
    found = conn.execute(silent.limit(most + 1)).scalars().all()
    return found if len(found) <= most else silent


def _on(hosts: Select[Any] | Sequence[int]) -> _Source:
    held = select(allocation.c.vm_id)
    # A set of hosts is made once, where VMs are tried.
    there = held.where(allocation.c.vm_id == vm.c.id, allocation.c.host_id.in_(hosts).is_(true()))
    return _Source(held.where(allocation.c.host_id.in_(hosts)), _looked_up(there))


def _in_pool(pool: str) -> _Source:
    pooled = vm.alias("pooled")
    return _Source(select(pooled.c.id.label("vm_id")).where(pooled.c.pool == pool), vm.c.pool == pool)


def _by_label(wanted: WantedLabel) -> _Source:
    # By a name of its own, because several may be wanted.
    labels = vm_label.alias()
    having = select(labels.c.vm_id).where(wanted.of(labels))
    has = _looked_up(having.where(labels.c.vm_id == vm.c.id))
    # With any value, they lie by value first.
    return _Source(having, has, labels, wanted.of(labels)) if wanted.value is not None else _Source(having, has)


def _position(after: str) -> tuple[str, UUID]:
    name, _, vm_id = after.partition("/")
    try:
        return name, UUID(vm_id)
    except ValueError as error:
        raise bad_cursor() from error
