# SPDX-License-Identifier: Apache-2.0
"""Seats for many VMs at once by filling the cells of hosts (`filling.py`), where each VM takes one cell and minds no
other: for a batch, of whose policy nothing is kept, and for what is lost with a host."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ppec_orchestrator.placement.demand import CELL_RESOURCES, CellResource
from ppec_orchestrator.placement.filling import Cells, Filling
from ppec_orchestrator.placement.fitting import NEEDS_TOO_MUCH, Fitting
from ppec_orchestrator.placement.fleet import BoolArray, IntArray, at
from ppec_orchestrator.placement.knapsacks import Knapsacks
from ppec_orchestrator.placement.neighbours import Neighbours
from ppec_orchestrator.placement.request import PlanRequest, VmRequest
from ppec_orchestrator.placement.search import CandidatesOf
from ppec_orchestrator.placement.workspace import Seat, Workspace

# Of more kinds a cell has more fillings than can be looked at.
MOST_KINDS = 32


@dataclass(frozen=True, slots=True)
class Kind:
    """VMs that go to the same hosts, where `stands` is true and there is room, and take the same there."""

    fitting: Fitting
    stands: BoolArray


@dataclass(frozen=True, slots=True)
class Free:
    """By resource, shape (hosts, cells), and by pool, shape (hosts,)."""

    cells: Mapping[CellResource, IntArray]
    disk: Mapping[str, IntArray]


@dataclass(frozen=True, slots=True)
class Filled:
    """A seat for each of the VMs, in their order; without any, `impossible` says that there is no way. And in how many
    steps."""

    seats: list[Seat] | None
    impossible: bool = False
    steps: int = 0


def fill(free: Free, kinds: Sequence[Hashable], of_kinds: Sequence[Kind], most_steps: int) -> Filled:
    """`kinds` says of each VM which kind it is of, `of_kinds` what the kinds are, in the order they first come in."""
    if not kinds:
        return Filled([])
    numbers = list(_by_kind(kinds).values())
    cells, rows, columns = _cells(free, of_kinds)
    filling = Filling(cells, [len(mine) for mine in numbers], most_steps)
    found = filling.run()
    steps = most_steps - filling.steps_left
    if found is None:
        return Filled(None, filling.exhausted, steps)
    seats = _seats(found, numbers, rows, columns)
    return Filled([seats[number] for number in range(len(kinds))], steps=steps)


def fill_with_the_most(
    free: Free, kinds: Sequence[Hashable], of_kinds: Sequence[Kind], worths: Sequence[int], most_steps: int
) -> list[Seat | None]:
    """As `fill`, of VMs that are too many: seats for those that are worth the most together, None for the others.
    `worths` are the VMs', those of one kind alike; of one kind the first have a seat."""
    numbers = list(_by_kind(kinds).values())
    cells, rows, columns = _cells(free, of_kinds)
    if not len(rows):
        return [None] * len(kinds)
    counts, worth_of_one = [len(mine) for mine in numbers], [worths[mine[0]] for mine in numbers]
    seats = _seats(Knapsacks(cells, counts, worth_of_one, most_steps).run(), numbers, rows, columns)
    return [seats.get(number) for number in range(len(kinds))]


def _by_kind(kinds: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    numbers: defaultdict[Hashable, list[int]] = defaultdict(list)
    for number, kind in enumerate(kinds):
        numbers[kind].append(number)
    return numbers


def _seats(
    found: Iterable[tuple[int, int]], numbers: Sequence[Iterable[int]], rows: IntArray, columns: IntArray
) -> dict[int, Seat]:
    """By the VMs' numbers, for a cell and a kind each."""
    waiting = [iter(mine) for mine in numbers]
    return {next(waiting[kind]): (rows.item(cell), (columns.item(cell),)) for cell, kind in found}


def _cells(free: Free, kinds: Sequence[Kind]) -> tuple[Cells, IntArray, IntArray]:
    """Those with room for a VM of any kind, and their rows and columns. Hosts that hold more than they have, have
    nothing left."""
    some = np.flatnonzero(np.logical_or.reduce([kind.stands for kind in kinds]))
    resources = [each for each in CELL_RESOURCES if any(each in kind.fitting.resources for kind in kinds)]
    room: IntArray = np.stack([free.cells[each][some] for each in resources], axis=-1).clip(min=0)
    needs: IntArray = np.zeros((*room.shape[:2], len(kinds), len(resources)), dtype=np.int64)
    for number, kind in enumerate(kinds):
        for resource, amount in kind.fitting.needs(1).items():
            mine = amount if isinstance(amount, int) else at(amount, some)
            needs[:, :, number, resources.index(resource)] = mine
        needs[~kind.stands[some], :, number] = NEEDS_TOO_MUCH
    rows, columns = np.nonzero(np.any(np.all(room[:, :, None] >= needs, axis=3), axis=2))
    hosts, host = np.unique(rows, return_inverse=True)
    shapes = [kind.fitting.shape for kind in kinds]
    pools = list(dict.fromkeys(shape.pool for shape in shapes))
    disk: IntArray = np.stack([free.disk[pool][some[hosts]] for pool in pools], axis=-1).clip(min=0)
    disk_needs = [[shape.disk_mib * (shape.pool == pool) for pool in pools] for shape in shapes]
    cells = Cells(room[rows, columns], needs[rows, columns], host, disk, np.array(disk_needs, dtype=np.int64))
    return cells, some[rows], columns


class CellByCell:
    """One batch. The workspace is not changed."""

    def __init__(self, workspace: Workspace, candidates: CandidatesOf, request: PlanRequest) -> None:
        self._workspace = workspace
        self._candidates_of = candidates
        self._neighbours = Neighbours(workspace, request.contended_hosts)
        self._policy = request.policy

    def applies(self, vms: Sequence[VmRequest], *, priorities: bool = False) -> bool:
        """Whether who is there first makes no difference to who comes next. With `priorities`, VMs of different ones
        are of different kinds."""
        networks = sum(len(vm.profile.networks) for vm in vms)
        return (
            len({(vm.kind, vm.priority if priorities else 0) for vm in vms}) <= MOST_KINDS
            and not any(vm.groups or vm.profile.shape.numa.multi_cell for vm in vms)
            and not (self._workspace.addresses.kinds_short_of(networks) >= 0).any()
        )

    def fill(self, vms: Sequence[VmRequest], most_steps: int) -> Filled:
        kinds = [vm.kind for vm in vms]
        return fill(self._free(vms), kinds, self._of_kinds(kinds, vms), most_steps)

    def fill_with_the_most(
        self, vms: Sequence[VmRequest], worth_of: Callable[[VmRequest], int], most_steps: int
    ) -> list[Seat | None]:
        worths = [worth_of(vm) for vm in vms]
        kinds = [(vm.kind, worth) for vm, worth in zip(vms, worths, strict=True)]
        return fill_with_the_most(self._free(vms), kinds, self._of_kinds(kinds, vms), worths, most_steps)

    def _free(self, vms: Sequence[VmRequest]) -> Free:
        disk = {vm.profile.shape.pool: self._workspace.disk(vm.profile.shape.pool) for vm in vms}
        return Free(self._workspace.free, disk)

    def _of_kinds(self, kinds: Sequence[Hashable], vms: Sequence[VmRequest]) -> list[Kind]:
        return [self._kind(vm) for vm in dict(zip(kinds, vms, strict=True)).values()]

    def _kind(self, vm: VmRequest) -> Kind:
        candidates = self._candidates_of(vm.profile, self._policy)
        return Kind(candidates.fitting, self._neighbours.stands(candidates, vm))
