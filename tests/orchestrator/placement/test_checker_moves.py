# SPDX-License-Identifier: Apache-2.0
"""Moves that can't be made, or that would not have been needed: the checker names that fault alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from uuid import UUID

import pytest

from ppec_contract.api_placement import Policy
from ppec_contract.vm import NumaPolicy
from ppec_orchestrator.placement.checker import check
from ppec_orchestrator.placement.fleet import Fleet, SeatedVm
from ppec_orchestrator.placement.plan import Move, Plan
from ppec_orchestrator.placement.planner import plan
from ppec_orchestrator.placement.request import PlanRequest, Shape

from .test_checker_rules import CELLS, PLAIN, a_host, cells, vms

HALF = replace(PLAIN, shape=Shape(8, 1024, 10))


def _seated(number: int, cell: int, *, movable: bool = True) -> SeatedVm:
    return SeatedVm(UUID(int=90 + number), f"old{number}", HALF, (cell,), movable=movable)


def _half_full(*, cores_free: int = 4, movable: bool = True) -> Fleet:
    """A VM in each of two cells, which together leave one cell free."""
    seated = tuple(_seated(cell, cell, movable=movable) for cell in (0, 1))
    return Fleet.build([a_host(cells=cells(cores_free=cores_free), vms=seated)])


def _moves(made: Plan, *moves: Move) -> Plan:
    return replace(made, evidence=(made.evidence[0]._replace(moves=moves), *made.evidence[1:]))


STUCK: dict[str, Callable[[Plan, Move], tuple[Move, ...]]] = {
    "another's cells": lambda p, m: (replace(m, cells_before=m.cells_after, cells_after=m.cells_before),),
    "no such VM": lambda p, m: (replace(m, vm_id=UUID(int=7)),),
    "no such host": lambda p, m: (replace(m, host="h9"),),
    "no such cell": lambda p, m: (replace(m, cells_after=(7,)),),
    "more cells": lambda p, m: (replace(m, cells_after=(0, 1)),),
    "a cell twice": lambda p, m: (replace(m, cells_after=m.cells_after * 2),),
    "no cell": lambda p, m: (replace(m, cells_after=()),),
    "where it was before": lambda p, m: (m, m),
}


@pytest.mark.parametrize("fault", list(STUCK))
def test_a_move_that_can_not_be(fault: str) -> None:
    request = PlanRequest(vms(replace(PLAIN, shape=Shape(16, 1024, 10))), most_moves=3)
    sound = plan(_half_full(), request)
    (move,) = sound.moves
    assert check(_half_full(), request, sound) == []
    found = check(_half_full(), request, _moves(sound, *STUCK[fault](sound, move)))
    assert len(found) == 1
    assert "can't move to cells" in found[0]


def test_moves_that_may_not_be() -> None:
    request = PlanRequest(vms(replace(PLAIN, shape=Shape(16, 1024, 10))), most_moves=1)
    sound = plan(_half_full(), request)
    (move,) = sound.moves
    stuck = [f"{move.name} can't move to cells {move.cells_after}"]
    assert check(_half_full(movable=False), request, sound) == stuck
    assert check(_half_full(cores_free=3), request, sound) == stuck
    assert check(_half_full(), replace(request, most_moves=0), sound) == ["v0 moves 1 VMs, 0 may be moved"]
    assert check(_half_full(), request, _moves(sound)) == [f"v0 does not fit cells {sound.placed[0].cells} of h1"]


def test_a_move_to_cells_that_give_it_more() -> None:
    """Eight vCPUs are eight cores there."""
    widths = (replace(CELLS[0], cores_free=4), replace(CELLS[1], threads_per_core=1))
    fleet = Fleet.build([a_host(cells=widths, vms=(_seated(0, 0),))])
    request = PlanRequest(vms(replace(PLAIN, shape=Shape(2, 1024, 10))), Policy.PACK, most_moves=1)
    sound = plan(fleet, request)
    assert check(fleet, request, sound) == []
    found = check(fleet, request, _moves(sound, Move(UUID(int=90), "old0", "h1", (0,), (1,))))
    assert found == ["old0 can't move to cells (1,)"]


def test_what_the_plan_places_is_not_moved_by_it() -> None:
    fleet, request = Fleet.build([a_host()]), PlanRequest(vms(PLAIN, PLAIN), Policy.PACK, most_moves=1)
    sound = plan(fleet, request)
    new = Move(sound.placed[0].vm_id, "v0", "h1", (0,), (1,))
    moved = replace(sound, evidence=(sound.evidence[0], sound.evidence[1]._replace(moves=(new,))))
    assert check(fleet, request, moved) == ["v0 can't move to cells (1,)"]


def test_moves_for_a_vm_that_has_a_better_host_without() -> None:
    full = replace(_half_full().hosts[0], name="h2", host_id=2)
    fleet, move = Fleet.build([a_host("h1"), full]), Move(UUID(int=90), "old0", "h2", (0,), (1,))
    request = PlanRequest(vms(replace(PLAIN, shape=Shape(16, 1024, 10))), most_moves=1)
    there = plan(fleet, replace(request, vms=vms(request.vms[0].profile, excluded_hosts=frozenset({"h1"}))))
    assert there.moves == (move,)
    found = check(fleet, request, there)
    assert found == ["v0: h1 would have been better than h2"]


def test_hosts_that_moves_would_open_are_not_counted_again() -> None:
    h2 = replace(_half_full().hosts[0], name="h2", host_id=2, vms=tuple(_seated(2 + cell, cell) for cell in (0, 1)))
    fleet = Fleet.build([_half_full().hosts[0], h2])
    request = PlanRequest(vms(replace(PLAIN, shape=Shape(16, 1024, 10))), most_moves=1)
    sound = plan(fleet, request)
    assert sound.evidence[0].candidates == 2
    assert check(fleet, request, sound) == []


def test_a_vm_that_was_moved_is_where_it_went() -> None:
    seated = tuple(_seated(cell, cell) for cell in (0, 1))
    roomy = Fleet.build(
        [a_host(cells=tuple(replace(c, cores=32, cores_free=8 + 4 * c.cell) for c in CELLS), vms=seated)]
    )
    request = PlanRequest(vms(replace(PLAIN, shape=Shape(24, 1024, 10))), Policy.PACK, most_moves=2)
    sound = plan(roomy, request)
    assert (sound.moves, sound.placed[0].cells) == ((), (1,))
    move = Move(UUID(int=90), "old0", "h1", (0,), (1,))
    assert check(roomy, request, _moves(sound, move)) == ["v0 does not fit cells (1,) of h1"]
    assert check(roomy, request, _moves(sound, move, move)) == ["old0 can't move to cells (1,)"]
    assert check(roomy, request, _moves(sound, move, replace(move, cells_before=(1,), cells_after=(0,)))) == []


def test_a_vm_that_moves_to_cells_of_which_one_is_full() -> None:
    wide = replace(HALF, shape=replace(HALF.shape, numa=NumaPolicy(multi_cell=True)))
    old = SeatedVm(UUID(int=90), "old", wide, (0, 1))
    four = tuple(replace(CELLS[0], cell=number, cores_free=free) for number, free in enumerate((2, 2, 2, 1)))
    fleet, request = Fleet.build([a_host(cells=four, vms=(old,))]), PlanRequest(vms(PLAIN), Policy.PACK, most_moves=1)
    sound, move = plan(fleet, request), Move(old.vm_id, "old", "h1", (0, 1), (1, 2))
    assert check(fleet, request, _moves(sound, move)) == []
    assert check(fleet, request, _moves(sound, replace(move, cells_after=(2, 3)))) == ["old can't move to cells (2, 3)"]
