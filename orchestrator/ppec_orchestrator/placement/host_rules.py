# SPDX-License-Identifier: Apache-2.0
"""One host, by the rules in plain words: may a VM stand there, which prefixes give its addresses, which cells have room
for it, and what it would leave in them. For the checker, and with none of the planner's code but its data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from math import inf
from typing import TypeVar

from ppec_contract.vm import CpuPolicy, SmtPolicy
from ppec_orchestrator.placement.fleet import CellState, HostState, IntArray
from ppec_orchestrator.placement.request import Network, Profile, Shape

# What a cell has free, or a VM takes of it, by resource.
Part = Mapping[str, int]
# What is free on one host, or a VM takes of it, by the number of the cell.
Seat = Mapping[int, Part]
_PLACES = ("region", "datacentre", "cluster", "rack", "vrf")
_PAGES = {0: "memory_mib", 2048: "pages_2m", 1048576: "pages_1g"}
_MOST_CELLS = 16
_Threads = TypeVar("_Threads", int, IntArray)


def may_stand(host: HostState, profile: Profile) -> bool:
    """Whatever is free there."""
    where = profile.where
    places = {"name": where.host} | {place: getattr(where, place) for place in _PLACES}
    there = all(wanted is None or getattr(host, place) == wanted for place, wanted in places.items())
    labels = all(_has(host, *each) for each in where.labels) and not any(_has(host, *each) for each in where.without)
    # Of an address that is the VM's by number only the prefix matters.
    served = all(any(prefix in family for family in host.prefixes for prefix in network) for network in profile.fixed)
    known = profile.capabilities <= host.capabilities and profile.architecture == host.architecture
    return host.live and not host.draining and known and there and labels and served


def _has(host: HostState, key: str, value: str) -> bool:
    return key in host.labels and value in ("", host.labels[key])


def granted(host: HostState, networks: Sequence[Network], left: Mapping[int, int]) -> list[int] | None:
    """The prefix of each address, networks that name prefixes first; None where one is lacking. `left` counts the
    addresses of prefixes that have an end."""
    chosen: list[int] = []
    for network in sorted(networks, key=lambda each: each is None):
        named = [[prefix for family in host.prefixes for prefix in family if network and prefix in network]]
        for family in host.prefixes if network is None else named:
            free = [p for p in family if left.get(p, 1 + chosen.count(p)) > chosen.count(p)]
            if not free:
                return None
            chosen.append(free[0])
    return chosen if host.prefixes else None


def seats(host: HostState, shape: Shape, free: Seat) -> Iterator[Seat]:
    """All that the VM could have: of the fewest cells that will do, in equal parts of cores of one width."""
    most = min(_MOST_CELLS, len(host.cells), shape.vcpus, units(shape)) if shape.numa.multi_cell else 1
    for count in range(1, most + 1):
        able: dict[int, tuple[Part, list[CellState]]] = {}
        for cell in host.cells:
            part = part_of(shape, cell, count)
            if part is not None and gives(free[cell.cell], part):
                able.setdefault(cell.threads_per_core, (part, []))[1].append(cell)
        enough = [(part, cells) for part, cells in able.values() if len(cells) >= count]
        for part, cells in enough:
            yield from (dict.fromkeys(chosen, part) for chosen in _chosen(cells, count))
        if enough:
            return


def _chosen(cells: Sequence[CellState], count: int) -> Iterator[tuple[int, ...]]:
    """So many of the cells; of one socket where one has enough."""
    sockets: dict[int, list[int]] = {}
    for cell in cells:
        sockets.setdefault(cell.socket, []).append(cell.cell)
    near = [each for each in sockets.values() if len(each) >= count]
    for each in near or [[cell.cell for cell in cells]]:
        yield from combinations(sorted(each), count)


def gives(free: Part, part: Part) -> bool:
    return all(free[resource] >= amount for resource, amount in part.items())


def part_of(shape: Shape, cell: CellState, count: int) -> Part | None:
    """What each of so many cells like this one gives; None where the VM can't use it, or not so many."""
    numa, whole = shape.numa, cpus(shape, cell.threads_per_core)
    narrow = numa.smt is SmtPolicy.REQUIRE and cell.threads_per_core == 1
    if narrow or whole < count or (numa.cpus is CpuPolicy.SHARED and cell.shared_cpus < shape.vcpus):
        return None
    cpu, memory = _resources(shape)
    return {cpu: -(-whole // count), memory: -(-units(shape) // count), "nvme": -(-shape.nvme // count)}


def cpus(shape: Shape, threads: _Threads) -> _Threads:
    """Cores of so many threads, as SMT siblings never serve two VMs; or vCPUs of shared ones."""
    alone = shape.numa.cpus is CpuPolicy.SHARED or shape.numa.smt is SmtPolicy.ISOLATE
    return -(-shape.vcpus // (threads**0 if alone else threads))


def units(shape: Shape) -> int:
    """Of memory: MiB, or huge pages."""
    return shape.memory_mib * 1024 // (shape.numa.huge_page_kib or 1024)


def _resources(shape: Shape) -> tuple[str, str]:
    """What the VM takes its CPUs of, and its memory."""
    return "shared_vcpus" if shape.numa.cpus is CpuPolicy.SHARED else "cores", _PAGES[shape.numa.huge_page_kib]


def left(host: HostState, shape: Shape, free: Seat) -> float:
    """Cores left, then MiB or pages, in the cell with the fewest; over several cells, their number and the host's CPUs.
    Infinite where none has room."""
    least, (cpu, memory) = inf, _resources(shape)
    for seat in seats(host, shape, free):
        if len(seat) > 1:
            usable = (cell.cell for cell in host.cells if part_of(shape, cell, 1))
            return (len(seat) - 1) * 2.0**53 + sum(free[cell][cpu] for cell in usable) * 2.0**40
        for cell, part in seat.items():
            least = min(least, (free[cell][cpu] - part[cpu]) * 2.0**40 + free[cell][memory] - part[memory])
    return least
