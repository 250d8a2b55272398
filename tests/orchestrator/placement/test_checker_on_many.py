# SPDX-License-Identifier: Apache-2.0
"""The checker finds nothing in sound plans of every kind, and every fault that is planted in one of many VMs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppec_contract.api_placement import Policy
from ppec_orchestrator.fleets.generator import Recipe, generate
from ppec_orchestrator.placement.checker import check
from ppec_orchestrator.placement.fleet import CellState, Fleet, HostState, SeatedVm
from ppec_orchestrator.placement.plan import Plan, Refusal
from ppec_orchestrator.placement.planner import plan
from ppec_orchestrator.placement.reasons import Reason
from ppec_orchestrator.placement.request import PlanRequest, Profile, Shape, Spare, SpareRule, VmRequest

from .fleets import a_fleet, a_request

SEEDS = st.integers(0, 2**32)
MORE = {
    "most_moves": (0, 0, 3),
    "most_vcpus": (False, False, True),
    "spare": (SpareRule(), SpareRule(), SpareRule(Spare.REQUIRED, witnessed=True)),
}


def placement(made: Plan, at: int, **change: object) -> Plan:
    placed = [*made.placed]
    placed[at] = placed[at]._replace(**change)  # type: ignore[arg-type]
    return replace(made, placed=tuple(placed))


def evidence(made: Plan, at: int, **change: object) -> Plan:
    found = [*made.evidence]
    found[at] = found[at]._replace(**change)  # type: ignore[arg-type]
    return replace(made, evidence=tuple(found))


def refused(made: Plan, at: int, hosts: int) -> Plan:
    """Of a VM that has a place it is claimed that it has none."""
    gone, why = made.placed[at], made.evidence[at]
    refusal = Refusal(gone.vm_id, gone.name, {Reason.CORES: hosts}, why.step)
    placed = (*made.placed[:at], *made.placed[at + 1 :])
    kept = (*made.evidence[:at], *made.evidence[at + 1 :])
    return replace(made, placed=placed, evidence=kept, refused=(*made.refused, refusal))


SPOILT: dict[str, Callable[[Plan, int, int], Plan]] = {
    "another host": lambda p, at, _: placement(p, at, host="h1" if p.placed[at].host != "h1" else "h0"),
    "no such host": lambda p, at, _: placement(p, at, host="nowhere"),
    "no such cell": lambda p, at, _: placement(p, at, cells=(77,)),
    "more than it takes": lambda p, at, _: placement(p, at, cores=p.placed[at].cores + 1),
    "less than it takes": lambda p, at, _: placement(p, at, nvme=p.placed[at].nvme - 1),
    "a candidate too many": lambda p, at, _: evidence(p, at, candidates=p.evidence[at].candidates + 1),
    "another score": lambda p, at, _: evidence(p, at, score=2 * p.evidence[at].score + 0.5),
    "a broken group": lambda p, at, _: evidence(p, at, broken=p.evidence[at].broken + 1),
    "refused, but it fits": refused,
    "a VM left out": lambda p, at, _: replace(p, placed=p.placed[:at], evidence=p.evidence[:at]),
    "one step for two": lambda p, at, _: evidence(p, at, step=p.evidence[at - 1].step),
}


@settings(max_examples=500, deadline=None)
@given(seed=SEEDS)
def test_a_sound_plan_has_no_faults(seed: int) -> None:
    rng = random.Random(seed)
    fleet, request = a_fleet(rng), a_request(rng)
    request = replace(request, **{name: rng.choice(values) for name, values in MORE.items()})
    request = replace(request, all_or_nothing=request.all_or_nothing and not request.most_vcpus)
    assert check(fleet, request, plan(fleet, request)) == []


@settings(max_examples=500, deadline=None)
@given(seed=SEEDS, fault=st.sampled_from(list(SPOILT)))
def test_a_planted_fault_is_found(seed: int, fault: str) -> None:
    rng = random.Random(seed)
    fleet, request, made = next(_with_places(rng, one_by_one=fault == "another host"))
    assert check(fleet, request, SPOILT[fault](made, rng.randrange(len(made.placed)), len(fleet.hosts))) != []


def _with_places(rng: random.Random, *, one_by_one: bool) -> Iterator[tuple[Fleet, PlanRequest, Plan]]:
    """Plans that place some VMs; if asked for, such that any other host is a fault: one that scores the same is none,
    and a search doesn't choose VM by VM."""
    while True:
        fleet, request = a_fleet(rng), a_request(rng, **({"policy": Policy.PACK} if one_by_one else {}))
        made = plan(fleet, request)
        searched = any(why.searched for why in made.evidence)
        if len(made.placed) > 1 and not (one_by_one and searched):
            yield fleet, request, made


