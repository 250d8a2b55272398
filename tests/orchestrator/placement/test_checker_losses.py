# SPDX-License-Identifier: Apache-2.0
"""N+1 in the checker: what is lost with a domain restarts where the plan says. Each rule is broken alone and named."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppec_contract.api_placement import Policy
from ppec_contract.vm import NumaPolicy
from ppec_orchestrator.placement.checker import check
from ppec_orchestrator.placement.fleet import Fleet, HostState, PoolState, SeatedVm
from ppec_orchestrator.placement.plan import Evacuation, Exposed, Plan
from ppec_orchestrator.placement.planner import plan
from ppec_orchestrator.placement.request import Group, Level, PlanRequest, Profile, Shape, Spare, SpareRule, Where

from .occupied import a_profile, an_occupied_fleet, some_groups
from .test_checker_rules import CELLS, PLAIN, a_host, cells, vms

LEVELS = (Level.HOST, Level.RACK)
LOST = Profile(Shape(4, 1024, 40, pool="fast", nvme=1), "x86_64", Where(vrf="v"))
A, B, NEW = UUID(int=90), UUID(int=91), UUID(int=1)
ROOMY = {"cells": cells(nvme=4, nvme_free=4), "disk_mib": 1000, "disk_free_mib": 1000}


def old(vm_id: UUID, *groups: Group, profile: Profile = LOST) -> SeatedVm:
    return SeatedVm(vm_id, {A: "a", B: "b"}.get(vm_id, "c"), profile, (0,), groups)


def a_fleet(*lost: SeatedVm, others: tuple[HostState, ...] = (), **h2: Any) -> Fleet:
    """h1 has two VMs, h2 what is changed of it; the plan places one on h3."""
    h1 = a_host("h1", vms=lost or (old(A), old(B)), **ROOMY)
    h2 = {"rack": "r2", **ROOMY, "pools": {"fast": PoolState(1000, 1000)}, **h2}
    return Fleet.build([h1, a_host("h2", **h2), a_host("h3", rack="r3", **ROOMY), *others])


def asked(mode: Spare = Spare.REQUIRED, level: Level = Level.HOST, *groups: Group) -> PlanRequest:
    """Of all hosts it is h3 alone that could take the VM: no change of the others changes the rest of the plan."""
    one = vms(replace(PLAIN, where=Where(host="h3")), groups=groups)
    return PlanRequest(one, Policy.PACK, spare=SpareRule(mode, level, witnessed=True))


def h1_to(a: tuple[str, tuple[int, ...]], b: tuple[str, tuple[int, ...]], **change: Any) -> Evacuation:
    return replace(Evacuation("h1", Level.HOST, "c", {A: a, B: b}), **change)


H1, H3 = h1_to(("h2", (0,)), ("h2", (1,))), Evacuation("h3", Level.HOST, "c", {NEW: ("h1", (0,))})


def made(*evacuations: Evacuation, request: PlanRequest | None = None, **change: Any) -> Plan:
    """With these witnesses, whatever the planner's are."""
    roomy = plan(a_fleet(), replace(request or asked(), spare=SpareRule()))
    return replace(roomy, evacuations=evacuations, **change)


def test_a_plan_with_its_witnesses_is_sound() -> None:
    assert check(a_fleet(), asked(), made(H1, H3)) == []
    assert check(a_fleet(), asked(), plan(a_fleet(), asked())) == []
    assert check(a_fleet(), replace(asked(), spare=SpareRule()), made()) == []


# --- where a VM can't restart -----------------------------------------------------------------------------------------

BOTH = [f"{vm} can't restart in cells ({cell},) of h2 when h1 is lost" for vm, cell in (("a", 0), ("b", 1))]
UNFIT: dict[str, dict[str, Any]] = {
    "silent": {"live": False},
    "draining": {"draining": True},
    "another cluster": {"cluster": "x"},
    "another VRF": {"vrf": "x"},
    "without a prefix of the lost host": {"prefixes": ((1,), (3,))},
    "another architecture": {"architecture": "aarch64"},
    "no pool": {"pools": {}},
    "a pool too full": {"pools": {"fast": PoolState(100, 39)}},
    "too few cores": {"cells": cells(cores_free=1)},
    "too little memory": {"cells": cells(memory_free_mib=1023)},
    "too few drives": {"cells": cells(nvme_free=0)},
    "other cells": {"cells": tuple(replace(cell, cell=cell.cell + 2) for cell in CELLS)},
}


