# SPDX-License-Identifier: Apache-2.0
"""Small fleets whose VMs are known and account for all that is used, made from a seed; and an account of their cells
that shares nothing with the product's but the rules.

What a VM takes of a cell: whole cores under its vCPUs (`isolate`: one each), or shared vCPUs; its memory, ordinary or
on huge pages; over several cells of one width an equal part of each, rounded up, of at least a core and a MiB or page.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import combinations
from math import ceil
from uuid import UUID

from ppec_contract.vm import CpuPolicy, NumaPolicy, SmtPolicy
from ppec_orchestrator.placement.fleet import CellState, Fleet, HostState, SeatedVm
from ppec_orchestrator.placement.request import Group, Level, Profile, Shape, Where

GROUPS = (
    Group("apart"),
    Group("racks", level=Level.RACK),
    Group("same", apart=False),
    Group("near", apart=False, level=Level.RACK),
    Group("rather-apart", hard=False),
)
NUMAS = (
    NumaPolicy(),
    NumaPolicy(),
    NumaPolicy(),
    NumaPolicy(smt=SmtPolicy.ISOLATE),
    NumaPolicy(smt=SmtPolicy.REQUIRE),
    NumaPolicy(cpus=CpuPolicy.SHARED),
    NumaPolicy(multi_cell=True),
    NumaPolicy(multi_cell=True),
    NumaPolicy(huge_page_kib=2048),
)
# A cell's seat: the positions of its cells in the host, and what it takes of each.
ASeat = tuple[tuple[int, ...], dict[str, int]]
_FREE = {
    "cores": "cores_free",
    "memory_mib": "memory_free_mib",
    "shared_vcpus": "shared_vcpus_free",
    "pages_2m": "pages_2m_free",
}


def of_one_cell(shape: Shape, cell: CellState, parts: int = 1) -> dict[str, int] | None:
    """What one of so many cells gives; None if such a cell can't."""
    numa = shape.numa
    taken = {}
    if numa.cpus is CpuPolicy.SHARED:
        if cell.shared_cpus < shape.vcpus:
            return None
        taken["shared_vcpus"] = shape.vcpus
    else:
        if numa.smt is SmtPolicy.REQUIRE and cell.threads_per_core < 2:
            return None
        threads = 1 if numa.smt is SmtPolicy.ISOLATE else cell.threads_per_core
        if ceil(shape.vcpus / threads) < parts:
            return None
        taken["cores"] = ceil(shape.vcpus / (threads * parts))
    units = shape.memory_mib // 2 if numa.huge_page_kib else shape.memory_mib
    taken["pages_2m" if numa.huge_page_kib else "memory_mib"] = ceil(units / parts)
    return taken


class Account:
    """What is free on every host, to be taken and given back."""

    def __init__(self, fleet: Fleet) -> None:
        self.hosts = fleet.hosts
        self.free = [[{name: getattr(c, free) for name, free in _FREE.items()} for c in h.cells] for h in fleet.hosts]
        self.disk = [h.disk_free_mib for h in fleet.hosts]

    def seats(self, shape: Shape, row: int) -> Iterator[ASeat]:
        """Every way to sit there, the fewest cells first."""
        cells = self.hosts[row].cells
        if self.disk[row] < shape.disk_mib:
            return
        for parts in range(1, (len(cells) if shape.numa.multi_cell else 1) + 1):
            for columns in combinations(range(len(cells)), parts):
                if len({cells[c].threads_per_core for c in columns}) > 1 or parts > min(shape.vcpus, shape.memory_mib):
                    continue
                taken = of_one_cell(shape, cells[columns[0]], parts)
                if taken and all(of_one_cell(shape, cells[c], parts) and self.holds(row, c, taken) for c in columns):
                    yield columns, taken

    def holds(self, row: int, column: int, taken: dict[str, int]) -> bool:
        return all(self.free[row][column][name] >= amount for name, amount in taken.items())

    def take(self, shape: Shape, row: int, seat: ASeat, sign: int = 1) -> None:
        columns, taken = seat
        for column in columns:
            for name, amount in taken.items():
                self.free[row][column][name] -= sign * amount
        self.disk[row] -= sign * shape.disk_mib

    def hosts_now(self) -> list[HostState]:
        """The hosts with what is free in this account."""
        return [
            replace(
                host,
                disk_free_mib=self.disk[row],
                cells=tuple(
                    replace(cell, **{_FREE[name]: amount for name, amount in self.free[row][column].items()})
                    for column, cell in enumerate(host.cells)
                ),
            )
            for row, host in enumerate(self.hosts)
        ]


