# SPDX-License-Identifier: Apache-2.0
"""The hosts that could take a VM of one profile, with their scores: vectors over all hosts, kept current row by row."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ppec_contract.api_placement import Policy as PolicyName
from ppec_orchestrator.placement.balance import Floats, Weight
from ppec_orchestrator.placement.demand import CPU, MEMORY, memory_part
from ppec_orchestrator.placement.filters import STANDING
from ppec_orchestrator.placement.fitting import Fitting
from ppec_orchestrator.placement.fleet import BoolArray, IntArray, Rows, SomeRows, at
from ppec_orchestrator.placement.items import bools, floats, ints
from ppec_orchestrator.placement.packed import (
    CPU_SHIFT,
    GUARDS,
    MEMORY_GUARD,
    NEVER,
    NO_CELL,
    Packed,
    best_cell,
    left,
)
from ppec_orchestrator.placement.policies import POLICIES, OfRow, RowScorer, View
from ppec_orchestrator.placement.reasons import Reason
from ppec_orchestrator.placement.request import Profile
from ppec_orchestrator.placement.workspace import Workspace

_REASONS = tuple(Reason)
_CODES = {reason: code for code, reason in enumerate(_REASONS)}
_PASSES = len(_REASONS)
# Of this part of the rows or more, all of them at once are cheaper; so few are one by one, and fewer where the score is
# what is left: then every cell is looked at, and not only the first that has room.
_MANY, FEW, _FEW_BY_LEFT = 4, 96, 32
INFINITE = float("inf")
# Rows, none of them twice, and their scores.
Were = tuple[SomeRows, Sequence[float] | Floats]
# What candidates take besides their arrays' items, in bytes.
_OBJECTS = 10_000


class Candidates:
    """`key` is each host's score, infinite where the VM does not fit; `count` says how many it fits; `standing` are the
    hosts that nothing lasting turns away; `weight` is what the VM takes that counts in the balance."""

    def __init__(self, workspace: Workspace, profile: Profile, policy: PolicyName) -> None:
        self.profile = profile
        self.fitting = Fitting(workspace.fleet, profile.shape)
        self._workspace = workspace
        self._policy = POLICIES[policy]
        self._why_never = _standing(workspace, profile)
        self.standing: BoolArray = self._why_never == _PASSES
        # Cells of hosts that can't be used need more than there is: one test less for each row.
        self._needed: Packed = np.where(self.standing[:, None], self.fitting.in_one_cell, NEVER)
        self.weight = self._weight()
        hosts = len(workspace.fleet.hosts)
        self.key: Floats = np.full(hosts, np.inf)
        self.key_items = floats(self.key)
        self.count = 0
        self._parts: IntArray | None = None
        if self.fitting.most > 1 or profile.shape.nvme:
            self._parts = np.zeros(hosts, dtype=np.int64)
        self._few = self._most_one_by_one()
        self._left: Packed = np.zeros(hosts, dtype=np.int64)
        self._width = workspace.fleet.width
        # The same by kind of host, for one host at a time: so few numbers stay at hand, an array doesn't.
        self._kinds, one_of_kind = workspace.cell_kinds
        self._needs = [tuple(cells) for cells in self.fitting.in_one_cell[one_of_kind].tolist()]
        # The workspace's own, which changes them in place for as long as the shelf keeps these candidates.
        self._free_items = workspace.packed_items(self.fitting)
        self._disk, self._enough = workspace.disk(profile.shape.pool), workspace.addresses.enough(profile.networks)
        self._disk_items, self._enough_items = ints(self._disk), bools(self._enough)
        self._seen, self._spread = workspace.moment, workspace.spread
        self._score_row: OfRow | None = None
        # Rows, among them all that it fits whose scores are of an earlier moment.
        self.old_scores: set[int] = set()
        self._recount(None)
        self._reasons: tuple[int, IntArray] | None = None

    @property
    def size(self) -> int:
        """In bytes, near enough: of all arrays, that of the reasons too, and of the objects around them."""
        kept = (
            self._why_never,
            self.standing,
            self._needed,
            self.weight.changes,
            self.weight.slopes,
            self.weight.bends,
            self.key,
            self._left,
        )
        parts = 0 if self._parts is None else self._parts.nbytes
        return sum(each.nbytes for each in kept) + self.key.nbytes + parts + self.fitting.size + _OBJECTS

    def refresh(self, *, scores: bool = True) -> None:
        """Works out again what changed since the last time: which hosts it fits, and their scores.

        Without `scores`, and if the policy's only rise (`Policy.only_rise`), those of hosts on which something was
        placed may stay as they were: stale, in the rows that `old_scores` names. A stale score is a lower bound. So if
        the best row is none of these, it is the best; if it is one, all have to be brought up to date first."""
        workspace, policy = self._workspace, self._policy
        outdated = policy.moves_with_fleet and self._spread is not workspace.spread
        moment = workspace.moment
        if self._seen != moment or (scores and self.old_scores):
            self._recount_changed(workspace.changed_since(self._seen), outdated, scores)
            self._seen = moment
        if outdated:
            self._spread, self._score_row = workspace.spread, None
            self._score_all()
            self.old_scores.clear()

    def _recount_changed(self, changed: set[int] | None, outdated: bool, scores: bool) -> None:
        """Where all scores are `outdated`, they are worked out afterwards, and here none."""
        only_less, policy = self._workspace.last_growth <= self._seen, self._policy
        scores_later = outdated or (policy.only_rise and not scores)
        if changed is not None and only_less and scores_later and len(changed) <= self._few:
            self.old_scores |= changed
            self._recount_few(changed, None)
            return
        rows: Collection[int] | None = changed
        if rows is not None and self.old_scores and not outdated:
            rows = self.old_scores.union(rows)
        self.old_scores.clear()
        if rows is None or len(rows) * _MANY > len(self.key):
            self._recount(None, scored=not outdated)
        elif len(rows) <= self._few:
            if not only_less:
                self._suppose_it_fits(rows)
            if policy.by_row is None:
                self._recount_few_by_left(rows)
            else:
                self._recount_few(rows, None if outdated else self._score_of(policy.by_row))
        elif rows:
            self._recount(np.array(list(rows)), scored=not outdated)

    def count_but(self, rows: Sequence[int]) -> int:
        """How many hosts it fits besides these, none of them named twice."""
        # Neither a loop nor a comprehension: for each VM with groups this is asked of all where they have members.
        return self.count - len(rows) + list(map(self.key_items.__getitem__, rows)).count(INFINITE)

    def close(self, rows: SomeRows) -> Were:
        """As if the VM fitted none of these hosts, until they are opened again, before anything else changes."""
        if isinstance(rows, np.ndarray):
            fitting = rows[self.key.take(rows) < np.inf]
            were: Were = (fitting, self.key.take(fitting))
            self.key[fitting] = np.inf
        else:
            key, scores = self.key_items, {}
            for row in rows:
                if key[row] < INFINITE:
                    scores[row], key[row] = key[row], INFINITE
            were = (list(scores), list(scores.values()))
        self.count -= len(were[0])
        return were

    def reopen(self, were: Were) -> None:
        """What `close` closed."""
        rows, scores = were
        self.count += len(rows)
        if isinstance(rows, np.ndarray):
            self.key[rows] = scores
            return
        for row, score in zip(rows, scores, strict=True):
            self.key_items[row] = score

    def cells(self, row: int) -> list[int]:
        """The columns of the cells the VM takes on a host that it fits."""
        workspace, fitting = self._workspace, self.fitting
        if self._parts is None:
            return [best_cell(self._free_items, row * self._width, self._needs[self._kinds[row]])]
        return fitting.choose(workspace.free, row, int(self._parts[row]))

    def reasons(self) -> IntArray:
        """Per host, the code of what turns it away (`code`). Rules about neighbours are not looked at."""
        seen = self._workspace.moment
        if self._reasons is None or self._reasons[0] != seen:
            self._reasons = (seen, self._why_not())
        return self._reasons[1]

    # --- keeping current -------------------------------------------------------------------------------------------

    def _most_one_by_one(self) -> int:
        """So many rows, or fewer, are looked at without arrays."""
        policy = self._policy
        if self._parts is not None:
            return 0
        if policy.by_row is not None:
            return FEW
        # What is left is kept by arrays alone: for policies that score with it once more whenever the spread changes.
        return _FEW_BY_LEFT if policy.by_left and not policy.moves_with_fleet else 0

    def _recount(self, rows: Rows, *, scored: bool = True) -> None:
        """Whether the VM fits these hosts, and what it leaves there. If not `scored`, all are to be scored anew."""
        workspace, shape = self._workspace, self.profile.shape
        rest = left(at(workspace.packed(self.fitting), rows), at(self._needed, rows))
        if self._parts is None:
            # Column by column: a tenth of the time of a reduction along such short rows.
            rest = reduce(np.minimum, rest.T)
            fits = rest < NO_CELL
        else:
            parts, rest = self._in_several_cells(rows, rest)
            _put(self._parts, rows, parts)
            fits = parts > 0
        fits &= at(self._disk, rows) >= shape.disk_mib
        fits &= at(self._enough, rows)
        self.count += int(np.count_nonzero(fits)) - int(np.count_nonzero(at(self.key, rows) < np.inf))
        if self._policy.moves_with_fleet and self._policy.by_row is None:
            _put(self._left, rows, rest)
        _put(self.key, rows, np.where(fits, self._scores(rows, rest) if scored else 0.0, np.inf))

    def _recount_few(self, rows: Iterable[int], score: OfRow | None) -> None:
        """As `_recount` does, row by row, of a VM in one cell and the hosts among them that it did fit. Without
        `score`, the scores of those that it still fits stay as they are."""
        key, free, needs, kinds, width = self.key_items, self._free_items, self._needs, self._kinds, self._width
        disk, disk_mib, enough = self._disk_items, self.profile.shape.disk_mib, self._enough_items
        for row in rows:
            if key[row] == INFINITE:
                continue
            cell = row * width
            for needed in needs[kinds[row]]:
                if (free[cell] - needed) & GUARDS == GUARDS:
                    break
                cell += 1
            else:
                self._fits_no_more(row)
                continue
            if disk[row] < disk_mib or not enough[row]:
                self._fits_no_more(row)
            elif score is not None:
                key[row] = score(row)

    def _recount_few_by_left(self, rows: Iterable[int]) -> None:
        """As `_recount_few`, of a policy whose score is what the VM leaves."""
        key, free, needs, kinds, width = self.key_items, self._free_items, self._needs, self._kinds, self._width
        disk, disk_mib, enough = self._disk_items, self.profile.shape.disk_mib, self._enough_items
        for row in rows:
            if key[row] == INFINITE:
                continue
            cell, least = row * width, NO_CELL
            for needed in needs[kinds[row]]:
                rest = (free[cell] - needed) ^ GUARDS
                if rest < least and not rest & MEMORY_GUARD:
                    least = rest
                cell += 1
            if least < NO_CELL and disk[row] >= disk_mib and enough[row]:
                key[row] = least
            else:
                self._fits_no_more(row)

    def _suppose_it_fits(self, rows: Iterable[int]) -> None:
        """Of hosts that have more room, perhaps: all are looked at that nothing lasting turns away."""
        for row in rows:
            if self.key_items[row] == INFINITE and self.standing[row]:
                self.key_items[row] = 0.0
                self.count += 1

    def _fits_no_more(self, row: int) -> None:
        self.key_items[row] = INFINITE
        self.count -= 1

    def _score_of(self, by_row: RowScorer) -> OfRow:
        """Of the fleet as it is now."""
        self._workspace.settle()
        if self._score_row is None:
            self._score_row = by_row(self._workspace, self.weight)
        return self._score_row

    def _score_all(self) -> None:
        """All hosts that it fits; without the others, where these are so many that it pays to leave them out."""
        fits = self.key < np.inf
        rows = np.flatnonzero(fits) if self.count * 3 < len(fits) * 2 else None
        scores = self._scores(rows, at(self._left, rows))
        _put(self.key, rows, scores if rows is not None else np.where(fits, scores, np.inf))

    def _scores(self, rows: Rows, rest: Packed) -> Floats:
        parts = None if self._parts is None else at(self._parts, rows)
        return self._policy.scorer(View(self._workspace, self.weight, rows, rest, parts))

    def _in_several_cells(self, rows: Rows, rest: Packed) -> tuple[IntArray, Packed]:
        """Over how many cells the VM spreads, and what it leaves: in its cell, or (of CPUs) on a host where it takes
        several."""
        free, fitting = self._workspace.free, self.fitting
        parts = np.where(at(self.standing, rows), fitting.parts(free, rows), 0)
        if self.profile.shape.nvme:
            rest = np.where(at(free["nvme"], rows) >= self.profile.shape.nvme, rest, NO_CELL)
        on_host = fitting.usable(free, fitting.cpu, rows) << CPU_SHIFT
        return parts, np.where(parts > 1, on_host, rest.min(axis=1))

    def _weight(self) -> Weight:
        shape, fitting = self.profile.shape, self.fitting
        memory_mib = memory_part(shape) * MEMORY[fitting.memory]
        disk_mib = 0 if shape.pool else shape.disk_mib
        return self._workspace.balance.weigh(memory_mib, disk_mib, fitting.fewest(None) * CPU[fitting.cpu])

    # --- saying why not --------------------------------------------------------------------------------------------

    def _why_not(self) -> IntArray:
        """Most telling first: too little in all its cells together, or no cells that have all of it."""
        workspace, fitting, shape = self._workspace, self.fitting, self.profile.shape
        free = workspace.free
        cores = Reason.CORES if fitting.cpu == "cores" else Reason.SHARED_VCPUS
        memory = Reason.HUGE_PAGES if shape.numa.huge_page_kib else Reason.MEMORY
        no_fit = Reason.NUMA_PARTS if shape.numa.multi_cell else Reason.NUMA_FIT
        checks = [
            (fitting.usable(free, fitting.cpu, None) < fitting.fewest(None), cores),
            (fitting.usable(free, fitting.memory, None) < memory_part(shape), memory),
        ]
        if shape.nvme:
            checks.append((fitting.usable(free, "nvme", None) < shape.nvme, Reason.NVME))
        checks += [
            (fitting.parts(free, None) == 0, no_fit),
            (self._disk < shape.disk_mib, Reason.DISK),
            (~self._enough, Reason.ADDRESSES),
        ]
        found = np.select([mask for mask, _ in checks], [_CODES[reason] for _, reason in checks], _PASSES)
        return np.where(self.standing, found, self._why_never)


def _put(array: NDArray[Any], rows: Rows, values: NDArray[Any]) -> None:
    array[slice(None) if rows is None else rows] = values


def code(reason: Reason) -> int:
    return _CODES[reason]


def counted(codes: IntArray) -> dict[Reason, int]:
    """How many hosts each reason turns away."""
    numbers = np.bincount(codes, minlength=_PASSES + 1)[:_PASSES]
    return {_REASONS[each]: int(numbers[each]) for each in np.flatnonzero(numbers)}


def _standing(workspace: Workspace, profile: Profile) -> IntArray:
    fleet = workspace.fleet
    found: IntArray = np.full(len(fleet.hosts), _PASSES, dtype=np.int64)
    for reason, passes in reversed(STANDING):
        found[~passes(fleet, profile)] = _CODES[reason]
    return found
