# SPDX-License-Identifier: Apache-2.0
"""The policies: each gives one score per host that a VM fits; the lowest wins, ties go to the first host by name.

To add one: write a scorer and enter it in `POLICIES`. A scorer sees some rows of a `View` and returns their scores.
They must depend on nothing but these rows and the view's `spread`, so that a placement changes the score of its own row
alone. Most scores that are worked out again are of a handful of hosts, for which arrays are slow: plans are made up to
twice as fast with `by_row`, which gives the very same scores row by row and so can't look at the view's `left`, or with
`by_left`, which says that the score of a VM in one cell is what it leaves there. What a batch puts beside each other is
the planner's to add (`ranks.py`: `spread` counts hosts and racks)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ppec_contract.api_placement import Policy as PolicyName
from ppec_orchestrator.placement.balance import Floats, Weight
from ppec_orchestrator.placement.fleet import IntArray, Rows
from ppec_orchestrator.placement.packed import MOST_LEFT, Packed
from ppec_orchestrator.placement.workspace import Workspace


@dataclass(frozen=True, slots=True)
class View:
    """Some rows of one profile's candidates. `weight` is what the VM takes that counts in the balance. `left` is
    what it leaves in its cell (`packed.py`), and `parts` over how many cells it spreads, of the rows looked at; None
    stands for one."""

    workspace: Workspace
    weight: Weight
    rows: Rows
    left: Packed
    parts: IntArray | None


def balanced(view: View) -> Floats:
    """Ganeti's score of the fleet with the VM there."""
    balance = view.workspace.balance
    return balance.scores_after(balance.lines(view.weight, view.workspace.spread), view.rows)


def pack(view: View) -> Floats:
    """Best fit: fewest cells, then the fewest cores left in them, then the least memory, so that whole cells stay
    open."""
    left = view.left.astype(np.float64)
    return left if view.parts is None else (view.parts - 1) * MOST_LEFT + left


def balanced_row(workspace: Workspace, weight: Weight) -> OfRow:
    balance = workspace.balance
    return balance.score_after(balance.lines(weight, workspace.spread))


# The score of a row.
OfRow = Callable[[int], float]
RowScorer = Callable[[Workspace, Weight], OfRow]


@dataclass(frozen=True, slots=True)
class Policy:
    """`apart` has a batch's own VMs kept apart before the score counts; `moves_with_fleet` says that scores depend on
    the spread over all hosts, and so are worked out again as it changes. `only_rise` says that, with one spread, what
    is placed on a host never lowers its score: where scores seldom decide, they are then left for later."""

    scorer: Callable[[View], Floats]
    by_row: RowScorer | None = None
    by_left: bool = False
    moves_with_fleet: bool = False
    apart: bool = False
    only_rise: bool = False


POLICIES: dict[PolicyName, Policy] = {
    PolicyName.BALANCED: Policy(balanced, balanced_row, moves_with_fleet=True),
    PolicyName.PACK: Policy(pack, by_left=True),
    PolicyName.SPREAD: Policy(balanced, balanced_row, moves_with_fleet=True, apart=True, only_rise=True),
}