@pytest.mark.parametrize("unfit", list(UNFIT))
def test_a_host_where_the_lost_can_not_be(unfit: str) -> None:
    assert check(a_fleet(**UNFIT[unfit]), asked(), made(H1, H3)) == BOTH


def test_another_vrf_is_none_for_a_vm_that_was_asked_for_in_any() -> None:
    anywhere = (old(A, profile=replace(LOST, where=Where())), old(B))
    assert check(a_fleet(*anywhere), asked(), made(H1, H3)) == []
    assert check(a_fleet(*anywhere, vrf="x"), asked(), made(H1, H3)) == BOTH


ONE_ROOM: dict[str, dict[str, Any]] = {
    "cores": {"cells": cells(cores_free=3)},
    "memory": {"cells": cells(memory_free_mib=2047)},
    "drives": {"cells": cells(nvme_free=1)},
    "the pool": {"pools": {"fast": PoolState(100, 79)}},
}


@pytest.mark.parametrize("scarce", list(ONE_ROOM))
def test_two_that_are_lost_together_with_room_for_one(scarce: str) -> None:
    both = h1_to(("h2", (0,)), ("h2", (0,)))
    assert check(a_fleet(), asked(), made(both, H3)) == []
    second = ["b can't restart in cells (0,) of h2 when h1 is lost"]
    assert check(a_fleet(**ONE_ROOM[scarce]), asked(), made(both, H3)) == second


def test_the_own_disk_of_a_host_counts() -> None:
    plain = (old(A, profile=PLAIN), old(B, profile=PLAIN))
    assert check(a_fleet(*plain, disk_free_mib=80), asked(), made(H1, H3)) == []
    assert check(a_fleet(*plain, disk_free_mib=79), asked(), made(H1, H3)) == BOTH[1:]


def test_each_domain_is_lost_alone_with_all_room_for_its_own() -> None:
    tight = {"cells": (replace(CELLS[0], cores_free=4), replace(CELLS[1], cores_free=0))}
    h1 = h1_to(("h2", (0,)), ("h2", (0,)))
    h3 = Evacuation("h3", Level.HOST, "c", {NEW: ("h2", (0,))})
    assert check(a_fleet(**tight), asked(), made(h1, h3)) == []
    assert check(a_fleet(**tight), asked(), made(h3, h1)) == []


def test_what_the_plan_places_leaves_less_room() -> None:
    h1 = h1_to(("h2", (0,)), ("h3", (0,)))
    tight = [replace(h, cells=cells(cores_free=3, nvme_free=2)) if h.name == "h3" else h for h in a_fleet().hosts]
    place = plan(Fleet.build(tight), replace(asked(), spare=SpareRule()))
    assert place.placed[0].cells == (0,)
    beside = ["b can't restart in cells (0,) of h3 when h1 is lost"]
    assert check(Fleet.build(tight), asked(), replace(place, evacuations=(h1, H3))) == beside


def test_more_cells_than_would_do_are_as_good_for_a_restart() -> None:
    wide = replace(LOST, shape=Shape(4, 1024, 40, NumaPolicy(multi_cell=True)))
    over_two = h1_to(("h2", (0, 1)), ("h2", (1,)))
    assert check(a_fleet(old(A, profile=wide), old(B)), asked(), made(over_two, H3)) == []
    narrow = ["a can't restart in cells (0, 1) of h2 when h1 is lost"]
    assert check(a_fleet(), asked(), made(over_two, H3)) == narrow
    uneven = {"cells": (CELLS[0], replace(CELLS[1], threads_per_core=1))}
    assert check(a_fleet(old(A, profile=wide), old(B), **uneven), asked(), made(over_two, H3)) == narrow


# --- groups -----------------------------------------------------------------------------------------------------------

NEAR, FAR = ("h2", (0,)), ("h3", (1,))


