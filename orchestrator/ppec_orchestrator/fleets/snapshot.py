# SPDX-License-Identifier: Apache-2.0
"""`ppec-fleet/1`: the planner's fleet in a file, to the last figure; and `ppec-requests/1`, VMs to try on one.

    {"schema": "ppec-fleet/1",
     "profiles": [{"name": "p1", "shape": {"vcpus": 4, "memory_mib": 16384, "disk_mib": 102400}, "architecture": …}],
     "groups": [{"name": "db", "apart": true, "level": "rack"}],
     "prefixes": [{"id": 7, "free_addresses": 1022}],
     "clusters": [{"name": "c1", "n_plus_one": {"mode": "required", "level": "rack"}}],
     "hosts": [{"name": "h1", …, "cells": [{"cell": 0, …}], "vms": [{"name": "db-1", "profile": "p1", …}]}],
     "requests": {"batch": [{"name": "db-2", "profile": "p1", "groups": ["db"]}]}}

A prefix without a bound has no `free_addresses`. A file may list no prefixes at all: then none of them runs out. Of
clusters those are listed that have a rule about N+1.
A host's `generation` is kept: it tells two exports apart between which VMs came and went, though all figures are the
same. Its `mark`, the database's own of the last change of any kind, is left out: nothing is committed on a file.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import MISSING, fields, replace
from itertools import count
from typing import Any
from uuid import UUID

from ppec_contract.vm import NumaPolicy, whole_huge_pages
from ppec_orchestrator.fleets.clusters import cluster_rows, rules_of
from ppec_orchestrator.fleets.faults import FleetError, refuse_doubles, refuse_standing, shown
from ppec_orchestrator.fleets.file import FleetFile, Names, made_up_ids
from ppec_orchestrator.fleets.groups import Member, refuse_contradictions
from ppec_orchestrator.fleets.json_document import validated
from ppec_orchestrator.fleets.places import Places, refuse_unknown_hosts, refuse_unknown_scope
from ppec_orchestrator.fleets.prefixes import prefix_rows, prefixes_of, refuse_unknown_networks, refuse_unknown_prefixes
from ppec_orchestrator.fleets.seats import Seats
from ppec_orchestrator.fleets.snapshot_rows import (
    FLEET,
    REQUESTS,
    REQUESTS_SCHEMA,
    SCHEMA,
    GroupRow,
    HostRow,
    ProfileRow,
    RequestRow,
    VmRow,
    WhereRow,
)
from ppec_orchestrator.placement.fleet import CellState, Fleet, HostState, PoolState, SeatedVm
from ppec_orchestrator.placement.request import (
    ANY_NETWORK,
    NO_SPARE_RULE,
    Group,
    Network,
    Profile,
    Shape,
    SpareRule,
    VmRequest,
    Where,
)

__all__ = ["CALLED", "REQUESTS_SCHEMA", "SCHEMA", "read", "read_requests", "requests_document", "written"]

# Of requests, where the planner has other words. N+1 is no part of the file; it is called what the API calls it.
CALLED = {
    "failed": "excluded_hosts",
    "one-cell": "numa.multi_cell",
    "spare": "n_plus_one",
    "cluster-spare": "cluster.n_plus_one",
}

_NO_RULES: Mapping[str, SpareRule] = {}


# --- reading ---------------------------------------------------------------------------------------------------------


def read(parsed: object, taken: Container[UUID] = ()) -> FleetFile:
    """Raises FleetError. A request without an id gets none of those `taken`."""
    document = validated(FLEET, parsed)
    names = Names(_profiles(document.get("profiles", [])), _groups(document.get("groups", [])))
    rows = document["hosts"]
    refuse_doubles((host["name"] for host in rows), "host", "hosts[{}].name".format)
    refuse_doubles((host["host_id"] for host in rows), "host", "hosts[{}].host_id".format)
    prefixes = document.get("prefixes", [])
    refuse_doubles((prefix["id"] for prefix in prefixes), "prefix", "prefixes[{}].id".format)
    refuse_unknown_prefixes(document)
    spare = rules_of(document.get("clusters", []), {host["cluster"] for host in rows})
    reader, seats, places = _Reader(names, spare), Seats(), Places()
    hosts = []
    for index, row in enumerate(rows):
        host = reader.host(row, f"hosts[{index}]")
        places.check(host, f"hosts[{index}]")
        seats.check(host, f"hosts[{index}]")
        hosts.append(host)
    counts = {prefix["id"]: prefix["free_addresses"] for prefix in prefixes if "free_addresses" in prefix}
    fleet = Fleet.build(hosts, counts)
    requests = reader.requests(document.get("requests", {"batch": []})["batch"], fleet, "requests.batch", taken)
    refuse_contradictions(reader.members)
    return FleetFile(fleet, requests, names, called=CALLED)


def read_requests(parsed: object, beside: FleetFile, taken: Container[UUID] = ()) -> tuple[VmRequest, ...]:
    """Raises FleetError. The file's own profiles and groups stand beside the fleet's, and can't change them. Whether
    the requests go with the fleet's VMs, whose ids are `taken`, is the caller's to see."""
    document, names = validated(REQUESTS, parsed), beside.names
    profiles, groups = _profiles(document.get("profiles", [])), _groups(document.get("groups", []))
    for kind, mine, theirs in (("profiles", profiles, names.profiles), ("groups", groups, names.groups)):
        for index, (name, definition) in enumerate(mine.items()):
            if theirs.get(name, definition) != definition:
                raise FleetError(f"{kind}[{index}]", f"{shown(name)} is defined otherwise in the fleet")
    known = prefixes_of(beside.fleet, names.profiles.values())
    refuse_unknown_networks(document.get("profiles", ()), known)
    reader = _Reader(Names({**names.profiles, **profiles}, {**names.groups, **groups}))
    return reader.requests(document["batch"], beside.fleet, "batch", taken)


def _profiles(rows: Sequence[ProfileRow]) -> dict[str, Profile]:
    refuse_doubles((row["name"] for row in rows), "profile", "profiles[{}].name".format)
    for index, row in enumerate(rows):
        try:
            whole_huge_pages(row["shape"]["memory_mib"], row["shape"].get("numa", NumaPolicy()))
        except ValueError as error:
            raise FleetError(f"profiles[{index}].shape.memory_mib", str(error)) from error
    return {
        row["name"]: Profile(
            Shape(**row["shape"]),
            row["architecture"],
            _where(row.get("where", {})),
            frozenset(row.get("capabilities", ())),
            tuple([None if ids is None else frozenset(ids) for ids in row["networks"]])
            if "networks" in row
            else ANY_NETWORK,
            tuple([frozenset(ids) for ids in row.get("fixed", ())]),
        )
        for row in rows
    }


def _where(row: WhereRow) -> Where:
    places = {key: value for key, value in row.items() if key not in ("labels", "without")}
    return Where(
        **places,  # type: ignore[arg-type]
        labels=frozenset(row.get("labels", ())),
        without=frozenset(row.get("without", ())),
    )


def _groups(rows: Sequence[GroupRow]) -> dict[str, Group]:
    refuse_doubles((row["name"] for row in rows), "group", "groups[{}].name".format)
    return {row["name"]: Group(**row) for row in rows}


class _Reader:
    """Looks up what rows refer to. `members` are the VMs that are in groups, with their places in the file; they are
    listed only where some group holds its own together, for without one no two groups contradict each other."""

    def __init__(self, names: Names, spare: Mapping[str, SpareRule] = _NO_RULES) -> None:
        self._names = names
        self._spare = spare
        self._vms: set[str] = set()
        self._ids: set[UUID] = set()
        self._any_bind = any(group.hard and not group.apart for group in names.groups.values())
        self._known: dict[tuple[str, ...], tuple[Group, ...]] = {}
        self.members: list[Member] = []

    def host(self, row: HostRow, where: str) -> HostState:
        cells = tuple([CellState(**cell) for cell in row["cells"]])
        refuse_doubles((cell.cell for cell in cells), "cell", (where + ".cells[{}].cell").format)
        given = [prefix for family in row.get("prefixes", ()) for prefix in family]
        if len(set(given)) < len(given):
            raise FleetError(f"{where}.prefixes", "a prefix is there twice")
        vms = row.get("vms", ())
        more: dict[str, Any] = {key: row[key] for key in _AS_THEY_ARE if key in row}  # type: ignore[literal-required]
        return HostState(
            **more,
            cells=cells,
            vms=tuple([self._seated(vm, f"{where}.vms[{index}]") for index, vm in enumerate(vms)]),
            prefixes=tuple([tuple(family) for family in row.get("prefixes", ())]),
            capabilities=frozenset(row.get("capabilities", ())),
            pools={name: PoolState(**pool) for name, pool in row.get("pools", {}).items()},
            generation=row.get("generation", 0),
            spare=self._spare.get(row["cluster"], NO_SPARE_RULE),
        )

    def requests(
        self, batch: Sequence[RequestRow], fleet: Fleet, where: str, taken: Container[UUID]
    ) -> tuple[VmRequest, ...]:
        refuse_doubles((row["name"] for row in batch), "VM", (where + "[{}].name").format)
        given = {index: row["vm_id"] for index, row in enumerate(batch) if "vm_id" in row}
        places = [f"{where}[{index}].vm_id" for index in given]
        refuse_doubles(given.values(), "VM", places.__getitem__)
        mine = set(given.values())
        ids = (each for each in made_up_ids(2, taken) if each not in mine and each not in self._ids)
        found = []
        in_scope: set[str] = set()
        for index, row in enumerate(batch):
            place = f"{where}[{index}]"
            refuse_standing(row["name"], self._vms, f"{place}.name")
            if index in given:
                refuse_standing(given[index], self._ids, f"{place}.vm_id")
            profile = self._profile(row["profile"], place)
            if row["profile"] not in in_scope:
                refuse_unknown_scope(profile, fleet, f"{place}.profile")
                in_scope.add(row["profile"])
            refuse_unknown_hosts(row.get("excluded_hosts", ()), fleet, f"{place}.excluded_hosts")
            found.append(
                VmRequest(
                    vm_id=given[index] if index in given else next(ids),
                    name=row["name"],
                    profile=profile,
                    excluded_hosts=frozenset(row.get("excluded_hosts", ())),
                    groups=self._grouped(row.get("groups", ()), place),
                    priority=row.get("priority", 0),
                )
            )
        return tuple(found)

    def _seated(self, row: VmRow, where: str) -> SeatedVm:
        name, vm_id = row["name"], row["vm_id"]
        if name in self._vms or vm_id in self._ids:
            raise FleetError(where, f"VM {shown(name)} ({vm_id}) is there twice")
        self._vms.add(name)
        self._ids.add(vm_id)
        cells = row["cells"]
        if len(cells) > 1 and len(set(cells)) < len(cells):
            raise FleetError(f"{where}.cells", "a cell is there twice")
        groups = self._grouped(row["groups"], where) if "groups" in row else ()
        profile = self._profile(row["profile"], where)
        return SeatedVm(vm_id, name, profile, tuple(cells), groups, row.get("movable", True))

    def _profile(self, name: str, where: str) -> Profile:
        found = self._names.profiles.get(name)
        if found is None:
            raise FleetError(f"{where}.profile", f"there is no profile {shown(name)}")
        return found

    def _grouped(self, names: Sequence[str], where: str) -> tuple[Group, ...]:
        if not names:
            return ()
        key = tuple(names)
        groups = self._known.get(key)
        if groups is None:
            groups = self._known[key] = self._looked_up(names, where)
        if self._any_bind:
            self.members.append((where, groups))
        return groups

    def _looked_up(self, names: Sequence[str], where: str) -> tuple[Group, ...]:
        missing = next((index for index, name in enumerate(names) if name not in self._names.groups), None)
        if missing is not None:
            raise FleetError(f"{where}.groups[{missing}]", f"there is no group {shown(names[missing])}")
        refuse_doubles(names, "group", (where + ".groups[{}]").format)
        return tuple([self._names.groups[name] for name in names])


# --- writing ---------------------------------------------------------------------------------------------------------


def written(fleet: Fleet, requests: Sequence[VmRequest] = (), names: Names | None = None) -> Iterator[str]:
    """The file in pieces of at most a host: a line for each profile, group, prefix, host and request. Profiles keep the
    names that they have in `names`.

    Raises ValueError before the first piece if members of one group define it differently.
    """
    seated = (vm for host in fleet.hosts for vm in host.vms)
    named = _Named(names or Names(), ((vm.profile, vm.groups) for each in (seated, requests) for vm in each))
    yield f'{{"schema": "{SCHEMA}"'
    yield from _listed("profiles", (_profile_row(name, profile) for profile, name in named.profiles.items()))
    yield from _listed("groups", (_plain(group) for group in named.groups.values()))
    yield from _listed("prefixes", prefix_rows(fleet, named.profiles))
    if fleet.spare_rules:
        yield from _listed("clusters", cluster_rows(fleet))
    yield from _listed("hosts", (_host_row(host, named) for host in fleet.hosts))
    if requests:
        yield ',\n"requests": {"batch": [\n'
        yield from _lines(_request_row(request, named) for request in requests)
        yield "\n]}"
    yield "}\n"


def requests_document(requests: Sequence[VmRequest], fleet: Fleet) -> dict[str, Any]:
    """`ppec-requests/1`, to be read beside the snapshot of a live fleet, none of whose profiles are called so. Of the
    prefixes that could give an address those are left that the fleet knows: the others serve none of its hosts."""
    known = prefixes_of(fleet, ())
    narrowed = [
        replace(vm, profile=replace(vm.profile, networks=_known_alone(vm.profile.networks, known))) for vm in requests
    ]
    named = _Named(Names(), ((vm.profile, vm.groups) for vm in narrowed), "asked-{}")
    return {
        "schema": REQUESTS_SCHEMA,
        "profiles": [_profile_row(name, profile) for profile, name in named.profiles.items()],
        "groups": [_plain(group) for group in named.groups.values()],
        "batch": [_request_row(vm, named) for vm in narrowed],
    }


def _known_alone(networks: Iterable[Network], known: Set[int]) -> tuple[Network, ...]:
    return tuple([None if network is None else network & known for network in networks])


class _Named:
    """A name for every profile, and the groups by theirs."""

    def __init__(self, names: Names, members: Iterable[tuple[Profile, tuple[Group, ...]]], called: str = "p{}") -> None:
        self.profiles = {profile: name for name, profile in names.profiles.items()}
        self.groups = dict(names.groups)
        free = (name for number in count(1) if (name := called.format(number)) not in names.profiles)
        # VMs share few profile objects, and hashing one takes longer than finding it. Held, so that ids stay theirs.
        self._by_identity: dict[int, tuple[Profile, str]] = {}
        for profile, groups in members:
            if id(profile) not in self._by_identity:
                if profile not in self.profiles:
                    self.profiles[profile] = next(free)
                self._by_identity[id(profile)] = (profile, self.profiles[profile])
            for group in groups:
                if self.groups.setdefault(group.name, group) != group:
                    raise ValueError(f"group {group.name} is defined in two ways")

    def of(self, profile: Profile) -> str:
        return self._by_identity[id(profile)][1]


def _listed(name: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    yield f',\n"{name}": [\n'
    yield from _lines(rows)
    yield "\n]"


def _lines(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    between = ""
    for row in rows:
        yield between + json.dumps(row, separators=(",", ":"))
        between = ",\n"


def _plain(value: Any) -> dict[str, Any]:
    """The fields of a flat dataclass that don't have their default."""
    found = {}
    for each in fields(value):
        mine = getattr(value, each.name)
        if each.default is MISSING or mine != each.default:
            found[each.name] = mine
    return found


