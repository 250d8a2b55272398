# SPDX-License-Identifier: Apache-2.0
"""Which running VMs change cells on their host, so that one that fits no host as it stands fits this one.

Moves are made one after the other, by the host's retune, and each needs its room free in the cell it goes to while it
still has its own: VMs can't trade places. Whoever moves, moves once in a plan. Those that stay are the ones the record
says so of, those in several cells, and those with NVMe drives, which are near one cell. A VM on dedicated cores moves
to cells whose cores have as many threads, for its guest counts on them.

The search deepens: one move on any host before two on another. It is exact as long as hosts have no more states to look
at than `MOST_NODES`, and all of them together for VMs of one profile no more than `MOST_NODES_IN_ALL`.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from uuid import UUID

from ppec_contract.vm import CpuPolicy
from ppec_orchestrator.placement.demand import CELL_RESOURCES, CellResource, memory_part
from ppec_orchestrator.placement.fitting import Fitting
from ppec_orchestrator.placement.fleet import BoolArray, IntArray, SeatedVm
from ppec_orchestrator.placement.plan import Move
from ppec_orchestrator.placement.request import Network, Profile, Shape
from ppec_orchestrator.placement.seats import Part, Room, Seating, columns_of
from ppec_orchestrator.placement.workspace import Workspace

# States of one host that are looked at for each number of moves; and of all hosts together, for VMs of one profile.
MOST_NODES = 4000
MOST_NODES_IN_ALL = 50_000
# No VMs that could leave a cell are enough.
_NEVER = 1 << 20


@dataclass(frozen=True, slots=True)
class Step:
    """One VM's move, by columns."""

    vm: SeatedVm
    source: int
    target: int
    part: Part


@dataclass(frozen=True, slots=True)
class Opening:
    """The steps that make a VM fit on a host, the cheapest found there. `of` is how many hosts as few moves open."""

    row: int
    steps: tuple[Step, ...]
    moved_mib: int
    moves: tuple[Move, ...]
    of: int = 1


def worth_opening(shape: Shape) -> bool:
    """Would a host open a cell for such a VM? Not for one that may span cells, or that floats over shared CPUs."""
    return shape.numa.cpus is CpuPolicy.DEDICATED and not shape.numa.multi_cell


class Openings:
    """Of one batch. What was found for a host is kept until something is placed or moved there."""

    def __init__(self, workspace: Workspace, most_moves: int) -> None:
        self._workspace = workspace
        self._most = most_moves
        self._seatings: dict[Shape, Seating] = {}
        self._known: dict[int, dict[int, tuple[int, Opening | None]]] = {}
        self._nodes_left: dict[int, int] = {}
        self._moved: set[UUID] = set()
        self._made: list[Opening] = []

    def cheapest_first(self, profile: Profile, rows: IntArray) -> Iterator[Opening]:
        """For each of these hosts that can be opened its cheapest moves: the fewest first, then the fewest MiB, then by
        the host's name. Nothing may have changed when the next is asked for."""
        hosts = rows.tolist()
        for most in range(1, self._most + 1):
            found = [opening for row in hosts if (opening := self._opening(profile, row, most)) is not None]
            for opening in sorted(found, key=lambda each: (each.moved_mib, each.row)):
                hosts.remove(opening.row)
                yield Opening(opening.row, opening.steps, opening.moved_mib, opening.moves, len(found))

    def have_enough(self, fitting: Fitting, networks: tuple[Network, ...]) -> BoolArray:
        """The hosts that have free what the VM needs, in whichever of their cells."""
        workspace, shape = self._workspace, fitting.shape
        needed: tuple[tuple[CellResource, IntArray | int], ...]
        needed = ((fitting.cpu, fitting.fewest(None)), (fitting.memory, memory_part(shape)), ("nvme", shape.nvme))
        enough: BoolArray = workspace.addresses.enough(networks) & (workspace.disk(shape.pool) >= shape.disk_mib)
        for resource, amount in needed:
            enough &= workspace.free[resource].sum(axis=1) >= amount
        return enough

    def apply(self, opening: Opening) -> None:
        for step in opening.steps:
            self._move(opening.row, step.source, step.target, step.part)

    def take_back(self, opening: Opening) -> None:
        for step in reversed(opening.steps):
            self._move(opening.row, step.target, step.source, step.part)

    def keep(self, opening: Opening) -> None:
        """The moves applied are part of the plan."""
        self._made.append(opening)
        self._moved.update(step.vm.vm_id for step in opening.steps)

    def changed(self, row: int) -> None:
        """Something was placed there."""
        self._known.pop(row, None)

    def give_back(self) -> None:
        for opening in reversed(self._made):
            self.take_back(opening)
        self._made.clear()

    def _move(self, row: int, source: int, target: int, part: Part) -> None:
        self._workspace.move(row, source, target, {CELL_RESOURCES[index]: amount for index, amount in part})

    def _opening(self, profile: Profile, row: int, most: int) -> Opening | None:
        """The cheapest with so many moves; fewer were looked for before."""
        known = self._known.setdefault(row, {})
        searched, opening = known.get(id(profile), (0, None))
        if opening is None and searched < most:
            nodes_left = self._nodes_left.get(id(profile), MOST_NODES_IN_ALL)
            if nodes_left > 0:
                search = _Search(self, profile.shape, row)
                opening = search.run(most)
                self._nodes_left[id(profile)] = nodes_left - search.nodes
            known[id(profile)] = (most, opening)
            searched = most
        return opening if searched == most else None

    def seating(self, shape: Shape) -> Seating:
        found = self._seatings.get(shape)
        if found is None:
            found = self._seatings[shape] = Seating(self._workspace.fleet, shape)
        return found

    @property
    def workspace(self) -> Workspace:
        return self._workspace

    @property
    def moved(self) -> AbstractSet[UUID]:
        """VMs that the plan has moved: not again."""
        return self._moved