@pytest.mark.parametrize("level", LEVELS)
def test_members_that_stand_apart_stay_apart(level: Level) -> None:
    apart = Group("apart", level=level)
    grouped = a_fleet(old(A, apart), old(B, apart))
    assert check(grouped, asked(), made(h1_to(NEAR, FAR), H3)) == []
    second = ["b can't restart in cells (0,) of h2 when h1 is lost"]
    assert check(grouped, asked(), made(h1_to(NEAR, NEAR), H3)) == second
    rather = replace(apart, hard=False)
    assert check(a_fleet(old(A, rather), old(B, rather)), asked(), made(h1_to(NEAR, NEAR), H3)) == []


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("apart", [True, False])
def test_members_keep_to_those_who_stay(level: Level, apart: bool) -> None:
    group = Group("group", apart=apart, level=level)
    fleet = a_fleet(old(A, group), old(B), vms=(old(UUID(int=95), group),))
    h2 = Evacuation("h2", Level.HOST, "c", {UUID(int=95): ("h3" if apart else "h1", (0,))})
    kept, broken = (FAR, NEAR) if apart else (NEAR, FAR)
    assert check(fleet, asked(), made(h1_to(kept, NEAR), h2, H3)) == []
    host, number = broken
    found = check(fleet, asked(), made(h1_to(broken, NEAR), h2, H3))
    assert found == [f"a can't restart in cells {number} of {host} when h1 is lost"]


def test_members_that_are_all_lost_begin_anew_together() -> None:
    together = Group("together", apart=False)
    fleet = a_fleet(old(A, together), old(B, together))
    assert check(fleet, asked(), made(h1_to(NEAR, NEAR), H3)) == []
    found = check(fleet, asked(), made(h1_to(NEAR, FAR), H3))
    assert found == ["b can't restart in cells (1,) of h3 when h1 is lost"]


def test_a_new_member_is_one_of_those_who_stay() -> None:
    apart = Group("apart")
    request = asked(Spare.REQUIRED, Level.HOST, apart)
    fleet, h3 = a_fleet(old(A, apart), old(B)), Evacuation("h3", Level.HOST, "c", {NEW: ("h2", (0,))})
    assert check(fleet, request, made(h1_to(NEAR, NEAR), h3, request=request)) == []
    found = check(fleet, request, made(h1_to(FAR, NEAR), h3, request=request))
    assert found == ["a can't restart in cells (1,) of h3 when h1 is lost"]
    found = check(fleet, request, made(h1_to(NEAR, NEAR), H3, request=request))
    assert found == ["v0 can't restart in cells (0,) of h1 when h3 is lost"]


# --- what a witness must say ------------------------------------------------------------------------------------------

UNSAID = "h1 has 2 VMs, and where they would restart is said of {}"
FALSE: dict[str, tuple[tuple[Evacuation, ...], list[str]]] = {
    "the lost host": ((h1_to(("h2", (0,)), ("h1", (1,))), H3), ["b can't restart in cells (1,) of h1 when h1 is lost"]),
    "no such host": ((h1_to(("h9", (0,)), NEAR), H3), ["a can't restart in cells (0,) of h9 when h1 is lost"]),
    "no such cell": ((h1_to(("h2", (7,)), NEAR), H3), ["a can't restart in cells (7,) of h2 when h1 is lost"]),
    "no cell": ((h1_to(("h2", ()), NEAR), H3), ["a can't restart in cells () of h2 when h1 is lost"]),
    "a cell twice": ((h1_to(("h2", (0, 0)), NEAR), H3), ["a can't restart in cells (0, 0) of h2 when h1 is lost"]),
    "too many cells": ((h1_to(("h2", (0, 1)), NEAR), H3), ["a can't restart in cells (0, 1) of h2 when h1 is lost"]),
    "a domain left out": ((H3,), [UNSAID.format(0)]),
    "all left out": ((), [UNSAID.format(0), "h3 has 1 VMs, and where they would restart is said of 0"]),
    "a VM left out": ((replace(H1, seats={A: NEAR}), H3), [UNSAID.format(1)]),
    "a VM too many": ((replace(H1, seats={**H1.seats, UUID(int=7): NEAR}), H3), [UNSAID.format(3)]),
    "another VM": ((replace(H1, seats={A: NEAR, UUID(int=7): NEAR}), H3), [UNSAID.format(2)]),
    "the domain of another cluster": ((replace(H1, cluster="x"), H3), [UNSAID.format(0)]),
}