def _profile_row(name: str, profile: Profile) -> dict[str, Any]:
    where = {key: value for key, value in _plain(profile.where).items() if key not in ("labels", "without")}
    pairs = {"labels": sorted(profile.where.labels), "without": sorted(profile.where.without)}
    where |= {key: found for key, found in pairs.items() if found}
    shape = _plain(profile.shape) | {"numa": profile.shape.numa.model_dump(mode="json", exclude_defaults=True)}
    row = {"name": name, "shape": {key: value for key, value in shape.items() if value != {}}}
    row |= {"architecture": profile.architecture}
    more = {"where": where, "capabilities": sorted(profile.capabilities)}
    row |= {key: value for key, value in more.items() if value}
    if profile.networks != ANY_NETWORK:
        row["networks"] = [None if ids is None else sorted(ids) for ids in profile.networks]
    if profile.fixed:
        row["fixed"] = [sorted(ids) for ids in profile.fixed]
    return row


def _host_row(host: HostState, named: _Named) -> dict[str, Any]:
    row: dict[str, Any] = {key: getattr(host, key) for key in _AS_THEY_ARE}
    row["labels"] = dict(host.labels)
    row["cells"] = [_plain(cell) for cell in host.cells]
    more = {
        "prefixes": host.prefixes,
        "capabilities": sorted(host.capabilities),
        "pools": {name: _plain(pool) for name, pool in host.pools.items()},
        "vms": [_vm_row(vm, named) for vm in host.vms],
        "generation": host.generation,
    }
    return row | {key: value for key, value in more.items() if value}


def _vm_row(vm: SeatedVm, named: _Named) -> dict[str, Any]:
    row = {"vm_id": str(vm.vm_id), "name": vm.name, "profile": named.of(vm.profile), "cells": vm.cells}
    if vm.groups:
        row["groups"] = [group.name for group in vm.groups]
    return row if vm.movable else row | {"movable": False}


def _request_row(request: VmRequest, named: _Named) -> dict[str, Any]:
    row = {"vm_id": str(request.vm_id), "name": request.name, "profile": named.of(request.profile)}
    more = {
        "excluded_hosts": sorted(request.excluded_hosts),
        "groups": [group.name for group in request.groups],
        "priority": request.priority,
    }
    return row | {key: value for key, value in more.items() if value}


# Fields of a host that are the same in its row.
_AS_THEY_ARE = (
    "host_id",
    "name",
    "region",
    "datacentre",
    "cluster",
    "rack",
    "vrf",
    "architecture",
    "disk_mib",
    "disk_free_mib",
    "live",
    "draining",
    "labels",
)
