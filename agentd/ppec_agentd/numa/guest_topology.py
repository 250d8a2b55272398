# SPDX-License-Identifier: Apache-2.0
"""What the guest is shown of the host under it: siblings that are siblings, cells that mirror cells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from ppec_agentd.numa.plan import GuestCell
from ppec_agentd.topology import LOCAL_DISTANCE, REMOTE_DISTANCE, Topology
from ppec_contract.vm import VcpuPin

# libvirt takes 10 for a cell itself and up to 254 for the others; some firmware tells nonsense.
_NEAREST, _FARTHEST = 11, 254


def threads_shown(
    topology: Topology, pins: Sequence[VcpuPin], most_vcpus: int, guest_cells: Sequence[GuestCell] = ()
) -> int:
    """The widest SMT the guest may be shown: each so many consecutive vCPUs, from the first, sit on one host core.

    It divides `most_vcpus` too, of which the guest's topology is made even while it has fewer; and none of the cores so
    made reaches over two of the guest's cells, which were made for what it had when it started.
    """
    cell_of = {vcpu: cell.cell for cell in guest_cells for vcpu in cell.vcpus}
    cores = topology.core_of_cpu
    on = [cores[pin.pcpu].cpus[0] if pin.pcpu in cores else -1 - pin.vcpu for pin in pins]
    widest = max((len(cores[pin.pcpu].cpus) for pin in pins if pin.pcpu in cores), default=1)
    for threads in range(widest, 1, -1):
        if len(on) % threads or most_vcpus % threads:
            continue
        cells = [cell_of.get(vcpu) for vcpu in range(most_vcpus)]
        if _in_blocks(on, threads) and _in_blocks(cells, threads):
            return threads
    return 1


def _in_blocks(places: Sequence[int | None], threads: int) -> bool:
    """Whether each so many that follow one another are at one place."""
    return all(len(set(places[first : first + threads])) == 1 for first in range(0, len(places), threads))


def mirror(
    topology: Topology, pins: Sequence[VcpuPin], most_vcpus: int, memory_only: Iterable[int] = ()
) -> tuple[GuestCell, ...]:
    """One guest cell per host cell that the pins use or that gives memory only, ascending."""
    at = topology.cell_of_cpu
    members: dict[int, list[int]] = {}
    for pin in pins:
        members.setdefault(at[pin.pcpu], []).append(pin.vcpu)
    _seat_growth(members, len(pins), most_vcpus, threads_shown(topology, pins, most_vcpus))
    return _with_distances(topology, members | {cell: [] for cell in memory_only})


def regrown(topology: Topology, cells: Sequence[GuestCell], most_vcpus: int, threads: int) -> tuple[GuestCell, ...]:
    """The same cells for another number of vCPUs at most; each vCPU stays in its cell."""
    members = {cell.cell: [vcpu for vcpu in cell.vcpus if vcpu < most_vcpus] for cell in cells if cell.vcpus}
    known = sum(len(vcpus) for vcpus in members.values())
    _seat_growth(members, known, most_vcpus, threads)
    memory = {cell.cell: cell.memory_mib for cell in cells}
    fresh = _with_distances(topology, members | {cell.cell: [] for cell in cells if not cell.vcpus})
    return tuple(replace(cell, memory_mib=memory[cell.cell]) for cell in fresh)


def _seat_growth(members: dict[int, list[int]], first: int, most: int, threads: int) -> None:
    """vCPUs that the guest may yet get go, a core at a time, where the fewest are."""
    for vcpu in range(first, most, threads):
        emptiest = min(members, key=lambda cell: (len(members[cell]), cell))
        members[emptiest] += range(vcpu, min(vcpu + threads, most))


def _with_distances(topology: Topology, members: Mapping[int, Sequence[int]]) -> tuple[GuestCell, ...]:
    cells = sorted(members)
    return tuple(
        GuestCell(cell, tuple(sorted(members[cell])), 0, tuple(_distance(topology, cell, other) for other in cells))
        for cell in cells
    )


def _distance(topology: Topology, cell: int, other: int) -> int:
    if cell == other:
        return LOCAL_DISTANCE
    known = dict(topology.by_cell[cell].distances) if cell in topology.by_cell else {}
    return min(_FARTHEST, max(_NEAREST, known.get(other, REMOTE_DISTANCE)))
