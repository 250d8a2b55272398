# SPDX-License-Identifier: Apache-2.0
"""How many runs stand by."""

from __future__ import annotations

import math

import pytest

from ppec_orchestrator.dispatch.demand import LEAST, QUIET_S, Demand


def test_grows_by_what_was_missed_up_to_the_most() -> None:
    demand = Demand(most=5)
    assert demand.wanted == LEAST
    seen = []
    for _ in range(5):
        demand.missed(0.0)
        seen.append(demand.wanted)
    assert seen == [3, 4, 5, 5, 5]


def test_goes_back_when_a_whole_span_has_not_used_them() -> None:
    demand = Demand(most=8)
    for _ in range(6):
        demand.missed(0.0)
    # The span in which they were missed is no proof that they aren't needed.
    assert demand.look(QUIET_S - 0.1) == QUIET_S
    assert (demand.look(QUIET_S), demand.wanted) == (2 * QUIET_S, 8)
    assert (demand.look(2 * QUIET_S), demand.wanted) == (math.inf, LEAST)


def test_keeps_what_is_used() -> None:
    demand = Demand(most=8)
    for _ in range(6):
        demand.missed(0.0)
    demand.look(QUIET_S)
    for left in (7, 6, 5, 4, 3):
        demand.taken(left)
    assert (demand.look(2 * QUIET_S), demand.wanted) == (3 * QUIET_S, 5), "three of eight were never taken"
    demand.taken(0)
    assert (demand.look(3 * QUIET_S), demand.wanted) == (4 * QUIET_S, 5)


def test_misses_that_go_on_do_not_put_off_the_end_of_a_span() -> None:
    demand = Demand(most=8)
    demand.missed(0.0)
    demand.missed(QUIET_S / 2)
    assert demand.look(QUIET_S / 2) == QUIET_S


@pytest.mark.parametrize("most", [1, 2])
def test_where_no_more_are_allowed_there_is_nothing_to_let_go(most: int) -> None:
    demand = Demand(most)
    demand.missed(0.0)
    assert (demand.wanted, demand.look(10 * QUIET_S)) == (most, math.inf)
