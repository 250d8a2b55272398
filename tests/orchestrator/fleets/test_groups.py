# SPDX-License-Identifier: Apache-2.0
"""Groups that contradict each other, also by way of others."""

from __future__ import annotations

import pytest

from ppec_orchestrator.fleets.faults import FleetError
from ppec_orchestrator.fleets.groups import refuse_contradictions
from ppec_orchestrator.placement.request import Group, Level

APART = Group("apart")
APART_ON_RACKS = Group("racks", level=Level.RACK)
AB, BC = Group("ab", apart=False), Group("bc", apart=False)


def refused(*members: tuple[Group, ...]) -> str | None:
    """Where, with VMs called by their number."""
    try:
        refuse_contradictions((str(number), groups) for number, groups in enumerate(members))
    except FleetError as fault:
        return fault.where
    return None


@pytest.mark.parametrize("apart", [APART, APART_ON_RACKS])
def test_vms_that_stand_together_by_way_of_others_and_apart(apart: Group) -> None:
    assert refused((apart, AB), (AB, BC), (BC, apart)) == "2"


def test_the_order_of_vms_does_not_matter() -> None:
    assert refused((BC, APART), (APART, AB), (AB, BC)) == "1"


@pytest.mark.parametrize(
    "members",
    [
        ((APART, AB), (AB,), (APART, BC), (BC,)),
        ((APART, AB), (Group("ab", apart=False),)),
        # One rack has several hosts.
        ((APART, Group("r", apart=False, level=Level.RACK)), (APART, Group("r", apart=False, level=Level.RACK))),
        # What is soft is kept as far as it goes.
        ((APART, Group("s", apart=False, hard=False)), (APART, Group("s", apart=False, hard=False))),
        ((Group("x", hard=False), AB), (Group("x", hard=False), AB)),
        (),
    ],
)
def test_what_can_be_kept_passes(members: tuple[tuple[Group, ...], ...]) -> None:
    assert refused(*members) is None
