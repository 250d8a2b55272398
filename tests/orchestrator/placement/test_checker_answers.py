# SPDX-License-Identifier: Apache-2.0
"""Of what a plan says of itself, and of its choices, one thing is wrong: the checker names that fault alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest

from ppec_contract.api_placement import Policy
from ppec_orchestrator.placement.checker import check
from ppec_orchestrator.placement.fleet import Fleet
from ppec_orchestrator.placement.plan import Plan, Refusal
from ppec_orchestrator.placement.planner import plan
from ppec_orchestrator.placement.reasons import Reason
from ppec_orchestrator.placement.request import Group, PlanRequest, Shape

from .test_checker_rules import PLAIN, a_host, cells, last, member, vms


def _fleet() -> Fleet:
    return Fleet.build([a_host("h1", cells=cells(cores_free=6)), a_host("h2"), a_host("h3", draining=True)])


def _request() -> PlanRequest:
    huge = replace(PLAIN, shape=Shape(64, 64, 1))
    return PlanRequest(vms(PLAIN, PLAIN, huge), Policy.PACK)


def _why(made: Plan, **change: Any) -> Plan:
    return replace(made, evidence=(made.evidence[0]._replace(**change), *made.evidence[1:]))


def _last_refused(made: Plan) -> Plan:
    gone, why = made.placed[-1], made.evidence[-1]
    refusal = Refusal(gone.vm_id, gone.name, {Reason.CORES: 3}, why.step)
    return replace(made, placed=made.placed[:-1], evidence=made.evidence[:-1], refused=(*made.refused, refusal))


def _refused_twice(made: Plan) -> Plan:
    return replace(made, refused=(*made.refused, replace(made.refused[0], step=7)))


ONCE = "the plan does not answer each VM of the request once"
UNFOUNDED = "the plan has not the evidence of each placement, in their order"
SAID: dict[str, tuple[Callable[[Plan], Plan], str]] = {
    "no such host": (lambda p: last(p, host="h9"), "v1 does not fit cells (0,) of h9"),
    "no such cell": (lambda p: last(p, cells=(7,)), "v1 does not fit cells (7,) of h1"),
    "a cell twice": (lambda p: last(p, cells=(0, 0)), "v1 does not fit cells (0, 0) of h1"),
    "a cell too many": (lambda p: last(p, cells=(0, 1)), "v1 does not fit cells (0, 1) of h1"),
    "more of a cell": (lambda p: last(p, cores=3), "v1: cores is said to be 3, it is 2"),
    "less of a cell": (lambda p: last(p, memory_mib=1), "v1: memory_mib is said to be 1, it is 1024"),
    "of something else": (lambda p: last(p, nvme=1), "v1: nvme is said to be 1, it is 0"),
    "more disk": (lambda p: last(p, disk_mib=41), "v1: disk_mib is said to be 41, it is 40"),
    "another pool": (lambda p: last(p, pool="slow"), "v1: pool is said to be slow, it is "),
    "another host's number": (lambda p: last(p, host_id=2), "v1: host_id is said to be 2, it is 1"),
    "another name": (lambda p: last(p, name="v7"), "v1: name is said to be v7, it is v1"),
    "too many candidates": (lambda p: _why(p, candidates=3), "v0: candidates is said to be 3, it is 2"),
    "too few candidates": (lambda p: _why(p, candidates=1), "v0: candidates is said to be 1, it is 2"),
    "another score": (lambda p: _why(p, score=1.0), "v0: score is said to be 1.0, it is "),
    "no score": (lambda p: _why(p, score=float("nan")), "v0: score is said to be nan, it is "),
    "a broken group": (lambda p: _why(p, broken=1), "v0: broken is said to be 1, it is 0"),
    "a VM without an answer": (lambda p: replace(p, refused=()), ONCE),
    "a VM refused twice": (_refused_twice, ONCE),
    "a VM placed twice": (lambda p: replace(p, placed=p.placed * 2, evidence=p.evidence * 2), ONCE),
    "a VM of no request": (lambda p: last(p, vm_id=UUID(int=7)), ONCE),
    "no evidence": (lambda p: replace(p, evidence=()), UNFOUNDED),
    "evidence of others": (lambda p: replace(p, evidence=p.evidence[::-1]), UNFOUNDED),
    "one step for two": (lambda p: replace(p, refused=(replace(p.refused[0], step=1),)), "two VMs were planned in one"),
    "refused, but it fits": (_last_refused, "v1 was refused, but fits h1"),
    "hosts without a reason": (
        lambda p: replace(p, refused=(replace(p.refused[0], reasons={Reason.CORES: 2}),)),
        "v2 is refused as v2 for {<Reason.CORES: 'cores'>: 2}, it is for ",
    ),
    "hosts with two": (
        lambda p: replace(p, refused=(replace(p.refused[0], reasons={Reason.CORES: 2, Reason.DISK: 2}),)),
        "v2 is refused as v2 for {<Reason.CORES: 'cores'>: 2, <Reason.DISK: 'disk'>: 2}, it is for ",
    ),
}


@pytest.mark.parametrize("fault", list(SAID))
def test_an_answer_with_one_fault(fault: str) -> None:
    sound = plan(_fleet(), _request())
    assert check(_fleet(), _request(), sound) == []
    spoil, words = SAID[fault]
    (found,) = check(_fleet(), _request(), spoil(sound))
    assert found.startswith(words)


def test_a_host_of_no_fleet_is_none_of_its_hosts() -> None:
    fleet, request = Fleet.build([a_host("h1"), a_host("h2")]), PlanRequest(vms(PLAIN), Policy.PACK)
    assert check(fleet, request, last(plan(fleet, request), host="h9")) == ["v0 does not fit cells (0,) of h9"]


def test_a_soft_group_that_is_not_said_to_be_broken() -> None:
    rather = Group("rather apart", hard=False)
    fleet = Fleet.build([a_host(vms=(member(rather),))])
    request = PlanRequest(vms(PLAIN, groups=(rather,)))
    sound = plan(fleet, request)
    assert check(fleet, request, sound) == []
    assert check(fleet, request, _why(sound, broken=0)) == ["v0: broken is said to be 0, it is 1"]


# --- what would have been better --------------------------------------------------------------------------------------

SOFT = Group("rather apart", hard=False)
# Two hosts, and what makes the second worse.
WORSE: dict[str, tuple[Policy, dict[str, Any], dict[str, Any]]] = {
    "pack: its name": (Policy.PACK, {}, {}),
    "pack: cores left": (Policy.PACK, {"cells": cells(cores_free=7)}, {}),
    "pack: memory left": (Policy.PACK, {"cells": cells(memory_free_mib=4000)}, {}),
    "balanced: memory used": (Policy.BALANCED, {}, {"cells": cells(memory_free_mib=2048)}),
    "balanced: disk used": (Policy.BALANCED, {}, {"disk_free_mib": 50}),
    "balanced: cores used": (Policy.BALANCED, {}, {"cells": cells(cores_free=4)}),
    "balanced: VMs": (Policy.BALANCED, {}, {"vms": (member(Group("other")),)}),
    "spread: of the batch": (Policy.SPREAD, {"cells": cells(cores_free=2)}, {}),
    "spread: of the batch in its rack": (Policy.SPREAD, {"cells": cells(cores_free=2)}, {"rack": "r3"}),
    "a soft group": (
        Policy.PACK,
        {"cells": cells(cores_free=8)},
        {"cells": cells(cores_free=6), "vms": (member(SOFT),)},
    ),
}


@pytest.mark.parametrize("why", list(WORSE))
def test_a_host_that_would_have_been_better(why: str) -> None:
    policy, first, second = WORSE[why]
    hosts = [a_host("h1", **first), a_host("h2", **second), a_host("h3", rack="r3", draining=True)]
    batch = {"h2": 1} if why == "spread: of the batch" else {"h3": 1} if policy is Policy.SPREAD else {}
    fleet, groups = Fleet.build(hosts), (SOFT,) if why == "a soft group" else ()
    request = PlanRequest(vms(PLAIN, groups=groups), policy, batch_hosts=batch)
    sound = plan(fleet, request)
    assert [place.host for place in sound.placed] == ["h1"]
    assert check(fleet, request, sound) == []
    # As it would be, were h1 closed to it.
    kept = replace(request, vms=vms(PLAIN, groups=groups, excluded_hosts=frozenset({"h1"})))
    worse = _why(plan(fleet, kept), candidates=2)
    assert check(fleet, request, worse) == ["v0: h1 would have been better than h2"]