@dataclass(frozen=True, slots=True)
class _Class:
    """VMs that are one choice: of one cell, taking the same of it, free to go to the same others."""

    source: int
    part: Part
    memory_mib: int
    targets: tuple[int, ...]


class _Search:
    """Depth first, to one depth. Which VMs moved says how much memory was, so a state met again is no cheaper."""

    def __init__(self, openings: Openings, shape: Shape, row: int) -> None:
        self._row = row
        self._host = openings.workspace.fleet.hosts[row]
        self._room = Room(openings.workspace, row)
        self._needs = openings.seating(shape).needs(row)
        self._vms = self._movable(openings)
        self._classes = sorted(self._vms, key=lambda each: (each.memory_mib, each.source, each.part, each.targets))
        self._left = [len(self._vms[each]) for each in self._classes]
        self._residents: dict[int, list[int]] = {}
        for index, each in enumerate(self._classes):
            self._residents.setdefault(each.source, []).append(index)
        self.nodes = 0
        self._seen: set[tuple[object, ...]] = set()
        self._path: list[tuple[int, int]] = []
        self._best: tuple[int, tuple[tuple[int, int], ...]] | None = None

    def run(self, most: int) -> Opening | None:
        self._deepen(most, 0)
        if self._best is None:
            return None
        waiting = {each: list(vms) for each, vms in self._vms.items()}
        steps = []
        for index, target in self._best[1]:
            each = self._classes[index]
            steps.append(Step(waiting[each].pop(0), each.source, target, each.part))
        return Opening(self._row, tuple(steps), self._best[0], tuple(self._told(step) for step in steps))

    def _told(self, step: Step) -> Move:
        cells = self._host.cells
        before, after = cells[step.source].cell, cells[step.target].cell
        return Move(step.vm.vm_id, step.vm.name, self._host.name, (before,), (after,))

    def _movable(self, openings: Openings) -> dict[_Class, list[SeatedVm]]:
        found: dict[_Class, list[SeatedVm]] = {}
        for vm in sorted(self._host.vms, key=lambda vm: (vm.name, vm.vm_id)):
            shape = vm.profile.shape
            source = columns_of(self._host, vm.cells)
            if not vm.movable or vm.vm_id in openings.moved or len(source) != 1 or len(vm.cells) != 1 or shape.nvme:
                continue
            seating = openings.seating(shape)
            part = seating.part(self._row, source[0])
            if part is not None:
                targets = self._targets(seating, source[0])
                found.setdefault(_Class(source[0], part, shape.memory_mib, targets), []).append(vm)
        return found

    def _targets(self, seating: Seating, source: int) -> tuple[int, ...]:
        cells, shared = self._host.cells, seating.shape.numa.cpus is CpuPolicy.SHARED
        return tuple(
            column
            for column, cell in enumerate(cells)
            if column != source
            and (shared or cell.threads_per_core == cells[source].threads_per_core)
            and seating.part(self._row, column) is not None
        )

    # --- the search ------------------------------------------------------------------------------------------------

    def _deepen(self, left: int, moved_mib: int) -> None:
        if self._best is not None and moved_mib >= self._best[0]:
            return
        fewest = self._at_least()
        if not fewest:
            self._best = (moved_mib, tuple(self._path))
            return
        if fewest > left or self.nodes >= MOST_NODES:
            return
        state = (*self._left, *self._room.key())
        if state in self._seen:
            return
        self._seen.add(state)
        self.nodes += 1
        for index, each in enumerate(self._classes):
            if not self._left[index]:
                continue
            for target in each.targets:
                if self._room.holds(target, each.part):
                    self._move(index, target, 1)
                    self._deepen(left - 1, moved_mib + each.memory_mib)
                    self._move(index, target, -1)

    def _move(self, index: int, target: int, by: int) -> None:
        each = self._classes[index]
        self._left[index] -= by
        if by > 0:
            self._room.move(each.source, target, each.part)
            self._path.append((index, target))
        else:
            self._room.move(target, each.source, each.part)
            self._path.pop()

    def _at_least(self) -> int:
        """A lower bound on the moves still to come; 0 if it fits. Cells have to lose what they lack, each VM leaves one
        cell, and of one cell the largest leave first."""
        fewest = _NEVER
        for need in self._needs:
            for cells in need.by_width:
                if len(cells) >= need.parts:
                    departures = sorted(self._departures(column, part) for column, part in cells)
                    fewest = min(fewest, sum(departures[: need.parts]))
        return fewest

    def _departures(self, column: int, part: Part) -> int:
        return max(self._departures_for(column, index, amount) for index, amount in part)

    def _departures_for(self, column: int, index: int, amount: int) -> int:
        lacking = amount - self._room.free[index][column]
        if lacking <= 0:
            return 0
        sizes: list[tuple[int, int]] = []
        for resident in self._residents.get(column, ()):
            size = _amount(self._classes[resident].part, index)
            if size and self._left[resident]:
                sizes.append((size, self._left[resident]))
        count = 0
        for size, there in sorted(sizes, reverse=True):
            used = min(there, -(-lacking // size))
            count += used
            lacking -= used * size
            if lacking <= 0:
                return count
        return _NEVER


def _amount(part: Part, index: int) -> int:
    return next((amount for at, amount in part if at == index), 0)