def may_stand(profile: Profile, host: HostState) -> bool:
    """By all rules but room and groups, of those that these fleets and profiles know."""
    where = profile.where
    return host.live and not host.draining and where.vrf in (None, host.vrf) and where.host in (None, host.name)


def place_of(host: HostState, level: Level) -> str:
    return host.name if level is Level.HOST else host.rack


def groups_kept(vm: SeatedVm, host: HostState, others: Iterable[tuple[SeatedVm, HostState]]) -> bool:
    for group in vm.groups:
        members = {place_of(at, group.level) for other, at in others if group in other.groups}
        there = place_of(host, group.level) in members
        if group.hard and (there if group.apart else members and not there):
            return False
    return True


def a_cell(rng: random.Random, number: int, threads: int, size: int) -> CellState:
    cores, memory_mib, pages = rng.choice((2, 4, 4, 6)) * size, rng.choice((4, 8, 8, 12)) * size, rng.choice((0, 2, 4))
    shared = rng.choice((0, 4))
    return CellState(
        number, number // 2, threads, cores, cores, memory_mib, memory_mib, shared, shared * 2, shared * 2, pages, pages
    )


def a_shape(rng: random.Random) -> Shape:
    numa = rng.choice(NUMAS)
    vcpus, memory_mib = ((4, 6, 8, 12), (2, 6, 12)) if numa.multi_cell else ((2, 2, 4, 4, 6, 8), (2, 2, 4, 6))
    return Shape(rng.choice(vcpus), rng.choice(memory_mib), rng.choice((1, 1, 20)), numa)


def a_profile(rng: random.Random) -> Profile:
    return Profile(a_shape(rng), "x86_64", Where(vrf="v1") if rng.random() < 0.1 else Where())


def some_groups(rng: random.Random) -> tuple[Group, ...]:
    return tuple(rng.sample(GROUPS, rng.choice((0, 0, 0, 0, 1, 1, 2))))


def an_occupied_fleet(
    rng: random.Random,
    most_hosts: int = 4,
    most_vms: int = 7,
    clusters: tuple[str, ...] = ("c1",),
    most_cells: int = 2,
    size: int = 1,
) -> Fleet:
    hosts = []
    for number in range(rng.randint(2, most_hosts)):
        cells = [
            a_cell(rng, each * 3 + 1, rng.choice((1, 2, 2)) if rng.random() < 0.2 else 2, size)
            for each in range(rng.randint(1, most_cells))
        ]
        cluster = clusters[number % len(clusters)]
        hosts.append(
            HostState(
                number,
                f"h{number}",
                "d1",
                cluster,
                f"{cluster}-r{rng.randint(0, 2)}",
                "v2" if rng.random() < 0.1 else "v1",
                "x86_64",
                tuple(cells),
                100,
                100,
                live=rng.random() < 0.93,
                draining=rng.random() < 0.07,
                prefixes=((1,),) if rng.random() < 0.9 else ((1, 2),),
            )
        )
    account = Account(Fleet.build(hosts))
    seated: list[list[SeatedVm]] = [[] for _ in hosts]
    for number in range(rng.randint(0, most_vms)):
        profile, row = a_profile(rng), rng.randrange(len(hosts))
        seats = list(account.seats(profile.shape, row))
        if not seats:
            continue
        seat = rng.choice(seats)
        account.take(profile.shape, row, seat)
        names = tuple(account.hosts[row].cells[column].cell for column in seat[0])
        vm = SeatedVm(UUID(int=1000 + number), f"old-{number}", profile, names, some_groups(rng), rng.random() < 0.9)
        seated[row].append(vm)
    return Fleet.build(
        [replace(host, vms=tuple(vms)) for host, vms in zip(account.hosts_now(), seated, strict=True)], {1: 20, 2: 20}
    )