@pytest.mark.parametrize("fault", list(FALSE))
@pytest.mark.parametrize("mode", [Spare.WARN, Spare.REQUIRED])
def test_a_witness_with_one_fault(fault: str, mode: Spare) -> None:
    said, found = FALSE[fault]
    assert check(a_fleet(), asked(mode), made(H1, H3)) == []
    assert check(a_fleet(), asked(mode), made(*said)) == found


def test_a_lost_rack_has_no_host_left() -> None:
    """h2 shares it with h1, and is empty."""
    request = asked(level=Level.RACK)
    to_h3 = Evacuation("r", Level.RACK, "c", {A: FAR, B: FAR})
    r3 = Evacuation("r3", Level.RACK, "c", H3.seats)
    assert check(a_fleet(rack="r"), request, made(to_h3, r3)) == []
    found = check(a_fleet(rack="r"), request, made(replace(to_h3, seats={A: NEAR, B: FAR}), r3))
    assert found == ["a can't restart in cells (0,) of h2 when r is lost"]


def test_racks_of_one_name_in_two_clusters_are_two() -> None:
    request, r3 = asked(level=Level.RACK), Evacuation("r3", Level.RACK, "c", H3.seats)
    there = a_host("h8", cluster="x", vms=(old(UUID(int=95)),))
    assert check(a_fleet(others=(there,)), request, made(Evacuation("r", Level.RACK, "c", H1.seats), r3)) == []


# --- which domains ----------------------------------------------------------------------------------------------------


def test_clusters_that_the_plan_leaves_alone_are_not_asked_for() -> None:
    there = (a_host("h8", cluster="x", vms=(old(UUID(int=95)),)), a_host("h9", cluster="x"))
    fleet = a_fleet(others=there)
    assert check(fleet, asked(), made(H1, H3)) == []
    # What is said of them all the same has to be right.
    wrong = Evacuation("h8", Level.HOST, "x", {UUID(int=95): ("h8", (0,))})
    assert check(fleet, asked(), made(H1, H3, wrong)) == ["c can't restart in cells (0,) of h8 when h8 is lost"]


@pytest.mark.parametrize("hard", [True, False])
def test_clusters_with_members_of_its_hard_groups_are(hard: bool) -> None:
    group = Group("group", level=Level.RACK, hard=hard)
    there = (a_host("h8", cluster="x", rack="r8", vms=(old(UUID(int=95), group),)), a_host("h9", cluster="x"))
    fleet, request = a_fleet(others=there), asked(Spare.REQUIRED, Level.HOST, group)
    unsaid = ["h8 has 1 VMs, and where they would restart is said of 0"]
    assert check(fleet, request, made(H1, H3, request=request)) == (unsaid if hard else [])
    h8 = Evacuation("h8", Level.HOST, "x", {UUID(int=95): ("h9", (0,))})
    assert check(fleet, request, made(H1, H3, h8, request=request)) == []
    # It need not be named: the plan does not come to its cluster.
    exposed = replace(h8, seats={}, without_place=there[0].vms)
    assert check(fleet, request, made(H1, H3, exposed, request=request)) == []


HOPELESS = h1_to(NEAR, NEAR, seats={}, without_place=(old(B), old(A)))
NAMED = Exposed("h1", Level.HOST, "c", "a", 2)


def test_an_exposed_domain_is_named_as_what_it_is() -> None:
    assert check(a_fleet(), asked(), made(HOPELESS, H3, exposed=(NAMED,))) == []
    unnamed = ["h1 has VMs that would have no place if it were lost, and is not named as exposed"]
    unfounded = ["a domain is named as exposed whose VMs would restart"]
    assert check(a_fleet(), asked(), made(HOPELESS, H3)) == unnamed
    for wrong in (replace(NAMED, vm="b"), replace(NAMED, without_place=1), replace(NAMED, domain="h2")):
        assert check(a_fleet(), asked(), made(HOPELESS, H3, exposed=(wrong,))) == unnamed + unfounded
    assert check(a_fleet(), asked(), made(H1, H3, exposed=(NAMED,))) == unfounded


