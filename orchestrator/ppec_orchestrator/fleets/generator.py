# SPDX-License-Identifier: Apache-2.0
"""Fleets made up: as large as wanted, of the sizes of a real one, and the same for the same seed.

Three classes of host of two sockets; twelve flavors, of which the small ones are many; hosts filled around a mean, each
VM put into the fuller socket that still takes it. With `varied`, hosts and flavors also differ in what most fleets have
only in parts: SMT, huge pages, shared CPUs, NVMe drives, labels, a storage pool.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from uuid import UUID

from ppec_contract.vm import CpuPolicy, NumaPolicy, SmtPolicy
from ppec_orchestrator.fleets.file import FleetFile, Names, made_up_ids
from ppec_orchestrator.placement.demand import (
    CellResource,
    cpu_part,
    cpu_resource,
    free_name,
    memory_part,
    memory_resource,
)
from ppec_orchestrator.placement.fleet import CellState, Fleet, HostState, PoolState, SeatedVm
from ppec_orchestrator.placement.request import Group, Profile, Shape, VmRequest, Where

GIB = 1024
CORES_RESERVED, MEMORY_RESERVED_MIB = 2, 8 * GIB
ARCHITECTURE = "x86_64"
_RACKS = 8
_MISSES = 12


@dataclass(frozen=True, slots=True)
class Recipe:
    """`fill` is the mean share of a host's cores that is taken, `spread` its standard deviation. With `apart` the VMs
    of one app stand on hosts of their own."""

    hosts: int
    clusters: int = 1
    seed: int = 1
    fill: float = 0.65
    spread: float = 0.18
    requests: int = 10_000
    apart: bool = True
    varied: bool = False


@dataclass(frozen=True, slots=True)
class _Class:
    """A class of host: what each of its two sockets has, and its disk."""

    name: str
    weight: int
    cores: int
    memory_mib: int
    disk_mib: int


_CLASSES = (
    _Class("s104", 55, 52, 384 * GIB, 7 * 1024 * GIB),
    _Class("m128", 35, 64, 512 * GIB, 14 * 1024 * GIB),
    _Class("l192", 10, 96, 768 * GIB, 14 * 1024 * GIB),
)


def _flavor(weight: int, vcpus: int, memory_gib: int, disk_gib: int) -> tuple[str, int, Shape]:
    return f"c{vcpus}.{memory_gib}", weight, Shape(vcpus, memory_gib * GIB, disk_gib * GIB)


# Name, weight, shape. Even vCPUs, and one socket takes each.
FLAVORS = (
    _flavor(14, 2, 4, 40),
    _flavor(14, 2, 8, 60),
    _flavor(20, 4, 16, 100),
    _flavor(8, 4, 32, 100),
    _flavor(16, 8, 32, 200),
    _flavor(8, 8, 64, 400),
    _flavor(5, 12, 96, 400),
    _flavor(6, 16, 64, 300),
    _flavor(4, 16, 128, 800),
    _flavor(2, 24, 192, 1200),
    _flavor(2, 32, 256, 1600),
    _flavor(1, 48, 320, 2000),
)
# Besides, in a varied fleet: with the labels their hosts must have.
_VARIED: tuple[tuple[str, int, Shape, frozenset[tuple[str, str]]], ...] = (
    ("smt8.32", 6, Shape(8, 32 * GIB, 100 * GIB, NumaPolicy(smt=SmtPolicy.REQUIRE)), frozenset()),
    ("iso4.16", 6, Shape(4, 16 * GIB, 100 * GIB, NumaPolicy(smt=SmtPolicy.ISOLATE)), frozenset()),
    ("huge8.32", 6, Shape(8, 32 * GIB, 100 * GIB, NumaPolicy(huge_page_kib=2048)), frozenset()),
    ("shared2.4", 8, Shape(2, 4 * GIB, 20 * GIB, NumaPolicy(cpus=CpuPolicy.SHARED)), frozenset()),
    ("nvme8.64", 3, Shape(8, 64 * GIB, 20 * GIB, nvme=1), frozenset()),
    ("wide64.512", 1, Shape(64, 512 * GIB, 400 * GIB, NumaPolicy(multi_cell=True)), frozenset()),
    ("pool4.16", 4, Shape(4, 16 * GIB, 200 * GIB, pool="san"), frozenset()),
    ("gold4.16", 4, Shape(4, 16 * GIB, 100 * GIB), frozenset({("tier", "gold")})),
)


def generate(recipe: Recipe) -> FleetFile:
    """The fleet and its requests; a request is of a flavor and, mostly, of an app that has VMs already."""
    dice = random.Random(recipe.seed)  # noqa: S311 - nothing secret is drawn, and a seed is to give the same again
    profiles = _Profiles(recipe)
    ids = made_up_ids(1)
    hosts = [_Filling(number, recipe, dice).filled(profiles, ids) for number in range(recipe.hosts)]
    requests = tuple(
        VmRequest(vm_id, f"new-{number:05d}", profiles.pick(dice), groups=_app(recipe, dice.randrange(recipe.hosts)))
        for number, vm_id in zip(range(recipe.requests), made_up_ids(2), strict=False)
    )
    return FleetFile(Fleet.build(hosts), requests, Names(profiles.by_name))


class _Profiles:
    """The flavors, to be drawn by weight."""

    def __init__(self, recipe: Recipe) -> None:
        rows = [(name, weight, shape, frozenset[tuple[str, str]]()) for name, weight, shape in FLAVORS]
        rows += _VARIED if recipe.varied else ()
        self.by_name = {name: Profile(shape, ARCHITECTURE, Where(labels=labels)) for name, _, shape, labels in rows}
        self._all = tuple(self.by_name.values())
        self._up_to = tuple(accumulate(weight for _, weight, _, _ in rows))

    def pick(self, dice: random.Random) -> Profile:
        return dice.choices(self._all, cum_weights=self._up_to)[0]


def _app(recipe: Recipe, number: int) -> tuple[Group, ...]:
    return (Group(f"app:a{number:05d}"),) if recipe.apart else ()


class _Filling:
    """One host while VMs are put into it."""

    def __init__(self, number: int, recipe: Recipe, dice: random.Random) -> None:
        self._recipe = recipe
        self._dice = dice
        kind = dice.choices(_CLASSES, weights=[each.weight for each in _CLASSES])[0]
        cluster = f"g{number * recipe.clusters // recipe.hosts:03d}"
        self._host = HostState(
            host_id=number + 1,
            name=f"h{number:05d}",
            datacentre="d1",
            cluster=cluster,
            rack=f"{cluster}-r{number % _RACKS:02d}",
            vrf="v1",
            architecture=ARCHITECTURE,
            cells=(_cell(kind, 0), _cell(kind, 1)),
            disk_mib=kind.disk_mib,
            disk_free_mib=kind.disk_mib,
            prefixes=((1,),),
            region="r1",
            labels={"class": kind.name},
        )
        if recipe.varied:
            self._vary()
        self._cells = [
            {resource: getattr(cell, free_name(resource)) for resource in _TAKEN} for cell in self._host.cells
        ]
        self._disk_free_mib = self._host.disk_free_mib

    def filled(self, profiles: _Profiles, ids: Iterator[UUID]) -> HostState:
        """With VMs up to about the recipe's fill; twelve in a row that don't fit end it before."""
        wanted = min(0.97, max(0.05, self._dice.gauss(self._recipe.fill, self._recipe.spread)))
        cores = sum(cell.cores for cell in self._host.cells)
        vms: list[SeatedVm] = []
        apps: set[int] = set()
        misses = 0
        while cores - sum(cell["cores"] for cell in self._cells) < wanted * cores and misses < _MISSES:
            profile = profiles.pick(self._dice)
            cell = self._seat(profile)
            if cell is None:
                misses += 1
                continue
            misses = 0
            app = self._dice.randrange(self._recipe.hosts)
            # An app's VMs stand on hosts of their own; where there are few hosts, a VM may be of none.
            groups = () if app in apps else _app(self._recipe, app)
            apps.add(app)
            vm_id = next(ids)
            vms.append(SeatedVm(vm_id, f"v{vm_id.int & 0xFFFFFFFF:06d}", profile, (cell,), groups))
        return self._done(vms)

    def _seat(self, profile: Profile) -> int | None:
        shape = profile.shape
        if shape.pool or shape.nvme or shape.numa.multi_cell or not _labelled(self._host, profile.where):
            return None
        if shape.disk_mib >= self._disk_free_mib:
            return None
        parts = [_part(shape, cell.threads_per_core) for cell in self._host.cells]
        fits = [
            number
            for number, (part, cell, free) in enumerate(zip(parts, self._host.cells, self._cells, strict=True))
            if _usable(shape, cell) and all(free[resource] >= amount for resource, amount in part.items())
        ]
        if not fits:
            return None
        chosen = min(fits, key=lambda number: (self._cells[number]["cores"], number))
        for resource, amount in parts[chosen].items():
            self._cells[chosen][resource] -= amount
        self._disk_free_mib -= shape.disk_mib
        return chosen

    def _done(self, vms: Sequence[SeatedVm]) -> HostState:
        cells = tuple(
            replace(cell, **{free_name(resource): amount for resource, amount in free.items()})
            for cell, free in zip(self._host.cells, self._cells, strict=True)
        )
        return replace(self._host, cells=cells, disk_free_mib=self._disk_free_mib, vms=tuple(vms))

    def _vary(self) -> None:
        dice = self._dice
        labels = {**self._host.labels, "tier": dice.choice(("gold", "silver"))}
        threads, huge, shared, drives = dice.choice((1, 2)), dice.random(), dice.random(), dice.choice((0, 0, 2))
        cells = tuple(_varied(cell, threads, huge < 0.25, shared < 0.2, drives) for cell in self._host.cells)
        pool = {"san": PoolState(20 * 1024 * GIB, dice.randrange(20 * 1024) * GIB)} if dice.random() < 0.3 else {}
        self._host = replace(self._host, cells=cells, labels=labels, pools=pool)


_TAKEN: tuple[CellResource, ...] = ("cores", "memory_mib", "shared_vcpus", "pages_2m")


def _part(shape: Shape, threads: int) -> Mapping[CellResource, int]:
    return {cpu_resource(shape): cpu_part(shape, threads), memory_resource(shape): memory_part(shape)}


def _usable(shape: Shape, cell: CellState) -> bool:
    if shape.numa.cpus is CpuPolicy.SHARED:
        return cell.shared_cpus >= shape.vcpus
    return shape.numa.smt is not SmtPolicy.REQUIRE or cell.threads_per_core > 1


def _labelled(host: HostState, where: Where) -> bool:
    return all(host.labels.get(key) == value for key, value in where.labels)


def _cell(kind: _Class, number: int) -> CellState:
    cores, memory_mib = kind.cores - CORES_RESERVED, kind.memory_mib - MEMORY_RESERVED_MIB
    return CellState(
        cell=number,
        socket=number,
        threads_per_core=1,
        cores=cores,
        cores_free=cores,
        memory_mib=memory_mib,
        memory_free_mib=memory_mib,
        cores_reserved=CORES_RESERVED,
        memory_reserved_mib=MEMORY_RESERVED_MIB,
    )


def _varied(cell: CellState, threads: int, huge: bool, shared: bool, drives: int) -> CellState:
    """The cell with its CPUs as threads of fewer cores, a quarter of its memory as huge pages, a quarter of its cores
    set aside for sharing (four vCPUs to a CPU), and drives."""
    cores = cell.cores // threads
    aside = cores // 4 if shared else 0
    pages = cell.memory_mib // 4 // 2 if huge else 0
    vcpus = aside * threads * 4
    cores, memory_mib = cores - aside, cell.memory_mib - pages * 2
    return replace(
        cell,
        threads_per_core=threads,
        cores=cores,
        cores_free=cores,
        memory_mib=memory_mib,
        memory_free_mib=memory_mib,
        shared_cpus=aside * threads,
        shared_vcpus=vcpus,
        shared_vcpus_free=vcpus,
        pages_2m=pages,
        pages_2m_free=pages,
        nvme=drives,
        nvme_free=drives,
    )
