# SPDX-License-Identifier: Apache-2.0
"""N+1: a plan that is accepted can be evacuated, what is refused for it could not, and one bad host stands alone."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppec_contract.api_placement import Policy
from ppec_orchestrator.placement.applied import applied
from ppec_orchestrator.placement.evacuation import evacuations, exposed
from ppec_orchestrator.placement.fleet import CellState, Fleet, HostState, SeatedVm
from ppec_orchestrator.placement.plan import Evacuation, Exposed, Plan
from ppec_orchestrator.placement.planner import Planner, plan
from ppec_orchestrator.placement.reasons import Reason
from ppec_orchestrator.placement.request import (
    Group,
    Level,
    PlanRequest,
    Profile,
    Shape,
    Spare,
    SpareRule,
    VmRequest,
    Where,
)

from .occupied import (
    GROUPS,
    Account,
    ASeat,
    a_profile,
    an_occupied_fleet,
    groups_kept,
    may_stand,
    place_of,
    some_groups,
)

SEEDS = st.integers(0, 2**32)
LEVELS = (Level.HOST, Level.RACK)


# --- brute force ------------------------------------------------------------------------------------------------------


def domains_of(fleet: Fleet, level: Level) -> dict[tuple[str, str], list[int]]:
    found: dict[tuple[str, str], list[int]] = {}
    for row, host in enumerate(fleet.hosts):
        found.setdefault((host.cluster, host.name if level is Level.HOST else host.rack), []).append(row)
    return found


def takes_in(fleet: Fleet, vm: SeatedVm, origin: HostState, host: HostState) -> bool:
    """By all rules but room and groups."""
    return (
        may_stand(vm.profile, host)
        and host.cluster == origin.cluster
        and host.vrf == origin.vrf
        and {p for family in origin.prefixes for p in family} <= {p for family in host.prefixes for p in family}
    )


def can_evacuate(fleet: Fleet, lost: list[int]) -> bool:
    """Every assignment is tried."""
    account = Account(fleet)
    waiting = [(vm, fleet.hosts[row]) for row in lost for vm in fleet.hosts[row].vms]
    standing = [(vm, h) for row, h in enumerate(fleet.hosts) if row not in lost for vm in h.vms]

    def from_(index: int) -> bool:
        if index == len(waiting):
            return True
        vm, origin = waiting[index]
        for row, host in enumerate(fleet.hosts):
            if row in lost or not takes_in(fleet, vm, origin, host) or not groups_kept(vm, host, standing):
                continue
            for seat in list(account.seats(vm.profile.shape, row)):
                account.take(vm.profile.shape, row, seat)
                standing.append((vm, host))
                if from_(index + 1):
                    return True
                standing.pop()
                account.take(vm.profile.shape, row, seat, -1)
        return False

    return from_(0)


def safe_domains(fleet: Fleet, level: Level) -> set[tuple[str, str]]:
    return {name for name, rows in domains_of(fleet, level).items() if can_evacuate(fleet, rows)}


def seated(fleet: Fleet, vm: VmRequest, row: int, seat: ASeat) -> Fleet:
    account = Account(fleet)
    account.take(vm.profile.shape, row, seat)
    hosts = account.hosts_now()
    cells = tuple(hosts[row].cells[column].cell for column in seat[0])
    newcomer = SeatedVm(vm.vm_id, vm.name, vm.profile, cells, vm.groups)
    hosts[row] = replace(hosts[row], vms=(*hosts[row].vms, newcomer))
    return Fleet.build(hosts, fleet.free_addresses)


def could_place(fleet: Fleet, vm: VmRequest, level: Level) -> bool:
    """Whether any place in the fleet is one that the rule allows."""
    standing = [(other, h) for h in fleet.hosts for other in h.vms]
    before = safe_domains(fleet, level)
    for row, host in enumerate(fleet.hosts):
        newcomer = SeatedVm(vm.vm_id, vm.name, vm.profile, (), vm.groups)
        if not takes_in(fleet, newcomer, replace(host, prefixes=()), host) or not groups_kept(newcomer, host, standing):
            continue
        seats = list(Account(fleet).seats(vm.profile.shape, row))
        for seat in [each for each in seats if len(each[0]) == len(seats[0][0])]:
            after = safe_domains(seated(fleet, vm, row, seat), level)
            if before <= after and (host.cluster, place_of(host, level)) in before:
                return True
    return False


# --- properties -------------------------------------------------------------------------------------------------------


def a_request(rng: random.Random, most_vms: int = 4, **fixed: object) -> PlanRequest:
    profiles = [a_profile(rng) for _ in range(2)]
    vms = tuple(
        VmRequest(UUID(int=number + 1), f"vm-{number}", rng.choice(profiles), groups=some_groups(rng))
        for number in range(rng.randint(1, most_vms))
    )
    return PlanRequest(vms, rng.choice(list(Policy)), **fixed)  # type: ignore[arg-type]


def assert_carried_out(fleet: Fleet, evacuation: Evacuation, lost: list[int]) -> None:
    """Each VM fits where the evacuation seats it, beside the others and by every rule."""
    account, rows = Account(fleet), {host.name: row for row, host in enumerate(fleet.hosts)}
    standing = [(vm, h) for row, h in enumerate(fleet.hosts) if row not in lost for vm in h.vms]
    waiting = {vm.vm_id: (vm, fleet.hosts[row]) for row in lost for vm in fleet.hosts[row].vms}
    without = {vm.vm_id for vm in evacuation.without_place}
    assert evacuation.seats.keys() | without == waiting.keys()
    assert not evacuation.seats.keys() & without
    for vm_id, (name, cells) in evacuation.seats.items():
        (vm, origin), row = waiting[vm_id], rows[name]
        host = fleet.hosts[row]
        assert row not in lost
        assert takes_in(fleet, vm, origin, host)
        assert groups_kept(vm, host, standing)
        seats = [s for s in account.seats(vm.profile.shape, row) if tuple(host.cells[c].cell for c in s[0]) == cells]
        account.take(vm.profile.shape, row, seats[0])
        standing.append((vm, host))


@settings(max_examples=400)
@given(SEEDS, st.sampled_from(LEVELS))
def test_an_evacuation_is_found_if_there_is_any(seed: int, level: Level) -> None:
    fleet = an_occupied_fleet(random.Random(seed))
    lost = domains_of(fleet, level)
    found = {(each.cluster, each.domain): each for each in evacuations(fleet, level)}
    assert found.keys() == {name for name, rows in lost.items() if any(fleet.hosts[row].vms for row in rows)}
    for name, evacuation in found.items():
        assert_carried_out(fleet, evacuation, lost[name])
        assert not evacuation.without_place or not can_evacuate(fleet, lost[name])
    unsafe = {each.domain for each in found.values() if each.without_place}
    assert {each.domain for each in exposed(fleet, level)} == unsafe


@settings(max_examples=400)
@given(SEEDS, st.sampled_from(LEVELS))
def test_an_accepted_plan_can_be_evacuated_and_what_is_refused_could_not(seed: int, level: Level) -> None:
    rng = random.Random(seed)
    fleet = an_occupied_fleet(rng, most_hosts=3, most_vms=4)
    request = a_request(rng, 3, spare=SpareRule(Spare.REQUIRED, level), most_moves=rng.choice((0, 0, 2)))
    result = plan(fleet, request)
    after = applied(fleet, request.vms, result)
    before = safe_domains(fleet, level)
    assert before <= safe_domains(after, level)
    for place in result.placed:
        host = fleet.hosts[fleet.index[place.host]]
        assert (host.cluster, place_of(host, level)) in before
    if result.refused and not request.all_or_nothing:
        refused = result.refused[0]
        earlier = [e.vm_id for e in result.evidence if e.step < refused.step]
        then = applied(fleet, request.vms, _only(result, earlier))
        vm = next(each for each in request.vms if each.vm_id == refused.vm_id)
        assert not could_place(then, vm, level)


def _only(result: Plan, vm_ids: list[UUID]) -> Plan:
    placed = tuple(each for each in result.placed if each.vm_id in vm_ids)
    return Plan(placed, (), tuple(each for each in result.evidence if each.vm_id in vm_ids))


@settings(max_examples=150)
@given(SEEDS, st.sampled_from(LEVELS))
def test_a_long_plan_leaves_safe_what_was_safe(seed: int, level: Level) -> None:
    rng = random.Random(seed)
    fleet = an_occupied_fleet(rng, most_hosts=6, most_vms=6)
    small = Profile(Shape(2, 2, 1), "x86_64")
    groups = rng.sample(GROUPS, 2)
    vms = tuple(
        VmRequest(UUID(int=n + 1), f"vm-{n}", small, groups=tuple(groups[: rng.choice((0, 0, 1, 2))]))
        for n in range(16)
    )
    result = plan(fleet, PlanRequest(vms, rng.choice(list(Policy)), spare=SpareRule(Spare.REQUIRED, level)))
    before = safe_domains(fleet, level)
    after = applied(fleet, vms, result)
    lost = domains_of(after, level)
    for each in evacuations(after, level):
        name = (each.cluster, each.domain)
        # The product's own search may give up where there are so many.
        assert not each.without_place or name not in before or can_evacuate(after, lost[name])


@settings(max_examples=200)
@given(SEEDS, st.sampled_from(LEVELS))
def test_a_warning_places_as_without_the_rule_and_names_what_is_exposed(seed: int, level: Level) -> None:
    rng = random.Random(seed)
    fleet, request = an_occupied_fleet(rng, clusters=("c1", "c2")), a_request(rng)
    free = plan(fleet, request)
    warned = plan(fleet, replace(request, spare=SpareRule(Spare.WARN, level)))
    assert (warned.placed, warned.refused, warned.evidence) == (free.placed, free.refused, free.evidence)
    assert free.exposed == ()
    touched = {fleet.hosts[fleet.index[place.host]].cluster for place in free.placed}
    after = applied(fleet, request.vms, free)
    unsafe = {
        name
        for (cluster, name), rows in domains_of(after, level).items()
        if cluster in touched and not can_evacuate(after, rows)
    }
    assert {each.domain for each in warned.exposed} == unsafe


@settings(max_examples=200)
@given(SEEDS, st.sampled_from(LEVELS))
def test_what_is_kept_from_plan_to_plan_changes_no_answer(seed: int, level: Level) -> None:
    rng = random.Random(seed)
    fleet = an_occupied_fleet(rng, clusters=("c1", "c2"))
    first, planner = fleet, Planner(fleet)
    for number in range(6):
        mode = rng.choice((Spare.REQUIRED, Spare.WARN))
        request = a_request(rng, spare=SpareRule(mode, level), most_moves=rng.choice((0, 2)))
        result = planner.plan(request)
        anew = plan(fleet, request)
        assert (result.placed, result.refused) == (anew.placed, anew.refused)
        assert {each.domain for each in result.exposed} == {each.domain for each in anew.exposed}
        # VMs that come, or all that came go again.
        if rng.random() < 0.4:
            planner.follow(first, [row for row, host in enumerate(fleet.hosts) if host is not first.hosts[row]])
            fleet = first
            continue
        vms = tuple(replace(vm, vm_id=UUID(int=vm.vm_id.int + 100 * (number + 1))) for vm in request.vms)
        came = planner.plan(replace(request, vms=vms, spare=SpareRule()))
        changed = applied(fleet, vms, came)
        rows = [row for row, host in enumerate(changed.hosts) if host is not fleet.hosts[row]]
        planner.follow(changed, rows)
        fleet = changed


# --- cases ------------------------------------------------------------------------------------------------------------

SHAPE = Shape(4, 1024, 10)
PROFILE = Profile(SHAPE, "x86_64")


def a_host(
    name: str, *, cores: int = 8, held: int = 0, cluster: str = "c1", rack: str = "r1", **more: object
) -> HostState:
    """With so many VMs of `PROFILE`, two cores each."""
    cells = (CellState(0, 0, 2, cores, cores - 2 * held, 65536, 65536 - 1024 * held),)
    vms = tuple(SeatedVm(UUID(int=hash((name, n)) % 2**64), f"{name}-{n}", PROFILE, (0,)) for n in range(held))
    given: Mapping[str, object] = {"vms": vms, "prefixes": ((1,),), **more}
    return HostState(int(name[1:]), name, "d1", cluster, rack, "v1", "x86_64", cells, 1000, 1000 - 10 * held, **given)  # type: ignore[arg-type]


def ask(count: int, mode: Spare = Spare.REQUIRED, level: Level = Level.HOST, profile: Profile = PROFILE) -> PlanRequest:
    vms = tuple(VmRequest(UUID(int=n + 1), f"vm-{n}", profile) for n in range(count))
    return PlanRequest(vms, Policy.PACK, spare=SpareRule(mode, level))


def refused(result: Plan) -> dict[Reason, int]:
    return dict(result.refused[0].reasons)


def test_two_hosts_are_filled_to_one_hosts_worth() -> None:
    result = plan(Fleet.build([a_host("h1"), a_host("h2")]), ask(8))
    assert len(result.placed) == 4
    assert refused(result) == {Reason.N_PLUS_ONE: 1, Reason.CORES: 1} or refused(result) == {Reason.N_PLUS_ONE: 2}
    assert "after which a loss could not be made good (N+1)" in result.refused[0].sentence()


def test_a_host_alone_in_its_cluster_can_never_be_made_good() -> None:
    fleet = Fleet.build([a_host("h1"), a_host("h2", cluster="c2")])
    assert refused(plan(fleet, ask(1))) == {Reason.N_PLUS_ONE: 2}


def test_a_bad_host_is_named_and_stops_nothing_elsewhere() -> None:
    # h1 has nine VMs, and there is room for eight elsewhere, as long as nothing is placed.
    hosts = [a_host("h1", cores=18, held=9), a_host("h2"), a_host("h3")]
    result = plan(Fleet.build(hosts), ask(3))
    assert {place.host for place in result.placed} <= {"h2", "h3"}
    assert len(result.placed) == 3
    (named,) = result.exposed
    assert (named.domain, named.vm.startswith("h1-"), named.without_place) == ("h1", True, 1)


def test_a_bad_host_of_a_cluster_that_the_plan_leaves_alone_is_not_looked_at() -> None:
    hosts = [a_host("h1", held=4, cluster="c2"), a_host("h2"), a_host("h3")]
    profile = replace(PROFILE, where=Where(cluster="c1"))
    result = plan(Fleet.build(hosts), ask(1, profile=profile))
    assert (len(result.placed), result.exposed) == (1, ())


def test_nothing_is_placed_on_a_host_whose_loss_could_not_be_made_good() -> None:
    # h1 has room for two more, but its loss is hopeless as it is.
    hosts = [a_host("h1", cores=16, held=6), a_host("h2", held=2), a_host("h3", held=2)]
    result = plan(Fleet.build(hosts), ask(2))
    assert "h1" not in {place.host for place in result.placed}


def test_a_warning_says_what_the_plan_left_exposed() -> None:
    result = plan(Fleet.build([a_host("h1"), a_host("h2")]), ask(5, Spare.WARN))
    assert len(result.placed) == 5
    assert [each.domain for each in result.exposed] == ["h1", "h2"]


def test_hosts_of_one_rack_do_not_help_each_other_when_the_rack_is_lost() -> None:
    hosts = [a_host("h1", rack="a"), a_host("h2", rack="a"), a_host("h3", rack="b")]
    assert len(plan(Fleet.build(hosts), ask(12, level=Level.HOST)).placed) == 8
    result = plan(Fleet.build(hosts), ask(12, level=Level.RACK))
    assert len(result.placed) == 4


@pytest.mark.parametrize("unfit", [{"draining": True}, {"live": False}, {"vrf": "v2"}, {"prefixes": ((2,),)}])
def test_vms_go_only_where_they_could_run_with_their_addresses(unfit: dict[str, object]) -> None:
    refuge = replace(a_host("h2"), **unfit)  # type: ignore[arg-type]
    assert exposed(Fleet.build([a_host("h1", held=1), a_host("h2")]), Level.HOST) == ()
    assert exposed(Fleet.build([a_host("h1", held=1), refuge]), Level.HOST) == (
        Exposed("h1", Level.HOST, "c1", "h1-0", 1),
    )


def test_total_room_is_not_enough_without_a_cell() -> None:
    free = (CellState(0, 0, 2, 8, 1, 65536, 65536), CellState(1, 1, 2, 8, 1, 65536, 65536))
    split = replace(a_host("h2"), cells=free)
    assert [each.domain for each in exposed(Fleet.build([a_host("h1", held=1), split]), Level.HOST)] == ["h1"]


def test_vms_that_stand_apart_stand_apart_after_the_loss_too() -> None:
    apart = (Group("apart"),)
    hosts = [a_host("h1", held=1), a_host("h2", held=1), a_host("h3")]
    grouped = [replace(host, vms=tuple(replace(vm, groups=apart) for vm in host.vms)) for host in hosts]
    assert exposed(Fleet.build(grouped), Level.HOST) == ()
    third = replace(ask(1).vms[0], groups=apart)
    result = plan(Fleet.build(grouped), replace(ask(1), vms=(third,)))
    assert refused(result) == {Reason.ANTI_AFFINITY: 2, Reason.N_PLUS_ONE: 1}


def test_another_cell_is_taken_if_the_tightest_is_the_one_that_a_loss_needs() -> None:
    # What h2 may lose needs four cores and much memory: on h1 that is the tighter cell alone.
    much = Profile(Shape(8, 32768, 10), "x86_64")
    cells = (CellState(0, 0, 2, 4, 4, 65536, 65536), CellState(1, 1, 2, 5, 5, 8192, 8192))
    lost = SeatedVm(UUID(int=99), "much", much, (0,))
    h2 = (CellState(0, 0, 2, 4, 0, 32768, 0), CellState(1, 1, 2, 8, 8, 65536, 65536))
    fleet = Fleet.build([replace(a_host("h1"), cells=cells), replace(a_host("h2"), cells=h2, vms=(lost,))])
    here = Profile(Shape(8, 1024, 10), "x86_64", Where(labels=frozenset({("disk", "ssd")})))
    both = Fleet.build([replace(host, labels={"disk": "ssd"}) for host in fleet.hosts])
    tight = plan(both, replace(ask(1, Spare.OFF, profile=here), policy=Policy.PACK))
    assert (tight.placed[0].host, tight.placed[0].cells) == ("h1", (0,))
    spared = plan(both, ask(1, profile=here))
    assert (spared.placed[0].host, spared.placed[0].cells) == ("h1", (1,))


def test_the_one_way_there_is_is_found() -> None:
    # Ten cores and ten: 4 + 3 + 3 twice. Whoever puts both fours on one host is left with a three.
    sizes = (8, 8, 6, 6, 6, 6)
    profiles = [Profile(Shape(vcpus, 64, 1), "x86_64") for vcpus in sizes]
    lost = tuple(SeatedVm(UUID(int=n + 1), f"vm-{n}", profile, (0,)) for n, profile in enumerate(profiles))
    h1 = replace(a_host("h1", cores=20), cells=(CellState(0, 0, 2, 20, 0, 65536, 0),), vms=lost)
    fleet = Fleet.build([h1, a_host("h2", cores=10), a_host("h3", cores=10)])
    (found,) = evacuations(fleet, Level.HOST)
    assert found.without_place == ()
    assert_carried_out(fleet, found, [0])
    assert len(exposed(Fleet.build([h1, a_host("h2", cores=10), a_host("h3", cores=9)]), Level.HOST)) == 1


def test_a_witness_does_not_outlast_a_neighbour_that_its_vm_must_stand_apart_from() -> None:
    apart = (Group("racks", level=Level.RACK),)
    h1 = a_host("h1", held=1, rack="a")
    h1 = replace(h1, vms=tuple(replace(vm, groups=apart) for vm in h1.vms))
    h2, h3, h4 = a_host("h2", rack="b"), a_host("h3", rack="b"), a_host("h4", cores=2, rack="c")
    planner = Planner(Fleet.build([h1, h2, h3, h4]))
    assert [place.host for place in planner.plan(ask(1)).placed] == ["h4"]
    # With such a VM in rack b, h4 is all that is left for the one on h1.
    crowded = a_host("h3", held=1, rack="b")
    crowded = replace(crowded, vms=tuple(replace(vm, groups=apart) for vm in crowded.vms))
    planner.follow(planner.fleet.changed([crowded]), [2])
    assert [place.host for place in planner.plan(ask(1)).placed] != ["h4"]


def test_only_hosts_and_racks_are_lost() -> None:
    with pytest.raises(ValueError, match="not of a datacentre"):
        exposed(Fleet.build([a_host("h1")]), Level.DATACENTRE)


# --- the new VM as it will be known ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "narrow",
    [
        {"where": Where(host="h1")},
        {"where": Where(rack="a")},
        {"where": Where(labels=frozenset({("disk", "ssd")}))},
        {"where": Where(without=frozenset({("disk", "hdd")}))},
        {"capabilities": frozenset({"new"})},
        {"networks": (frozenset({2}),)},
        {"fixed": (frozenset({2}),)},
    ],
)
def test_a_vm_may_restart_beyond_the_part_of_the_fleet_that_it_was_asked_for(narrow: dict[str, Any]) -> None:
    served = {"prefixes": ((1, 2),), "capabilities": frozenset({"new"})}
    h1 = replace(a_host("h1", rack="a"), labels={"disk": "ssd"}, **served)
    h2 = replace(a_host("h2", rack="b"), labels={"disk": "hdd"}, **{**served, "capabilities": frozenset()})
    fleet = Fleet.build([h1, h2])
    result = plan(fleet, ask(1, profile=replace(PROFILE, **narrow)))
    assert [place.host for place in result.placed] == ["h1"]
    after = applied(fleet, ask(1, profile=replace(PROFILE, **narrow)).vms, result)
    assert exposed(after, Level.HOST) == ()


def test_a_vm_keeps_its_vrf_when_it_restarts_even_if_any_would_have_done() -> None:
    fleet = Fleet.build([a_host("h1"), replace(a_host("h2"), vrf="v2")])
    assert refused(plan(fleet, ask(1))) == {Reason.N_PLUS_ONE: 2}