@pytest.mark.parametrize("level", LEVELS)
def test_nothing_is_placed_on_an_exposed_domain_if_that_is_ruled_out(level: Level) -> None:
    domain = "h3" if level is Level.HOST else "r3"
    new = SeatedVm(NEW, "v0", PLAIN, (0,))
    h1, h3 = (
        replace(H1, domain="h1" if level is Level.HOST else "r", level=level),
        Evacuation(domain, level, "c", {}, (new,)),
    )
    exposed = made(h1, h3, exposed=(Exposed(domain, level, "c", "v0", 1),))
    ruled_out = [f"v0 is on {domain}, whose VMs would have no place if it were lost"]
    assert check(a_fleet(), asked(Spare.REQUIRED, level), exposed) == ruled_out
    assert check(a_fleet(), asked(Spare.WARN, level), exposed) == []


def test_a_required_rule_closes_hosts_and_opens_none() -> None:
    fleet = Fleet.build([a_host("h1"), a_host("h2")])
    request = PlanRequest(vms(PLAIN), Policy.PACK, spare=SpareRule(Spare.REQUIRED, witnessed=True))
    sound = plan(fleet, request)
    assert check(fleet, request, sound) == []
    fewer, more = (replace(sound, evidence=(sound.evidence[0]._replace(candidates=count),)) for count in (1, 3))
    assert check(fleet, request, fewer) == []
    assert check(fleet, request, more) == ["v0: candidates is said to be 3, it is 2"]


# --- the planner's own ------------------------------------------------------------------------------------------------


def a_plan(seed: int, level: Level, mode: Spare) -> tuple[Fleet, PlanRequest, Plan]:
    rng = random.Random(seed)
    fleet = an_occupied_fleet(rng, most_hosts=6, most_vms=8, clusters=("c1", "c2") if rng.random() < 0.3 else ("c1",))
    some = tuple(replace(vm, profile=a_profile(rng), groups=some_groups(rng)) for vm in vms(*[PLAIN] * 3))
    rule = SpareRule(mode, level, witnessed=True)
    request = PlanRequest(some, rng.choice(list(Policy)), spare=rule, most_moves=rng.choice((0, 0, 2)))
    return fleet, request, plan(fleet, request)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(LEVELS), st.sampled_from((Spare.WARN, Spare.REQUIRED)))
def test_the_planners_witnesses_hold(seed: int, level: Level, mode: Spare) -> None:
    fleet, request, sound = a_plan(seed, level, mode)
    assert check(fleet, request, sound) == []
    # They are evidence, and change nothing else.
    without = plan(fleet, replace(request, spare=SpareRule(mode, level)))
    assert without == replace(sound, evacuations=())


SPOILT: dict[str, Callable[[Evacuation, UUID], Evacuation]] = {
    "left out": lambda e, vm: replace(e, seats={i: seat for i, seat in e.seats.items() if i != vm}),
    "no such cell": lambda e, vm: replace(e, seats={**e.seats, vm: (e.seats[vm][0], (77,))}),
    "no such host": lambda e, vm: replace(e, seats={**e.seats, vm: ("nowhere", e.seats[vm][1])}),
}


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(LEVELS), st.sampled_from(list(SPOILT)))
def test_a_fault_in_any_of_them_is_found(seed: int, level: Level, fault: str) -> None:
    rng = random.Random(seed)
    while True:
        fleet, request, sound = a_plan(rng.randrange(2**32), level, Spare.REQUIRED)
        told = [at for at, each in enumerate(sound.evacuations) if each.seats]
        if told:
            break
    at = rng.choice(told)
    spoilt = SPOILT[fault](sound.evacuations[at], rng.choice(list(sound.evacuations[at].seats)))
    wrong = (*sound.evacuations[:at], spoilt, *sound.evacuations[at + 1 :])
    assert check(fleet, request, replace(sound, evacuations=wrong)) != []