@pytest.mark.parametrize("policy", list(Policy))
@pytest.mark.parametrize("fault", [fault for fault in SPOILT if fault != "another host"])
def test_a_fault_is_found_among_many(fault: str, policy: Policy) -> None:
    fleet, request, made = _crowded(policy)
    assert check(fleet, request, SPOILT[fault](made, 60, 40)) != []


@cache
def _crowded(policy: Policy) -> tuple[Fleet, PlanRequest, Plan]:
    """Hosts of several kinds, groups, and more VMs than fit; a sound plan."""
    file = generate(Recipe(40, 2, 3, 0.65, requests=600, apart=True, varied=True))
    request = PlanRequest(file.requests, policy)
    made = plan(file.fleet, request)
    assert len(made.placed) > 100
    assert len(made.refused) > 10
    assert check(file.fleet, request, made) == []
    return file.fleet, request, made


@pytest.mark.parametrize("policy", list(Policy))
def test_a_better_host_is_found_among_many(policy: Policy) -> None:
    """More than fit, of which nothing is rearranged: it would be all or nothing."""
    file = generate(Recipe(40, 2, 3, 0.65, requests=600, apart=True))
    request = PlanRequest(file.requests, policy, all_or_nothing=True)
    made = plan(file.fleet, request)
    # The place of another VM of its size, on another host: it fits there, and was not the best.
    size = {vm.vm_id: vm.profile for vm in request.vms}
    one, other = next(
        (at, place)
        for at, mine in enumerate(made.placed)
        for place in made.placed[at + 1 :]
        if size[mine.vm_id] == size[place.vm_id] and mine.host != place.host and not made.evidence[at].searched
    )
    found = check(file.fleet, request, placement(made, one, host=other.host, cells=other.cells))
    assert any("would have been better" in each for each in found)


def host(number: int, cores_free: tuple[int, ...], vms: tuple[SeatedVm, ...] = ()) -> HostState:
    cells = tuple(CellState(c, c, 1, 8, free, 8192, 8192 - 64 * (8 - free)) for c, free in enumerate(cores_free))
    return HostState(
        number, f"h{number}", "d", "c", f"r{number}", "v", "x86_64", cells, 1000, 900, vms, prefixes=((1,),)
    )


def profile(vcpus: int, networks: int = 1) -> Profile:
    return Profile(Shape(vcpus, 64, 1), "x86_64", networks=(None,) * networks)


def asked(*profiles: Profile) -> tuple[VmRequest, ...]:
    return tuple(VmRequest(UUID(int=n + 1), f"vm-{n}", each) for n, each in enumerate(profiles))


def test_addresses_run_out_on_every_host_of_their_prefix() -> None:
    fleet = Fleet.build([host(n, (8, 8)) for n in range(3)], {1: 4})
    request = PlanRequest(asked(*[profile(2, networks=2)] * 3, profile(2)))
    made = plan(fleet, request)
    assert [each.reasons for each in made.refused] == [{Reason.ADDRESSES: 3}] * 2
    assert check(fleet, request, made) == []


def test_moves_that_open_a_cell_are_made_before_the_vm_comes() -> None:
    seated = tuple(SeatedVm(UUID(int=90 + c), f"old-{c}", profile(4), (c,)) for c in (0, 1))
    fleet = Fleet.build([host(0, (4, 4), seated), host(1, (8, 2))], {1: 100})
    # The first finds its place as it is, and has seen that no other host has one.
    request = PlanRequest(asked(*[profile(8)] * 3), most_moves=1)
    made = plan(fleet, request)
    assert [place.name for place in made.placed if place.host == "h0"] == ["vm-1"]
    assert len(made.moves) == 1
    assert check(fleet, request, made) == []
    at = next(index for index, why in enumerate(made.evidence) if why.moves)
    still = evidence(made, at, moves=())
    assert check(fleet, request, still) != []
